"""``snows-hf inspect``"""

from typing import Annotated

import typer

from ..errors import PatternError
from .options import Json, Model, Quiet, Revision
from .sink import open_sink, shown


def command(
    model: Model,
    operations: Annotated[bool, typer.Option(help="List the operations that K counts (Eq. 3).")] = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a checkpoint's prunable layers, and prove its sparsity pattern on the weights; exit with 1 where it is not
    held."""
    from ..errors import shortened
    from ..jobs.inspect import inspect

    sink = open_sink(as_json, quiet)
    result = inspect(model, operations, revision)
    verdict = {True: "yes", False: "NO", None: "dense"}
    sink.table(
        ["layer", "shape", "zeros (%)", "pattern", "held"],
        [
            (layer["name"], "x".join(map(str, layer["shape"])), f"{100 * layer['sparsity']:.1f}",
             shown(layer["pattern"] or ""), verdict[layer["pattern_ok"]])
            for layer in result["layers"]
        ],
    )  # fmt: skip
    if operations:
        sink.table(
            ["operation", "index", "solves for"],
            [(op["name"], str(op["index"]), op["group"] or "") for op in result["operations"]],
            title="Operations: K counts the ones after a layer's own",
        )
    pattern = f"pattern {result['pattern']}" if result["pattern"] else "no pattern"
    sink.text(
        f"{result['architecture']} ({result['library']}): {pattern}, {100 * result['sparsity']:.1f} % of the prunable "
        f"weights are zero."
    )
    sink.json(result)
    if result["pattern"] is not None and not result["pattern_ok"]:
        broken = [layer["name"] for layer in result["layers"] if layer["pattern_ok"] is False]
        raise PatternError(
            f"{model} does not hold the pattern {result['pattern']} that it claims: {shortened(broken)}.",
            "These layers have weights where the pattern has zeros: prune it again.",
        )
