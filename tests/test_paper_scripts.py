"""What the scripts in examples/paper compute themselves, against other ways to compute it."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from tiny import cifar_resnet, config, images, magnitude_masks

from snows_hf.adapters import build_chain
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment


SCRIPTS = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """``script("table6")`` is that module; sys.path and the scripts' own modules are as before afterwards."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if "." not in name and str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS.parents[1])):
            del sys.modules[name]


def test_every_script_has_its_command_in_its_docstring(script) -> None:
    scripts = sorted(path for path in SCRIPTS.glob("*.py") if path.stem != "common")
    assert len(scripts) == 10
    for path in scripts:
        assert f"python examples/paper/{path.name}" in script(path.stem).__doc__


@pytest.mark.slow
def test_operations_against_table_6(script) -> None:
    reductions = script("table6").reductions
    everything = {
        pattern: reductions(timm.create_model("resnet20_cifar"), 32, pattern)[0] for pattern in ("1:4", "2:4")
    }
    assert everything["2:4"] == pytest.approx(1.97, rel=0.02)
    assert everything["1:4"] == pytest.approx(3.80, rel=0.02)
    assert reductions(timm.create_model("resnet50"), 224, "2:4")[2] == pytest.approx(1.79, rel=0.02)


def test_fisher_direction_against_a_dense_solve(script) -> None:
    figure7 = script("figure7")
    model = cifar_resnet()
    chain, masks = build_chain(model), magnitude_masks(model)
    index, group = next((i, group) for i, group in chain.groups() if group.parameters[0] in masks)
    segment, active = Segment.cut(chain, index, 3), ActiveWeights({name: masks[name] for name in group.parameters})
    state = (images(6),)
    with torch.no_grad():
        for operation in chain.operations[:index]:
            state = operation.run(state)
        targets = segment.outputs(state)
    objective = KStepObjective(segment, active, state, config(), targets)
    w = active.gather({name: chain.weight(name).detach() for name in active.masks})
    gradients = figure7.sample_gradients(objective, w)
    g = objective.expand(w).gradient
    torch.testing.assert_close(gradients.mean(0), g)
    dense = gradients.T @ gradients / len(gradients) + 1e-4 * torch.eye(len(w), dtype=w.dtype)
    torch.testing.assert_close(figure7.fisher_direction(gradients, 1e-4), -torch.linalg.solve(dense, g))
