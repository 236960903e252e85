"""``snows-hf finetune``"""

from typing import Annotated, Any

import typer

from ..data.names import model_folder
from ..jobs.request import check_request
from ..settings import FinetuneConfig
from .options import (
    DataSplit,
    Device,
    EvalData,
    EvalSplit,
    Json,
    Labelled,
    Model,
    Output,
    Quiet,
    Restart,
    Revision,
    Set,
    checked,
    setting,
    settings_from,
)
from .sink import Sink, open_sink
from .watch import Watch


def command(
    model: Model,
    data: Labelled,
    output: Output,
    data_split: DataSplit = "train",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Model to learn from besides the labels: the dense one, say.", callback=checked(model_folder)
        ),
    ] = None,
    epochs: Annotated[int | None, setting(FinetuneConfig, "epochs")] = None,
    minutes: Annotated[float | None, setting(FinetuneConfig, "minutes")] = None,
    lr: Annotated[float | None, setting(FinetuneConfig, "lr")] = None,
    batch_size: Annotated[int | None, setting(FinetuneConfig, "batch_size")] = None,
    flip: Annotated[bool | None, setting(FinetuneConfig, "flip", "--flip/--no-flip")] = None,
    samples: Annotated[int | None, setting(FinetuneConfig, "samples")] = None,
    seed: Annotated[int | None, setting(FinetuneConfig, "seed")] = None,
    pairs: Set = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    device: Device = "auto",
    restart: Restart = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Retrain a pruned checkpoint with its zeros held. Interrupted, the same command goes on."""
    own: dict[str, Any] = {"epochs": epochs, "minutes": minutes, "lr": lr, "batch_size": batch_size}
    own |= {"flip": flip, "samples": samples, "seed": seed}
    settings = settings_from(FinetuneConfig(), pairs, **own)
    FinetuneConfig().updated(**settings)
    check_request(data, data_split, eval_data, eval_split, output, device)

    from ..jobs.finetune import finetune

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        result = finetune(
            model,
            data,
            output=output,
            data_split=data_split,
            eval_data=eval_data,
            eval_split=eval_split,
            teacher=teacher,
            device=device,
            revision=revision,
            restart=restart,
            **watch.told,
            **settings,
        )
    show(sink, result.report)
    sink.json(result.report)


def show(sink: Sink, report: dict[str, Any]) -> None:
    """Accuracy before and after, for people, and where the result is."""
    made = report["finetune"]
    if made["after"]:
        rows = [
            (what, f"{made[key]['top1']:.2f}", f"{made[key]['top5']:.2f}")
            for what, key in (("before", "before"), ("retrained", "after"))
        ]
        title = f"{report['pattern'] or 'dense'} on {made['after']['images']} images"
        sink.table(["", "top-1 (%)", "top-5 (%)"], rows, title=title)
    held = "all zeros held" if made["zeros"] else "no weight held at zero"
    sink.text(f"{made['epochs']} epochs on {made['images']} images in {made['seconds']:.0f} s, {held}.")
    sink.text(f"Saved to {report['output']}")
