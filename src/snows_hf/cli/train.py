"""``snows-hf train`` and ``finetune``"""

from typing import Annotated, Any

import typer

from ..data.names import model_folder
from ..jobs.request import check_request, check_training
from ..settings import FinetuneConfig, TrainConfig
from .command import Call, with_options
from .options import DataSplit, Device, EvalData, EvalSplit, Labelled, Model, Output, Restart, Revision, checked
from .sink import CUSTOM, Sink


@with_options(
    TrainConfig, "mask", "allocation", "layer_cap", "warm_up_bn", "epochs", "lr", "batch_size", "samples", "seed"
)
def train(
    call: Call,
    source: Annotated[
        str,
        typer.Argument(
            metavar="ARCHITECTURE_OR_MODEL",
            help="A name that timm knows, such as resnet20_cifar, or a folder or Hub id of which the configuration is "
            "used.",
        ),
    ],
    data: Labelled,
    output: Output,
    data_split: DataSplit = "train",
    pattern: Annotated[
        str | None, typer.Option(help="N:M, a fraction of zeros such as 0.9, or mlp:0.5. Default: dense.")
    ] = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    allow_custom: Annotated[
        bool, typer.Option("--allow-custom", help="Of structures: widths that only this package can load, too.")
    ] = False,
    device: Device = "auto",
    revision: Revision = None,
    **settings: Any,
) -> None:
    """Prune an untrained network and train it with the mask fixed."""
    check_training(pattern, settings)
    check_request(data, data_split, eval_data, eval_split, output, device)

    from ..jobs.train import train as job

    report = call.run(job, **settings).report
    show(call.sink, report)
    if report["accuracy"]:
        accuracy = report["accuracy"]
        call.sink.text(
            f"top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} % on {accuracy['images']} images of "
            f"{eval_data} ({eval_split})"
        )
    call.sink.text(f"Saved to {output}{CUSTOM if report.get('custom') else ''}")
    call.sink.json(report)


def show(sink: Sink, report: dict[str, Any]) -> None:
    """What became of the layers, for people."""
    for name, reason in report["collapse"]["layers"].items():
        sink.text(f"Layer collapse: {name}: {reason}.")
    if not report["collapse"]["connected"]:
        sink.text("The logits do not depend on the images.")
    if "units" in report:
        parameters = report["parameters"]
        sink.text(f"{parameters['dense']:,} → {parameters['total']:,} parameters.")
    what = f"{report['pattern']} ({100 * report['sparsity']:.1f} % zeros)" if report["pattern"] else "dense"
    sink.text(
        f"{report['architecture']}, {what}: {report['settings']['epochs']} epochs of {report['images']} images in "
        f"{report['seconds']:.0f} s."
    )


@with_options(FinetuneConfig, "epochs", "minutes", "lr", "batch_size", "flip", "samples", "seed")
def finetune(
    call: Call,
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
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    device: Device = "auto",
    restart: Restart = False,
    revision: Revision = None,
    **settings: Any,
) -> None:
    """Retrain a checkpoint, of a pruned one with its zeros held. Interrupted, the same command goes on."""
    FinetuneConfig().updated(**settings)
    check_request(data, data_split, eval_data, eval_split, output, device)

    from ..jobs.finetune import finetune as job

    report = call.run(job, **settings).report
    made = report["finetune"]
    if made["after"]:
        call.sink.accuracies({"before": made["before"], "retrained": made["after"]}, report["pattern"] or "dense")
    held = "all zeros held" if made["zeros"] else "no weight held at zero"
    call.sink.text(f"{made['epochs']} epochs on {made['images']} images in {made['seconds']:.0f} s, {held}.")
    call.sink.text(f"Saved to {report['output']}")
    call.sink.json(report)
