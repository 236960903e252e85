"""What a checkpoint is: its prunable layers, their sparsity and pattern, and its operations."""

import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import Group, build_chain
from ..data.names import Name
from ..errors import PatternError
from ..hub.load import load
from ..hub.save import REPORT_FILE, claims_of, speed_of
from ..patterns import NM, Unstructured, parse_candidates
from ..patterns.plan import Candidate
from ..reports.describe import share_of_zeros, summary, zeros_of
from .subject import weights_of


COMMON_PATTERNS = (NM(1, 8), NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))

SPARSE = 0.1
"""Share of zeros from which on a layer counts as sparse where nothing says so: a trained weight is hardly ever 0."""


def inspect(source: Name, operations: bool = False, revision: str | None = None) -> dict[str, Any]:
    """Measures a checkpoint's sparsity on its tensors, and holds what config.json claims against them.

    Returns:
        ``pattern`` (claimed in config.json, else the tightest common N:M that all sparse layers follow, else None),
        ``pattern_ok`` (all layers that were pruned follow it, there are some, and they have as many weights and zeros
        as config.json claims), ``faster`` (the speed that config.json claims, which nothing here proves, else None),
        ``sparsity`` over all prunable weights, ``architecture``, ``library``, ``layers`` with
        name, shape, sparsity, pattern and pattern_ok (both None where dense), ``never_pruned``, the Linear and Conv2d
        layers that no pruning reaches, with the reason, and ``operations`` (each a k of Eq. 3) if asked for. Which
        layers were pruned snows_config.json says, as far as it agrees with config.json: see :func:`bound_by`. Where
        it has a pattern for each layer (an allocation by sensitivity), each is held against its own.

    Raises:
        SnowsError: no such model, or one that cannot be read.
    """
    checkpoint = load(source, revision, trial=False)
    chain = build_chain(checkpoint.model)
    groups, weights = [group for _, group in chain.groups()], weights_of(chain)
    claimed = claims_of(checkpoint.config)
    title = claimed.get("pattern")
    claimed = claimed if title is not None else {}
    said = read_claims(checkpoint.folder, groups) if claimed else Claims()
    pruned = bound_by(claimed, said, weights)
    if not claimed:
        pattern = next((p for p in COMMON_PATTERNS if all(p.holds(weights[name]) for name in pruned)), None)
        title = str(pattern) if pruned and pattern is not None else None
    holds = held(title, said.patterns, {name: weights[name] for name in pruned})
    of_layers = {*pruned, *said.patterns}
    counted = [weights[name] for group in groups if of_layers & {*group.parameters} for name in group.parameters]
    # Where single layers break it, those are named; too few zeros in all are nobody's fault in particular.
    if all(holds.values()) and not is_as_claimed(claimed, [weights[name] for name in pruned], counted):
        holds = dict.fromkeys(holds, False)

    def described(group: Group) -> dict[str, Any]:
        bound = [name for name in group.parameters if name in holds]
        patterns = dict.fromkeys(str(said.patterns.get(name) or title) for name in bound)
        return {
            **summary(chain, group),
            "pattern": ",".join(patterns) if bound and title is not None else None,
            "pattern_ok": all(holds[name] for name in bound) if bound else None,
        }

    result = {
        "source": checkpoint.source,
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "pattern": title,
        "pattern_ok": bool(holds) and all(holds.values()),
        "faster": speed_of(claimed),
        "sparsity": share_of_zeros(weights.values()),
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "layers": [described(group) for group in groups],
        "never_pruned": chain.dense,
    }
    if operations:
        result["operations"] = [
            {"index": i, "name": operation.name, "group": operation.group.name if operation.group else None}
            for i, operation in enumerate(chain.operations)
        ]
    return result


@dataclass(frozen=True)
class Claims:
    """What snows_config.json says of layers, by parameter name.

    Attributes:
        pruned: those that were pruned.
        patterns: where each layer has its own; None for those left dense by choice.
        excused: those that were not to be pruned, by ``--layers`` or for a reason that it names.
    """

    pruned: tuple[str, ...] = ()
    patterns: dict[str, Candidate] = field(default_factory=dict)
    excused: frozenset[str] = frozenset()


