"""``snows-hf prune``"""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.names import data_folder, short_name
from ..errors import SaveError, SnowsError
from ..jobs.request import DEFAULT_DATA, check_pruning, check_request
from ..settings import PruneConfig, preset as preset_for
from .options import Device, Json, Model, Quiet, checked, given, setting, settings_from
from .push import push_and_show
from .sink import Sink, open_sink, shown
from .watch import Watch


WHAT, IMAGES, RESULT = "What to prune", "Images", "Result"

ALSO = (
    "For more: --sparsity, --allocation, --layers, --k, --seed, --no-update, --config FILE; --data-split, "
    "--eval-split; --format, --report, --push-to, --private, --restart; --revision, --dtype, --memory. The README "
    "says what for."
)


def hidden(*names: str) -> Any:
    """An option that most users do without: the help only names it (:data:`ALSO`)."""
    return typer.Option(*names, hidden=True)


def command(
    model: Model,
    pattern: Annotated[str, setting(PruneConfig, "pattern", panel=WHAT)],
    mask: Annotated[str | None, setting(PruneConfig, "mask", panel=WHAT)] = None,
    preset: Annotated[
        str, typer.Option(help="Settings to start from: default, or paper (Table 7).", rich_help_panel=WHAT)
    ] = "default",
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any setting of docs/settings.md; repeatable.", rich_help_panel=WHAT
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Calibration images: Hub data set (USER/NAME or USER/NAME@REVISION), image folder or parquet.",
            rich_help_panel=IMAGES,
            callback=checked(data_folder),
        ),
    ] = DEFAULT_DATA,
    data_split: Annotated[str, hidden()] = "train",
    samples: Annotated[int | None, setting(PruneConfig, "samples", panel=IMAGES)] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Labelled images to measure accuracy on, of the split test or --eval-split.",
            rich_help_panel=IMAGES,
            callback=checked(data_folder),
        ),
    ] = None,
    eval_split: Annotated[str, hidden()] = "test",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the result.", show_default="NAME-PATTERN here", rich_help_panel=RESULT),
    ] = None,
    sparsity: Annotated[float | None, setting(PruneConfig, "sparsity", hidden=True)] = None,
    allocation: Annotated[str | None, setting(PruneConfig, "allocation", hidden=True)] = None,
    layers: Annotated[list[str] | None, setting(PruneConfig, "layers", hidden=True)] = None,
    k: Annotated[int | None, setting(PruneConfig, "k", "--k", hidden=True)] = None,
    seed: Annotated[int | None, setting(PruneConfig, "seed", hidden=True)] = None,
    no_update: Annotated[bool, hidden("--no-update")] = False,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a checkpoint one-shot and save it as an ordinary checkpoint."""
    settings = settings_from(
        preset_for(preset, "", pattern), pairs, config, mask=mask, samples=samples, sparsity=sparsity,
        allocation=allocation, layers=layers or None, k=k, seed=seed,
    )  # fmt: skip
    output = default_output(model, pattern) if output is None else output
    images: dict[str, Any] = {
        "data": data, "data_split": data_split, "eval_data": eval_data, "eval_split": eval_split,
    }  # fmt: skip
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory}
    check_pruning(pattern, preset, settings)
    check_request(**images, output=output, **machine, format=format)
    if push_to is not None:
        from ..runtime.remote import check_push

        check_push(push_to, private)

    from ..jobs.prune import prune
    from ..jobs.report import report as make_page
    from ..runtime.distributed import from_main

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        result = prune(
            model,
            pattern,
            **images,
            **machine,
            output=output,
            revision=revision,
            preset=preset,
            update=not no_update,
            restart=restart,
            format=format,
            **watch.told,
            **settings,
        )
    show_report(sink, result.report)
    outcome = result.report
    failed: list[tuple[SnowsError, str]] = []  # with the command that repeats what failed, and nothing else
    if report:
        sink.stage("Writing the report")
        # Attention maps on images that measure anyway, not those that the model was made with.
        options: dict[str, Any] = {
            "dense": model,
            "data": eval_data,
            "split": eval_split,
            "revision": revision,
            "device": device,
        }
        try:
            page = from_main(lambda: make_page(output, on_stage=sink.stage, **options))["html"]
            sink.text(f"Report: {page}")
        except SnowsError as error:
            page = None
            repeated = [part for name, value in given(**options).items() for part in (f"--{name}", value)]
            failed.append((error, shlex.join(["snows-hf", "report", str(output), *repeated])))
        outcome = outcome | {"page": page}
    if push_to is not None:
        try:
            pushed = from_main(lambda: push_and_show(sink, output, push_to, private))
        except SnowsError as error:
            pushed = None
            repeated = [str(output), push_to, *(["--private"] if private else [])]
            failed.append((error, shlex.join(["snows-hf", "push", *repeated])))
        outcome = outcome | {"pushed_to": pushed}
    sink.json(outcome)
    if failed:
        remedies = [error.remedy for error, _ in failed if error.remedy]
        repeats = " and ".join(f"`{again}` repeats only the {again.split()[1]}" for _, again in failed)
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
    for layer in report["dense_layers"]:
        sink.text(f"Left dense: {layer['name']} {tuple(layer['shape'])}: {layer['reason']}.")
    for layer in report["layers"] if report["update"] else []:
        if layer["status"] != "improved":
            sink.text(f"Not improved: {layer['name']}: {layer['status']}. {layer['remedy']}")
        if layer["rejected_steps"]:
            sink.text(f"Rejected {layer['rejected_steps']} of {layer['steps']} Newton steps: {layer['name']}.")
    if report["pruned"]:
        images = report["pruned"]["images"]
        alone = f"{report['settings']['mask']} alone" if report["criterion"]["own_update"] else "mask alone"
        steps = [("dense", "dense"), (alone, "masked"), *([("SNOWS", "pruned")] if report["update"] else [])]
        rows = [(what, f"{report[key]['top1']:.2f}", f"{report[key]['top5']:.2f}") for what, key in steps]
        sink.table(["", "top-1 (%)", "top-5 (%)"], rows, title=f"{report['pattern']} on {images} images")
    if "patterns" in report["allocation"]:
        chosen = [(name, shown(own)) for name, own in report["allocation"]["patterns"].items()]
        sink.table(
            ["weights", "pattern"],
            chosen,
            title=f"Allocation by sensitivity, counting {report['allocation']['budget']}",
        )
    sink.text(
        f"{len(report['layers'])} layers pruned to {report['pattern']} ({100 * report['sparsity']:.1f} % zeros) with "
        f"{report['samples']} images in {report['seconds']:.0f} s."
    )
    if report["output"]:
        sink.text(f"Saved to {report['output']}")
