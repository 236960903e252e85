"""``snows-hf train``"""

from typing import Annotated

import typer

from .options import DataSplit, Device, EvalData, EvalSplit, Json, Labelled, Output, Quiet, Revision, given
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
    mask: Annotated[str | None, typer.Option(help="Mask criterion: magnitude, snip, synflow, fp, hp, …")] = None,
    allocation: Annotated[str | None, typer.Option(help="Of an unstructured sparsity: global or uniform.")] = None,
    layer_cap: Annotated[
        float | None, typer.Option(help="With global, the most that one layer may lose. Default: 1, all of it.")
    ] = None,
    warm_up_bn: Annotated[
        int | None, typer.Option(help="Batches that set the batch norms' statistics before the masks are chosen.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the start.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Of the learning rate: cosine or step.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    samples: Annotated[int | None, typer.Option(help="Training images. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, masks, and the order of images.")] = None,
    eval_data: EvalData = None,
    eval_split: EvalSplit = "test",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune an untrained network and train it with the mask fixed."""
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
            **given(mask=mask, allocation=allocation, layer_cap=layer_cap, warm_up_bn=warm_up_bn, epochs=epochs),
            **given(lr=lr, schedule=schedule, batch_size=batch_size, samples=samples, seed=seed),
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
