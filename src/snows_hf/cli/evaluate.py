"""``snows-hf eval``"""

from .options import DataSplit, Device, Json, Labelled, Model, Quiet, Revision
from .sink import open_sink


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
    from ..checks import find_device
    from ..data import open_images
    from ..evaluate import evaluate
    from ..hub.load import load

    sink = open_sink(as_json, quiet)
    target = find_device(device)
    sink.stage(f"Loading {model}")
    checkpoint = load(model, revision)
    source = open_images(data, split)
    sink.stage(f"Measuring it on {data} ({split})")
    accuracy = evaluate(checkpoint.model.to(target), source, checkpoint.preprocess, checkpoint.class_names)
    sink.text(
        f"{model}: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} % on {accuracy.images} images of {data} "
        f"({split})"
    )
    sink.json(accuracy.to_dict())
