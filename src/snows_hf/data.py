"""Images from a Hub dataset, an image folder or a folder of parquet, through the model's own preprocessing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Image, Value
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from timm.data import ImageNetInfo
from torch import Tensor

from .errors import DataError


Preprocess = Callable[[Sequence[Any]], Tensor]
"""RGB PIL images → pixel values (n, 3, height, width)."""

SHUFFLE_BUFFER = 10_000
"""Images among which a streamed dataset is shuffled; local data are shuffled whole."""


@dataclass(frozen=True)
class ImageSource:
    """One split of a dataset.

    Attributes:
        name: as the user wrote it.
        split: name of the split.
        rows: a datasets ``Dataset`` or ``IterableDataset`` whose image column is not decoded yet.
        image_column: name of the image column.
        label_column: name of the label column, or None.
        class_names: names of the data's classes by label, or None where the data does not say.
    """

    name: str
    split: str
    rows: Any
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...] | None

    @property
    def size(self) -> int | None:
        """Number of images, or None for a stream."""
        return None if isinstance(self.rows, datasets.IterableDataset) else len(self.rows)


def open_images(name: str, split: str) -> ImageSource:
    """Opens a split of ``name``: an existing folder (images by class, or parquet), or else a Hub dataset, streamed.

    Raises:
        DataError: nothing there, no such split, no image column, or no access.
    """
    local = Path(name).expanduser()
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise DataError(f"Data folder {name} does not exist.", "Give a folder, or a Hub dataset as USER/NAME.")
    try:
        rows = datasets.load_dataset(str(local) if local.exists() else name, streaming=not local.exists())
    except GatedRepoError as error:
        raise DataError(
            f"Dataset {name} is gated.",
            f"Accept its terms on the Hub page of datasets/{name}, then set HF_TOKEN or run `hf auth login`.",
        ) from error
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, datasets.exceptions.DataFilesNotFoundError | FileNotFoundError) and local.exists():
            raise DataError(
                f"Data folder {name} holds no images.", "Expected image files in one folder per class, or parquet."
            ) from error
        raise DataError(
            f"Dataset {name} cannot be opened: {_first_line(error)}", "Check the name and the connection."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(f"Data {name} cannot be read as a dataset: {_first_line(error)}") from error
    if split not in rows:
        raise DataError(f"Data {name} has no split {split!r}; it has {', '.join(rows)}.")
    return describe_rows(name, split, rows[split])


def describe_rows(name: str, split: str, rows: Any) -> ImageSource:
    """Finds the image and label columns of a datasets ``Dataset`` or ``IterableDataset``.

    Raises:
        DataError: no image column.
    """
    features = rows.features or {}
    image = next((column for column, kind in features.items() if isinstance(kind, Image)), None)
    if image is None:
        raise DataError(f"Data {name} ({split}) has no image column; its columns are {', '.join(features)}.")
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    if not labels:
        labels = [c for c, kind in features.items() if isinstance(kind, Value) and c in ("label", "labels")]
    # Data sets with coarse and fine classes: the finer ones are what classifiers are trained on.
    label = max(labels, key=lambda column: getattr(features[column], "num_classes", 0), default=None)
    names = tuple(features[label].names) if label and isinstance(features[label], ClassLabel) else None
    return ImageSource(name, split, rows.cast_column(image, Image(decode=False)), image, label, names)


def calibration_images(source: ImageSource, samples: int, seed: int, preprocess: Preprocess) -> Tensor:
    """``samples`` images drawn at random, preprocessed: (n, 3, height, width), n less where there are fewer.

    Raises:
        DataError: no image at all, or an unreadable one.
    """
    if source.size is None:
        rows = source.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(samples)
    else:
        order = torch.randperm(source.size, generator=torch.Generator().manual_seed(seed))[:samples]
        rows = (source.rows[int(i)] for i in order)
    chunks = [preprocess([_decode(row, source, i) for i, row in chunk]) for chunk in _chunks(rows, 256)]
    if not chunks:
        raise DataError(f"Data {source.name} ({source.split}) is empty.")
    return torch.cat(chunks)


def labelled_batches(source: ImageSource, preprocess: Preprocess, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a split in order, with the data's own labels: (b, 3, height, width) and (b,).

    Raises:
        DataError: no label column, or an unreadable image.
    """
    if source.label_column is None:
        raise DataError(f"Data {source.name} ({source.split}) has no labels, which measuring accuracy needs.")
    for chunk in _chunks(source.rows, batch_size):
        images = preprocess([_decode(row, source, i) for i, row in chunk])
        yield images, torch.tensor([row[source.label_column] for _, row in chunk])


def _chunks(rows: Any, size: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, size)):
        yield chunk


def _decode(row: dict[str, Any], source: ImageSource, position: int) -> Any:
    value = row[source.image_column]
    try:
        return Image(mode="RGB").decode_example(value)
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        which = (value or {}).get("path") or f"number {position}"
        raise DataError(
            f"Image {which} of {source.name} ({source.split}) cannot be read: {_first_line(error)}",
            "Remove or replace it.",
        ) from error


def label_map(
    data_names: Sequence[str] | None, model_names: Sequence[str] | None, num_classes: int, source: str
) -> Tensor:
    """Class of the model for each label of the data, (data classes,).

    Names are matched exactly, then without case, then through ImageNet's synset identifiers; labels without names, or
    with names that match nothing, are taken as the model's own only where the number of classes is the same.

    Raises:
        DataError: the classes cannot be matched.
    """
    if data_names is None:
        return torch.arange(num_classes)
    if model_names is not None:
        for key in (str, _folded):
            index = {key(name): i for i, name in enumerate(model_names)}
            if all(key(name) in index for name in data_names):
                return torch.tensor([index[key(name)] for name in data_names])
    if num_classes == 1000:
        index = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if all(name in index for name in data_names):
            return torch.tensor([index[name] for name in data_names])
    if len(data_names) == num_classes:
        return torch.arange(num_classes)
    raise DataError(
        f"The {len(data_names)} classes of {source} ({', '.join(data_names[:3])}, …) cannot be matched to the model's "
        f"{num_classes} classes ({', '.join((model_names or ['unnamed'])[:3])}, …).",
        "Use data whose class names are the model's, or whose classes are the same and in the same order.",
    )


def _folded(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