def read_claims(folder: Path, groups: list[Group]) -> Claims:
    """:class:`Claims` of these groups; empty where there is no such file, or it says nothing of the kind."""
    known = {name: group for group in groups for name in group.parameters}
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        pruned = report.get("pruned_parameters") or [  # not there in what `train` writes
            name for layer in report["layers"] for name in layer.get("parameters", [layer["name"]])
        ]
        patterns = dict(report.get("allocation", {}).get("patterns", {}))
        globs = report.get("settings", {}).get("layers") or ["*"]
        dense = {layer["name"] for layer in report.get("dense_layers", [])}
        touched = {name for layer in report["layers"] for name in layer.get("parameters", [])}
        excused = frozenset(
            name
            for name, group in known.items()
            if name in touched or group.name in dense
            or not any(fnmatchcase(n, glob) for n in (group.name, *group.parameters) for glob in globs)
        )  # fmt: skip
        return Claims(
            tuple(dict.fromkeys(name for name in pruned if name in known)),
            {name: only(candidates_of(text)) for name, text in patterns.items() if name in known},
            excused,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # another's file
        return Claims()


def bound_by(claimed: dict[str, Any], said: Claims, weights: dict[str, Tensor]) -> list[str]:
    """Names of the weights that the claim of config.json binds.

    The report names them, and must excuse all others that the pattern fits. config.json says how many they are:
    a report that names fewer is not believed, and the weights with most zeros are taken instead, as where there is no
    report. Where config.json does not say it either (of an earlier version, or without a claim), those of which
    :data:`SPARSE` is zero.
    """
    count = claimed.get("weights", 0)
    candidates = [one for one in candidates_of(claimed.get("pattern")) if one is not None]
    fitting = [name for name, weight in weights.items() if any(one.fits(weight.shape) for one in candidates)]
    named = list(dict.fromkeys([*said.pruned, *(name for name in fitting if name not in said.excused)]))
    if said.pruned and reaches(count, [weights[name] for name in named]):
        return named
    share = {name: share_of_zeros([weight]) for name, weight in weights.items()}
    if "weights" not in claimed:
        return [name for name in weights if share[name] >= SPARSE]
    bound: list[str] = []
    for name in sorted(weights, key=lambda name: share[name], reverse=True):
        if not reaches(count, [weights[name] for name in bound]):
            bound.append(name)
    return bound


def held(title: object, own: dict[str, Candidate], pruned: dict[str, Tensor]) -> dict[str, bool]:
    """Whether each of the weights that were pruned has the zeros of the pattern, or of its own where each has one.

    Its own counts if it is one of the set that the title names, or a share of zeros where the title is one.
    """
    candidates = candidates_of(title)
    pattern = only(candidates)
    if any(own.values()):

        def obeys(weight: Tensor, one: Candidate) -> bool:
            if isinstance(one, NM):
                return one in candidates and one.holds(weight)
            allowed = one in candidates or isinstance(pattern, Unstructured)
            return one is not None and allowed and zeros_of([weight]) >= round(one.sparsity * weight.numel())

        return {name: obeys(weight, own.get(name)) for name, weight in pruned.items()}
    if isinstance(pattern, Unstructured):  # it binds all pruned weights together, to within the rounding of one
        total = sum(weight.numel() for weight in pruned.values())
        return dict.fromkeys(pruned, zeros_of(pruned.values()) >= pattern.sparsity * total - 1)
    return {name: pattern is not None and pattern.holds(weight) for name, weight in pruned.items()}


def is_as_claimed(claimed: dict[str, Any], pruned: list[Tensor], counted: list[Tensor]) -> bool:
    """Whether there are as many weights, and as many zeros in their layers (to six digits), as config.json claims."""
    sparsity, total = claimed.get("sparsity", 0.0), sum(weight.numel() for weight in counted)
    enough = isinstance(sparsity, int | float) and zeros_of(counted) >= (sparsity - 1e-6) * total
    return enough and reaches(claimed.get("weights", 0), pruned)


def reaches(count: object, weights: list[Tensor]) -> bool:
    return isinstance(count, int) and sum(weight.numel() for weight in weights) >= count


def only(candidates: list[Candidate]) -> Candidate:
    return candidates[0] if len(candidates) == 1 else None


def candidates_of(text: object) -> list[Candidate]:
    """Patterns that a text names, of other people's making; none where it is no pattern."""
    try:
        return parse_candidates(str(text))
    except (PatternError, ValueError):  # more digits than Python reads
        return []
