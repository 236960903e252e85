"""``snows-hf train``"""

from typing import Annotated, Any

import typer

from ..jobs.request import check_request, check_training
from ..settings import TrainConfig
from .options import (
    DataSplit,
    Device,
    EvalData,
    EvalSplit,
    Json,
    Labelled,
    Output,
    Quiet,
    Revision,
    Set,
    setting,
    settings_from,
)
from .sink import open_sink
from .watch import Watch


def command(
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
        str | None, typer.Option(help="N:M, or a fraction of zeros such as 0.9. Default: dense.")
    ] = None,
    mask: Annotated[str | None, setting(TrainConfig, "mask")] = None,
    allocation: Annotated[str | None, setting(TrainConfig, "allocation")] = None,
    layer_cap: Annotated[float | None, setting(TrainConfig, "layer_cap")] = None,
    warm_up_bn: Annotated[int | None, setting(TrainConfig, "warm_up_bn")] = None,
    epochs: Annotated[int | None, setting(TrainConfig, "epochs")] = None,
    lr: Annotated[float | None, setting(TrainConfig, "lr")] = None,
    batch_size: Annotated[int | None, setting(TrainConfig, "batch_size")] = None,
    samples: Annotated[int | None, setting(TrainConfig, "samples")] = None,
    seed: Annotated[int | None, setting(TrainConfig, "seed")] = None,
    pairs: Set = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune an untrained network and train it with the mask fixed."""
    own: dict[str, Any] = {"mask": mask, "allocation": allocation, "layer_cap": layer_cap, "warm_up_bn": warm_up_bn}
    own |= {"epochs": epochs, "lr": lr, "batch_size": batch_size, "samples": samples, "seed": seed}
    settings = settings_from(TrainConfig(), pairs, **own)
    check_training(pattern, settings)
    check_request(data, data_split, eval_data, eval_split, output, device)

    from ..jobs.train import train

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        report = train(
            source,
            data,
            pattern,
            output=output,
            data_split=data_split,
            eval_data=eval_data,
            eval_split=eval_split,
            device=device,
            revision=revision,
            **watch.told,
            **settings,
        ).report
    for name, reason in report["collapse"]["layers"].items():
        sink.text(f"Layer collapse: {name}: {reason}.")
    if not report["collapse"]["connected"]:
        sink.text("The logits do not depend on the images.")
    what = f"{report['pattern']} ({100 * report['sparsity']:.1f} % zeros)" if report["pattern"] else "dense"
    sink.text(
        f"{report['architecture']}, {what}: {report['settings']['epochs']} epochs of {report['images']} images in "
        f"{report['seconds']:.0f} s."
    )
    if report["accuracy"]:
        accuracy = report["accuracy"]
        sink.text(
            f"top-1 {accuracy['top1']:.2f} %, top-5 {accuracy['top5']:.2f} % on {accuracy['images']} images of "
            f"{eval_data} ({eval_split})"
        )
    sink.text(f"Saved to {output}")
    sink.json(report)
