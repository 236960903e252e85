"""The traced chain against the adapters that were written by hand, one for each family, as handwritten.py noted them.

That each output is the model's own is in test_contract.py; here is where a chain is cut, and what is solved together.
"""

import json
from pathlib import Path

import pytest
from cases import BY_NAME, variants

from snows_hf.adapters import Chain, build_chain


SAID = json.loads((Path(__file__).parent / "handwritten.json").read_text())
KINDS = ("qkv", "proj", "mlp0", "mlp3", "depthwise", "pointwise")
"""Kinds that mean the same. What was ``downsample`` is named by what it computes, as are convolutions of 1 x 1."""


@pytest.fixture(scope="module", params=variants(SAID))
def both(request: pytest.FixtureRequest) -> tuple[list[list], Chain]:
    case = BY_NAME[request.param]
    return SAID[case.name], build_chain(case.model(), case.images(1))


def test_operations_after_the_stem_are_those_written_by_hand(both: tuple[list[list], Chain]) -> None:
    """As many, with the same groups, in the same order. An operation that was named for its block is named for the
    layer in it that ends it."""
    said, chain = both
    expected = said[next(i for i, operation in enumerate(said) if len(operation) > 1) :]
    got = chain.operations[chain.groups()[0][0] :]
    for (name, *group), operation in zip(expected, got, strict=True):
        assert operation.name.startswith(name.partition(" > ")[0])
        assert [operation.group.name] * bool(group) == group[:1] if operation.group else not group


def test_groups_are_those_written_by_hand(both: tuple[list[list], Chain]) -> None:
    said, chain = both
    expected = [operation[1:] for operation in said if len(operation) > 1]
    for (name, kind, parameters), (_, group) in zip(expected, chain.groups(), strict=True):
        assert (group.name, list(group.parameters)) == (name, parameters)
        assert group.kind == kind or kind not in KINDS
