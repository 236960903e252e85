"""``snows-hf prune``"""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import typer
import yaml

from ..errors import ConfigError, SaveError, SnowsError, one_line
from ..runtime.distributed import from_main
from ..settings import PruneConfig, SolverConfig
from .options import DataSplit, Device, EvalData, EvalSplit, Json, Model, Private, Quiet, Restart, Revision, given
from .push import push_and_show
from .sink import Sink, open_sink, shown
from .watch import Watch


def command(
    model: Model,
    pattern: Annotated[
        str,
        typer.Option(
            help="N:M (N of M weights kept), a fraction of zeros such as 0.7, or a set of which each layer gets one: "
            "1:4,2:4,dense."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration images: Hub data set (USER/NAME or USER/NAME@REVISION), image folder or parquet. "
            "Default: timm/mini-imagenet."
        ),
    ] = None,
    data_split: DataSplit = "train",
    samples: Annotated[int | None, typer.Option(help="Calibration images.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="K: later operations whose outputs are kept (Eq. 3).")] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="Mask criterion (magnitude, wanda, sparsegpt, swap, …), or a safetensors file of booleans."),
    ] = None,
    permute: Annotated[
        bool | None,
        typer.Option(
            help="Order channels, where their order is free, so that N:M costs less. Default: if under half is kept."
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="Which layers lose how much of an unstructured sparsity: global, uniform or sensitivity."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Of a set of patterns: the zeros of all layers together, such as 0.65.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What an allocation by sensitivity counts: weights, or flops.")
    ] = None,
    no_update: Annotated[
        bool,
        typer.Option("--no-update", help="The mask, and the criterion's own update if any, without SNOWS."),
    ] = False,
    layers: Annotated[
        list[str] | None, typer.Option(help="Prune only layers that match this wildcard; may be repeated.")
    ] = None,
    curvature: Annotated[str | None, typer.Option(help="gauss-newton or hessian.")] = None,
    preset: Annotated[str, typer.Option(help="Settings to start from: default, or paper (Table 7).")] = "default",
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options override it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the result. Default: NAME-PATTERN here.")] = None,
    format: Annotated[
        str, typer.Option(help="safetensors, or packed: without the zeros, for import snows_hf alone.")
    ] = "safetensors",
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html and report.json into the folder.")
    ] = False,
    push_to: Annotated[str | None, typer.Option(help="Publish the result on the Hub as USER/NAME.")] = None,
    private: Private = False,
    restart: Restart = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the solver: float32, float64 or bfloat16.")] = "float32",
    seed: Annotated[int | None, typer.Option(help="Of the choice and order of calibration images.")] = None,
    memory: Annotated[float | None, typer.Option(help="Main memory to stay below, in GB.")] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a checkpoint one-shot and save it as an ordinary checkpoint."""
    settings = read_settings(config)
    settings |= given(samples=samples, k=k, mask=mask, curvature=curvature, seed=seed)
    settings |= given(allocation=allocation, sparsity=sparsity, budget=budget)
    settings |= given(layers=tuple(layers) if layers else None, permute=permute)

    from ..hub.push import check_push
    from ..jobs.prune import prune
    from ..jobs.report import report as make_page

    sink = open_sink(as_json, quiet)
    if push_to is not None:
        check_push(push_to, private)
    output = default_output(model, pattern) if output is None else output
    with Watch(sink) as watch:
        result = prune(
            model,
            pattern,
            data=data,
            data_split=data_split,
            eval_data=eval_data,
            eval_split=eval_split,
            output=output,
            device=device,
            dtype=dtype,
            revision=revision,
            memory=memory,
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
    from ..data.names import short_name

    name = short_name(model).rpartition("/")[2] or "model"
    suffix = pattern.replace(":", "to").replace(",", "-")
    return Path(f"{name}-{re.sub('[^a-z0-9.-]', '', suffix)}")


def read_settings(path: Path | None) -> dict[str, Any]:
    """Settings from a YAML file: one mapping, by the names of PruneConfig and SolverConfig.

    Raises:
        ConfigError: unreadable, no mapping, or a setting that is unknown or of the wrong type.
    """
    if path is None:
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Settings file {path} cannot be read: {one_line(error)}", "Expected YAML.") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(
            f"Settings file {path}: expected a mapping of settings, got {type(settings).__name__}.",
            "One setting a line, as in `k: 5`.",
        )
    types = {f.name: f.type for cls in (PruneConfig, SolverConfig) for f in fields(cls)}
    known = sorted(types.keys() - {"pattern", "solver"})
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(
                f"Settings file {path}: unknown setting {name!r}.",
                f"Known: {', '.join(known)}. Pattern, model, data and output are options of the command.",
            )
        settings[name] = _typed(path, name, value, types[name])
    return settings


def _typed(path: Path, name: str, value: Any, kind: Any) -> Any:
    if name == "layers" and isinstance(value, str | list):
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    if isinstance(kind, UnionType):  # bool | None: what is in a file is no None
        kind = get_args(kind)[0]
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if type(value) is not kind:
        raise ConfigError(f"Settings file {path}: {name} = {value!r}: expected {wanted.get(kind, 'a list of names')}.")
    return value


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
