"""``snows-hf eval``"""

from .options import DataSplit, Device, Json, Labelled, Model, Quiet, Revision
from .sink import open_sink
from .watch import Watch


def command(
    model: Model,
    data: Labelled,
    split: DataSplit = "test",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint's top-1 and top-5 accuracy, dense or pruned."""
    from ..jobs.evaluate import evaluate

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        accuracy = evaluate(model, data, split=split, device=device, revision=revision, **watch.told)
    sink.text(
        f"{model}: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % on {accuracy.images} images of {data} "
        f"({split})"
    )
    sink.json(accuracy.to_dict())
