"""The command line: one file per command; this one only mounts them and turns errors into messages."""

import sys

import typer

from ..errors import MemoryLimitError, SnowsError, one_line
from ..runtime.version import __version__
from . import (
    attention,
    bench,
    demo,
    evaluate,
    finetune,
    inspect,
    probe,
    prune,
    push,
    repack,
    report,
    sensitivity,
    train,
)
from .sink import Sink


app = typer.Typer(
    name="snows-hf",
    help="Make vision models sparse, one-shot, at nearly the same accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("prune", epilog=prune.ALSO)(prune.command)
app.command("eval")(evaluate.command)
app.command("inspect")(inspect.command)
app.command("sensitivity")(sensitivity.command)
app.command("finetune")(finetune.command)
app.command("probe")(probe.command)
app.command("attention")(attention.command)
app.command("report")(report.command)
app.command("compare")(report.compare_command)
app.command("train")(train.command)
app.command("pack")(repack.pack_command)
app.command("unpack")(repack.unpack_command)
app.command("push")(push.command)
app.command("bench")(bench.command)
app.command("demo")(demo.command)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: a :class:`SnowsError` becomes one message on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except SnowsError as error:
        Sink.from_arguments(sys.argv).error(error)
        raise SystemExit(1) from None
    except (RuntimeError, MemoryError) as error:
        from ..runtime.memory import out_of_memory

        if not out_of_memory(error):
            raise
        remedy = "Give smaller batches (batch_size), or --device cpu. The same command goes on from what is finished."
        Sink.from_arguments(sys.argv).error(MemoryLimitError(f"Out of memory: {one_line(error)}", remedy))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
