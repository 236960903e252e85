"""The command line: this file only mounts the commands and turns errors into messages."""

import sys

import typer

from ..errors import MemoryLimitError, SnowsError, one_line
from ..runtime.version import __version__
from . import bench, hub, measure, prune, report, train
from .sink import Sink


app = typer.Typer(
    name="snows-hf",
    help="Make vision models sparse, one-shot, at nearly the same accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("prune", epilog=prune.ALSO)(prune.prune)
app.command("eval")(measure.evaluate)
app.command("inspect")(report.inspect)
app.command("sensitivity")(measure.sensitivity)
app.command("finetune")(train.finetune)
app.command("probe")(measure.probe)
app.command("attention")(measure.attention)
app.command("report")(report.report)
app.command("compare")(report.compare)
app.command("train")(train.train)
app.command("pack")(hub.pack)
app.command("unpack")(hub.unpack)
app.command("push")(hub.push)
app.command("bench")(bench.bench)
app.command("demo")(prune.demo)


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
