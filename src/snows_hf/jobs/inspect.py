"""What a checkpoint is: its prunable layers, their sparsity and pattern, and its operations."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import build_chain
from ..data.names import Name
from ..errors import PatternError
from ..hub.load import load
from ..hub.save import REPORT_FILE
from ..patterns import NM, Unstructured, parse_pattern


COMMON_PATTERNS = (NM(1, 8), NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))


def inspect(source: Name, operations: bool = False, revision: str | None = None) -> dict[str, Any]:
    """Measures a checkpoint's sparsity on its tensors; the metadata only say which pattern to look for.

    Args:
        source: Hub id or folder.
        operations: also list the operations, each a k of Eq. 3.
        revision: on the Hub.

    Returns:
        ``pattern`` (claimed in config.json, else the tightest common N:M that all sparse layers follow, else None),
        ``pattern_ok`` (all layers that were pruned follow it, and there are some), ``sparsity`` over all prunable
        weights, ``architecture``, ``library``, ``layers`` with name, shape, sparsity, pattern and pattern_ok (both
        None where dense), and ``operations`` if asked for. Which layers were pruned snows_config.json says where
        config.json claims a pattern, else a tenth of zeros does. Where it has a pattern for each layer (an allocation
        by sensitivity), each is held against its own.

    Raises:
        SnowsError: no such model, or one that cannot be read.
    """
    checkpoint = load(source, revision, trial=False)
    chain = build_chain(checkpoint.model)
    groups = chain.groups()
    weights = {name: chain.weight(name).detach() for _, group in groups for name in group.parameters}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    claimed = checkpoint.config.get("snows", {})
    title = claimed.get("pattern") if isinstance(claimed, dict) else None
    pruned, own = claims(checkpoint.folder, weights) if title is not None else ([], {})
    # A trained weight is hardly ever exactly zero: a layer counts as sparse from one zero in ten on.
    pruned = pruned or [name for name, weight in weights.items() if zeros[name] >= 0.1 * weight.numel()]
    sparse = {name: weights[name] for name in pruned}
    if own:
        holds = {name: obeys(weights[name], pattern) for name, pattern in own.items()}
    else:
        pattern = _parsed(title)
        if title is None and sparse:
            pattern = next((p for p in COMMON_PATTERNS if all(p.holds(weight) for weight in sparse.values())), None)
            title = str(pattern) if pattern is not None else None
        holds = {name: pattern is not None and pattern.holds(weight) for name, weight in sparse.items()}
        if isinstance(pattern, Unstructured):  # it binds all pruned weights together, to within the rounding of one
            total = sum(weight.numel() for weight in sparse.values())
            enough = sum(zeros[name] for name in sparse) >= pattern.sparsity * total - 1
            holds = dict.fromkeys(sparse, enough)

    total_sparsity = sum(zeros.values()) / sum(weight.numel() for weight in weights.values())
    layers = []
    for _, group in groups:
        parts = [weights[name] for name in group.parameters]
        bound = [name for name in group.parameters if name in holds]
        patterns = dict.fromkeys(str(own.get(name, title)) for name in bound)
        layers.append(
            {
                "name": group.name,
                "parameters": list(group.parameters),
                "shape": [sum(weight.shape[0] for weight in parts), *parts[0].shape[1:]],
                "sparsity": sum(zeros[name] for name in group.parameters) / sum(weight.numel() for weight in parts),
                "pattern": ",".join(patterns) if bound and title is not None else None,
                "pattern_ok": all(holds[name] for name in bound) if bound else None,
            }
        )
    result = {
        "source": checkpoint.source,
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "pattern": title,
        "pattern_ok": bool(holds) and all(holds.values()),
        "sparsity": total_sparsity,
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "layers": layers,
    }
    if operations:
        result["operations"] = [
            {"index": i, "name": operation.name, "group": operation.group.name if operation.group else None}
            for i, operation in enumerate(chain.operations)
        ]
    return result


def claims(folder: Path, weights: dict[str, Tensor]) -> tuple[list[str], dict[str, NM | Unstructured]]:
    """What snows_config.json says: names of the weights that were pruned, and their own patterns, less those left
    dense, where each layer has its own; nothing where there is no such file, or it says neither."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        names = report.get("pruned_parameters") or [  # not there in what `train` writes
            name for layer in report["layers"] for name in layer.get("parameters", [layer["name"]])
        ]
        patterns = dict(report.get("allocation", {}).get("patterns", {}))
        own = {name: _parsed(text) for name, text in patterns.items() if name in weights}
        pruned = [name for name in names if name in weights]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # another's file
        return [], {}
    return pruned, {name: pattern for name, pattern in own.items() if pattern is not None}


def obeys(weight: Tensor, pattern: NM | Unstructured) -> bool:
    """Whether one layer has the zeros of its own pattern."""
    if isinstance(pattern, NM):
        return pattern.holds(weight)
    return int((weight == 0).sum()) >= round(pattern.sparsity * weight.numel())


def _parsed(text: object) -> NM | Unstructured | None:
    try:
        return parse_pattern(str(text)) if text is not None else None
    except PatternError:
        return None
