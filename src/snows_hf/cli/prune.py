"""``snows-hf prune`` and ``demo``, the same on a model and data that come with the package"""

import re
import shlex
from collections import Counter
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..data.names import short_name
from ..errors import SaveError, SnowsError
from ..jobs.request import DEFAULT_DATA, check_faster, check_pruning, check_request
from ..runtime.files import check_output
from ..settings import PruneConfig
from .command import Call, with_options
from .hub import push_and_show
from .options import Device, Model, Output, images_option, read_settings, setting
from .sink import CUSTOM, Sink, shown, speed_in_words


T = TypeVar("T")

MOVED = ("improved", "thinned_out")
"""How a solve ends that has moved weights."""

WHAT, IMAGES, RESULT = "What to prune", "Images", "Result"

ALSO = (
    "For more: --effort, --sparsity, --allocation, --layers, --k, --seed, --no-update, --allow-custom, --config FILE, "
    "--faster-batch; --data-split, --eval-split; --format, --report, --push-to, --private, --restart; --revision, "
    "--dtype, --memory. docs/your-model.md says what for."
)


def hidden(*names: str) -> Any:
    """An option that most users do without: the help only names it (:data:`ALSO`)."""
    return typer.Option(*names, hidden=True)


@with_options(
    PruneConfig, "mask", "samples", "sparsity", "allocation", "layers", "k", "seed",
    panels={"mask": WHAT, "samples": IMAGES, "set": WHAT},
)  # fmt: skip
def prune(
    call: Call,
    model: Model,
    pattern: Annotated[str | None, setting(PruneConfig, "pattern", panel=WHAT)] = None,
    faster: Annotated[
        float | None,
        typer.Option(
            help="In place of a pattern: how many times as fast as the dense model it should be here, 1.5 say. Whole "
            "units go.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    faster_batch: Annotated[int, hidden()] = 1,
    effort: Annotated[str, hidden()] = "standard",
    data: Annotated[
        str,
        images_option(
            "Calibration images: Hub data set (USER/NAME or USER/NAME@REVISION), image folder or parquet.",
            rich_help_panel=IMAGES,
        ),
    ] = DEFAULT_DATA,
    data_split: Annotated[str, hidden()] = "train",
    eval_data: Annotated[
        str | None,
        images_option(
            "Images to measure on, accuracy where they have labels, of the split test or --eval-split.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    eval_split: Annotated[str, hidden()] = "test",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the result.", show_default="NAME-PATTERN here", rich_help_panel=RESULT),
    ] = None,
    no_update: Annotated[bool, hidden("--no-update")] = False,
    allow_custom: Annotated[bool, hidden("--allow-custom")] = False,
    config: Annotated[Path | None, hidden()] = None,
    format: Annotated[str, hidden()] = "safetensors",
    report: Annotated[bool, hidden("--report")] = False,
    push_to: Annotated[str | None, hidden()] = None,
    private: Annotated[bool, hidden("--private")] = False,
    restart: Annotated[bool, hidden("--restart")] = False,
    device: Device = "auto",
    dtype: Annotated[str, hidden()] = "float32",
    memory: Annotated[float | None, hidden()] = None,
    revision: Annotated[str | None, hidden()] = None,
    **settings: Any,
) -> None:
    """Prune a checkpoint one-shot and save it as an ordinary checkpoint."""
    asked = check_faster(pattern, faster, faster_batch, allow_custom, settings)
    if config is not None:
        settings = read_settings(config, PruneConfig(asked)) | settings
    output = output or default_output(model, asked if faster is None else f"{faster:g}x")
    check_pruning(asked, effort, settings)
    check_request(data, data_split, eval_data, eval_split, output, device, dtype=dtype, memory=memory, format=format)
    if push_to is not None:
        from ..runtime.remote import check_push

        check_push(push_to, private)

    from ..jobs.prune import prune as job

    result = call.run(job, output=output, update=not no_update, **settings)
    show_report(call.sink, result.report)
    publish(call, output, result.report)


def publish(call: Call, output: Path, outcome: dict[str, Any]) -> None:
    """What is asked for besides the result, which is safe already, and the object of ``--json``.

    Raises:
        SaveError: what failed, with the commands that repeat it and nothing else.
    """
    from ..jobs.report import report as job
    from ..runtime.distributed import from_main

    sink, asked = call.sink, call.options
    failed: list[tuple[SnowsError, str]] = []

    def attempt(step: Callable[[], T], *again: str) -> T | None:
        try:
            return from_main(step)
        except SnowsError as error:
            failed.append((error, f"`{shlex.join(['snows-hf', *again])}` repeats only the {again[0]}"))
            return None

    if asked["report"]:
        sink.stage("Writing the report")
        # Attention maps on images that measure anyway, not those that the model was made with.
        options = {"dense": asked["model"], "data": asked["eval_data"], "split": asked["eval_split"]}
        options |= {"revision": asked["revision"], "device": asked["device"]}
        again = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        page = attempt(lambda: call.run(job, model=output, output=None, **options), "report", str(output), *again)
        if page is not None:
            sink.text(f"Report: {page['html']}")
        outcome = outcome | {"page": page and page["html"]}
    if asked["push_to"] is not None:
        to, private = asked["push_to"], asked["private"]
        again = [str(output), to, *(["--private"] if private else [])]
        outcome = outcome | {"pushed_to": attempt(lambda: push_and_show(sink, output, to, private), "push", *again)}
    sink.json(outcome)
    if failed:
        remedies = [error.remedy for error, _ in failed if error.remedy]
        repeats = " and ".join(again for _, again in failed)
        raise SaveError(
            " ".join(error.message for error, _ in failed),
            " ".join([*remedies, f"The result is safe in {output}: {repeats}."]),
        )


def default_output(model: str, pattern: str) -> Path:
    """``google/vit-base-patch16-224``, ``2:4`` → ``vit-base-patch16-224-2to4``; ``1:4,2:4`` → ``…-1to4-2to4``."""
    name = short_name(model).rpartition("/")[2] or "model"
    suffix = pattern.replace(":", "to").replace(",", "-")
    return Path(f"{name}-{re.sub('[^a-z0-9.-]', '', suffix)}")


def show_report(sink: Sink, report: dict[str, Any]) -> None:
    """The outcome for people: accuracy side by side, layers that need a look, and where the result is."""
    from ..hub.save import alone_of

    for layer in report["dense_layers"]:
        sink.text(f"Left dense: {layer['name']} {tuple(layer['shape'])}: {layer['reason']}.")
    if report["update"]:
        show_solves(sink, [solved for solved in (*report["layers"], *report["later_sweeps"]) if "status" in solved])
    steps = {alone_of(report): "masked"} | ({"SNOWS": "pruned"} if report["update"] else {})
    if report["pruned"]:
        found = {"dense": report["dense"]} | {name: report[key] for name, key in steps.items()}
        sink.accuracies(found, report["pattern"])
    if fidelity := report["fidelity"]:
        images = fidelity["pruned"]["images"]
        title = f"Outputs against the dense model's, on {images} images"
        sink.fidelity({name: fidelity[key] for name, key in steps.items()}, title)
    if report["tower"]:
        sink.text(f"Of {report['architecture']} the {report['tower']} tower was pruned; the text tower is untouched.")
    if "patterns" in report["allocation"]:
        chosen = [{"name": name, "own": shown(own)} for name, own in report["allocation"]["patterns"].items()]
        title = f"Allocation by sensitivity, counting {report['allocation']['budget']}"
        sink.table({"weights": "{name}", "pattern": "{own}"}, chosen, title)
    if report["faster"]:
        sink.text(speed_in_words(report["faster"]))
    if "units" in report:
        parameters, flops = report["parameters"], report["flops"]
        if report["allocation"]["kind"] == "sensitivity":
            rows = [{"name": name, **own} for name, own in report["units"].items()]
            title = f"Units by sensitivity, counting {report['settings']['budget']}"
            sink.table({"layer": "{name}", "of": "{before}", "left": "{after}"}, rows, title)
        sink.text(
            f"{parameters['dense']:,} → {parameters['total']:,} parameters, "
            f"{flops['dense'] / flops['pruned']:.2f} times fewer operations."
        )
    settings = report["settings"]
    if "units" in report and not report["sparsity"]:
        done = f"Units of {len(report['units'])} layers gone ({report['pattern']}) by {settings['units']}"
    else:
        zeros = f"{100 * report['sparsity']:.1f} % zeros"
        done = f"{len(report['layers'])} layers pruned to {report['pattern']} ({zeros}) by {settings['mask']}"
    sink.text(f"{done} with {report['samples']} images in {report['seconds']:.0f} s.")
    if report["output"]:
        sink.text(f"Saved to {report['output']}{CUSTOM if report.get('custom') else ''}")


def show_solves(sink: Sink, solves: list[dict[str, Any]]) -> None:
    """Those that need a look, of all solves in their order: what one left as it was, a later one may have moved."""
    times = Counter(solved["name"] for solved in solves)
    for i, solved in enumerate(solves):
        name = solved["name"] if times[solved["name"]] == 1 else f"{solved['name']} (sweep {solved['sweep']})"
        if solved["status"] not in MOVED:
            later = [other for other in solves[i + 1 :] if other["status"] in MOVED]
            later = [other for other in later if not {*solved["parameters"]}.isdisjoint(other["parameters"])]
            remedy = solved["remedy"]
            if later:
                by = f"Sweep {later[-1]['sweep']}" if later[-1]["name"] == solved["name"] else "The joint solve"
                remedy = f"{by} has moved it since."
            sink.text(f"Not improved: {name}: {solved['status']}. {remedy}")
        if solved["rejected_steps"]:
            sink.text(f"Rejected {solved['rejected_steps']} of {solved['steps']} Newton steps: {name}.")


@with_options()
def demo(
    call: Call,
    model: Annotated[str, typer.Option(help="vit or resnet.")] = "vit",
    pattern: Annotated[str, typer.Option(help="As for prune.")] = "2:4",
    output: Output = Path("snows-demo"),
) -> None:
    """Prune a small model that comes with the package, on real scanned digits, with nothing to download."""
    if model not in ("vit", "resnet"):
        raise typer.BadParameter("expected vit or resnet", param_hint="--model")
    check_pruning(pattern, "standard", {})
    check_output(output, size=0)

    import torch

    from ..jobs.prune import prune as job

    # Such small matrices gain nothing from a second thread, and where other programs use the processor threads that
    # wait for each other cost many times the work itself.
    torch.set_num_threads(1)
    with as_file(files("snows_hf") / "embedded") as embedded:
        digits = str(embedded / "digits")
        report = call.run(job, model=str(embedded / f"{model}_digits"), data=digits, eval_data=digits).report
    show_report(call.sink, report)
    call.sink.text("Try next:")
    for line in (
        f"snows-hf inspect {shlex.quote(str(output))}",
        f"snows-hf report {shlex.quote(str(output))}",
        "snows-hf prune google/vit-base-patch16-224 --pattern 2:4",
        "snows-hf prune timm/resnet50.a1_in1k --pattern 2:4 --samples 1000",
    ):
        call.sink.text(f"  {line}")
    call.sink.json(report)
