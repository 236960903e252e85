"""``snows-hf finetune``"""

from typing import Annotated, Any

import typer

from ..settings import FinetuneConfig
from .options import DataSplit, Device, EvalData, EvalSplit, Json, Labelled, Model, Output, Quiet, Restart, Revision
from .sink import Sink, open_sink
from .watch import Watch


DEFAULT = FinetuneConfig()


def command(
    model: Model,
    data: Labelled,
    output: Output,
    data_split: DataSplit = "train",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = DEFAULT.epochs,
    minutes: Annotated[
        float, typer.Option(help="Most minutes of training: fewer epochs where these would not do. 0: no limit.")
    ] = DEFAULT.minutes,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = DEFAULT.lr,
    decay: Annotated[float, typer.Option(help="Factor of a decay of the learning rate.")] = DEFAULT.decay,
    decay_every: Annotated[int, typer.Option(help="Epochs between decays. 0: a third of all.")] = DEFAULT.decay_every,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = DEFAULT.momentum,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = DEFAULT.weight_decay,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = DEFAULT.batch_size,
    crop: Annotated[
        float, typer.Option(help="Random crops after padding by this share of an image's size. 0: none.")
    ] = DEFAULT.crop,
    flip: Annotated[bool, typer.Option(help="Mirror half of the images.")] = DEFAULT.flip,
    teacher: Annotated[
        str | None, typer.Option(help="Model to learn from besides the labels: the dense one, say.")
    ] = None,
    distillation: Annotated[float, typer.Option(help="The teacher's share of the loss.")] = DEFAULT.distillation,
    temperature: Annotated[float, typer.Option(help="Softens the teacher's probabilities.")] = DEFAULT.temperature,
    samples: Annotated[int | None, typer.Option(help="Training images to draw. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the order and the augmentation.")] = DEFAULT.seed,
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    device: Device = "auto",
    restart: Restart = False,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Retrain a pruned checkpoint with its zeros held. Interrupted, the same command goes on."""
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
            epochs=epochs,
            minutes=minutes,
            lr=lr,
            decay=decay,
            decay_every=decay_every,
            momentum=momentum,
            weight_decay=weight_decay,
            batch_size=batch_size,
            crop=crop,
            flip=flip,
            distillation=distillation,
            temperature=temperature,
            samples=samples,
            seed=seed,
            **watch.told,
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
        title = f"{report['pattern']} on {made['after']['images']} images"
        sink.table(["", "top-1 (%)", "top-5 (%)"], rows, title=title)
    sink.text(f"{made['epochs']} epochs on {made['images']} images in {made['seconds']:.0f} s, all zeros held.")
    sink.text(f"Saved to {report['output']}")
