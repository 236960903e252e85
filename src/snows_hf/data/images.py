"""Images from a Hub dataset, an image folder or a folder of parquet, through the model's own preprocessing."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from os import fspath
from os.path import abspath, normpath, realpath
from pathlib import Path
from typing import Any, TypeVar

import datasets
import PIL.Image
import torch
from datasets import ClassLabel, Image, Value
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from timm.data import ImageNetInfo
from torch import Tensor

from ..errors import DataError, one_line, shortened
from ..runtime.remote import hub_errors
from .names import Name, data_folder, split_revision


Preprocess = Callable[[Sequence[Any]], Tensor]
"""RGB PIL images → pixel values (n, 3, height, width)."""

T = TypeVar("T")

CHUNK = 64  # images that are decoded and preprocessed together, if nobody asks for another number


@dataclass(frozen=True)
class ImageSource:
    """One split of a dataset.

    Attributes:
        name: as the user wrote it.
        rows: a datasets ``Dataset`` or ``IterableDataset`` whose image column is not decoded yet.
        class_names: of the data, by label; None where it does not say.
        homes: folders, or repositories as ``hf://datasets/USER/NAME``, that hold the data's own files: a row without
            bytes may name one of these, and nothing else.
        numbers: of the rows in the whole split, for messages, where images have been drawn.
    """

    name: str
    split: str
    rows: Any
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...] | None
    homes: tuple[str, ...] = ()
    numbers: Sequence[int] | None = None

    @property
    def size(self) -> int | None:
        """Number of images, or None for a stream."""
        return None if isinstance(self.rows, datasets.IterableDataset) else len(self.rows)


def open_images(name: Name, split: str) -> ImageSource:
    """Opens a split of ``name``: an existing folder (images by class, or parquet), or else a Hub dataset
    (``USER/NAME`` or ``USER/NAME@REVISION``), streamed; in offline mode as the cache has it.

    Raises:
        DataError: nothing there, no such split, no image column, or no access.
    """
    name = fspath(name)
    local = data_folder(name)
    repository, revision = split_revision(name)
    rows = _load_folder(name, local) if local is not None else _load_from_hub(repository, revision)
    homes = (abspath(local), realpath(local)) if local is not None else _homes_of(repository)
    if split not in rows:
        raise DataError(f"Data {name} has no split {split!r}.", f"It has {', '.join(rows)}.")
    return describe_rows(name, split, rows[split], homes)


def _homes_of(repository: str) -> tuple[str, ...]:
    """Where files of a Hub dataset are: on the Hub, in the Hub's cache, or in that of datasets."""
    in_cache = Path(constants.HF_HUB_CACHE, f"datasets--{repository.replace('/', '--')}")
    downloads = datasets.config.DOWNLOADED_DATASETS_PATH
    return f"hf://datasets/{repository}", *(f(path) for path in (in_cache, downloads) for f in (abspath, realpath))


def _load_folder(name: str, folder: Path) -> Any:
    try:
        return datasets.load_dataset(str(folder))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        empty = isinstance(error, datasets.exceptions.DataFilesNotFoundError | FileNotFoundError)
        fault = "holds no images." if empty else f"cannot be read as a dataset: {one_line(error)}"
        remedy = "Expected image files in one folder per class, or parquet."
        raise DataError(f"Data folder {name} {fault}", remedy) from error


def _load_from_hub(name: str, revision: str | None) -> Any:
    with hub_errors(DataError, "dataset", name, revision), _unreadable(f"Dataset {name}"):
        if not constants.HF_HUB_OFFLINE:
            # Downloads nothing, and says at once what datasets says after many retries.
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[])
            return datasets.load_dataset(name, revision=revision, streaming=True)
        try:
            return datasets.load_dataset(snapshot_download(name, repo_type="dataset", revision=revision))
        except LocalEntryNotFoundError as error:
            with suppress(OSError, ValueError, datasets.exceptions.DatasetsError):
                return datasets.load_dataset(name, revision=revision)  # what datasets itself prepared earlier
            raise error from None


@contextmanager
def _unreadable(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HFValidationError):
        raise  # the Hub's, or the connection's
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{what} cannot be read: {one_line(error)}") from error


def describe_rows(name: str, split: str, rows: Any, homes: tuple[str, ...] = ()) -> ImageSource:
    """Finds the image and label columns of a datasets ``Dataset`` or ``IterableDataset``. Without ``homes``, see
    :class:`ImageSource`, its rows must carry their bytes.

    Raises:
        DataError: no image column.
    """
    features = rows.features or {}
    image = next((column for column, kind in features.items() if isinstance(kind, Image)), None)
    if image is None:
        raise DataError(f"Data {name} ({split}) has no image column; its columns are {', '.join(features)}.")
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    labels = labels or [column for column in ("label", "labels") if isinstance(features.get(column), Value)]
    # Data sets with coarse and fine classes: the finer ones are what classifiers are trained on.
    label = max(labels, key=lambda column: getattr(features[column], "num_classes", 0), default=None)
    names = tuple(features[label].names) if label and isinstance(features[label], ClassLabel) else None
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.decode(False)  # a stream from the Hub comes with a step that opens whatever its rows name
    return ImageSource(name, split, rows.cast_column(image, Image(decode=False)), image, label, names, homes)


def check_labels(source: ImageSource, what: str) -> None:
    """Refuses, with a :class:`DataError`, a split without labels, which ``what`` needs."""
    if source.label_column is None:
        fault = f"Data {source.name} ({source.split}) has no labels, which {what} needs."
        raise DataError(fault, "Expected one folder per class, or a column 'label'.")


def drawn(source: ImageSource, samples: int | None, seed: int) -> ImageSource:
    """The same split with ``samples`` of its images drawn at random, fewer where there are fewer, or all for None; of
    a stream the first that come, from places all over it: 128 row groups at a time, for classes may come in order."""
    if source.size is None:
        rows = source.rows.reshard().shuffle(seed=seed, buffer_size=1000, max_buffer_input_shards=128)
        return replace(source, rows=rows.take(samples))
    order = torch.randperm(source.size, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return replace(source, rows=source.rows.select(order), numbers=order)


def image_batches(source: ImageSource, preprocess: Preprocess, size: int = CHUNK) -> Iterator[Tensor]:
    """All images of a split in order, (b, 3, height, width).

    Raises:
        DataError: no image at all, or an unreadable one.
    """
    for rows in _batches(source, size):
        yield preprocess([_decode(row, source, i) for i, row in rows])


def labelled_batches(
    source: ImageSource, preprocess: Preprocess, size: int = CHUNK, purpose: str = "training"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a split in order, with the data's own labels: (b, 3, height, width) and (b,).

    Raises:
        DataError: also where there are no labels, which ``purpose`` needs, or they are no numbers.
    """
    check_labels(source, purpose)
    for rows in _batches(source, size):
        labels = [_label(row[str(source.label_column)], source, i) for i, row in rows]
        yield preprocess([_decode(row, source, i) for i, row in rows]), torch.tensor(labels)


def calibration_images(source: ImageSource, samples: int, seed: int, preprocess: Preprocess) -> Tensor:
    """``samples`` images drawn at random, in one tensor (n, 3, height, width)."""
    return torch.cat([*image_batches(drawn(source, samples, seed), preprocess)])


def drawn_labelled(source: ImageSource, samples: int | None, seed: int) -> tuple[ImageSource, Tensor]:
    """:func:`drawn` images that can be read again and again by number, and the data's own labels (n,). They stay
    encoded: on disk, or those of a stream in memory.

    Raises:
        DataError: no image, no label column, labels that are no numbers, or all of a stream.
    """
    check_labels(source, "training")
    if source.size is None and samples is None:
        what = f"Data {source.name} ({source.split}) is streamed from the Hub."
        raise DataError(what, "Give --samples, the images to take of it.")
    source = drawn(source, samples, seed)
    if source.size is None:
        taken = [_nameless(row, source) for rows in _batches(source, CHUNK) for _, row in rows]
        source = replace(source, rows=datasets.Dataset.from_list(taken, features=source.rows.features))
    if not source.size:
        raise _empty(source)
    labels = [_label(label, source, i) for i, label in _numbered(source, source.rows[source.label_column])]
    return source, torch.tensor(labels)


def pictures(source: ImageSource, places: Iterable[int]) -> list[PIL.Image.Image]:
    """The images at these places, decoded, of a source that is no stream."""
    return [_decode(source.rows[i], source, i if source.numbers is None else source.numbers[i]) for i in places]


def _numbered(source: ImageSource, items: Iterable[T]) -> Iterator[tuple[int, T]]:
    return zip(count() if source.numbers is None else source.numbers, items, strict=False)


def _stream(source: ImageSource) -> Iterator[dict[str, Any]]:
    if source.size is not None:
        yield from source.rows
        return
    with hub_errors(DataError, "dataset", source.name), _unreadable(f"Data {source.name} ({source.split})"):
        yield from source.rows


def _batches(source: ImageSource, size: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows with their numbers, ``size`` at a time."""
    rows, empty = _numbered(source, _stream(source)), True
    while batch := list(islice(rows, size)):
        yield batch
        empty = False
    if empty:
        raise _empty(source)


def _empty(source: ImageSource) -> DataError:
    return DataError(f"Data {source.name} ({source.split}) is empty.")


def _label(label: Any, source: ImageSource, position: int) -> int:
    if isinstance(label, int):
        return label
    what = f"Image number {position} of {source.name} ({source.split})"
    raise DataError(f"{what} has the label {label!r}; expected the number of a class.")


def _nameless(row: dict[str, Any], source: ImageSource) -> dict[str, Any]:
    """A row whose image is its bytes alone, where it has them: datasets prefers a file of that name, if there is one
    here."""
    value = row[source.image_column]
    carried = value is not None and value.get("bytes") is not None
    return row | {source.image_column: {"path": None, "bytes": value["bytes"]}} if carried else row


def _is_own(path: str, homes: Sequence[str]) -> bool:
    """Whether a path, as datasets gives it, is that of a file in one of the data's own places; links there are
    followed, since only who made the folder can have put them there."""
    # A file in an archive: zip://IN_THE_ARCHIVE::ARCHIVE.
    *inner, place = path.split("::")

    def is_in(home: str) -> bool:
        if home.startswith("hf://"):
            return place.startswith((f"{home}@", f"{home}/")) and ".." not in place.split("/")
        return "://" not in place and Path(normpath(place)).is_relative_to(home)

    return all(re.match("(zip|gzip|bz2|xz|lz4|zstd)://", part) for part in inner) and any(map(is_in, homes))


def _decode(row: dict[str, Any], source: ImageSource, position: int) -> PIL.Image.Image:
    value = row[source.image_column] or {}
    path, carried = value.get("path"), value.get("bytes")
    if carried is None and path is not None and not _is_own(path, source.homes):
        raise DataError(
            f"Image number {position} of {source.name} ({source.split}) is given as {path!r:.200}, which is no file "
            "of the data's own, and is not read.",
            "Expected rows that carry their images' bytes, or files in the data's folder.",
        )
    try:
        image = Image().decode_example({"path": path, "bytes": carried})
        # Pillow would clip 16-bit greys at 255, which turns all but the darkest into white.
        grey = image.point(lambda v: v / 257, "L") if image.mode.startswith("I;16") else image
        return grey.convert("RGB")
    except (HTTPError, OSError, ValueError, SyntaxError, TypeError, PIL.Image.DecompressionBombError) as error:
        what = f"Image {path or f'number {position}'} of {source.name} ({source.split})"
        raise DataError(f"{what} cannot be read: {one_line(error)}", "Remove or replace it.") from error


def label_map(
    data_names: Sequence[str] | None, model_names: Sequence[str] | None, num_classes: int, source: str
) -> Tensor:
    """Class of the model for each label of the data, (data classes,).

    Names are matched exactly, then without case, then through ImageNet's synset identifiers. Labels without names are
    the model's own. Where there are as many as the model has, and no name stands at another place, numbers are matched
    in their order; other names are the model's own if the model's say nothing (LABEL_0, class 0) or nine in ten are
    the same.

    Raises:
        DataError: the classes cannot be matched.
    """
    own = torch.arange(num_classes)
    if data_names is None:
        return own
    folded = [_folded(name) for name in model_names or ()], [_folded(name) for name in data_names]
    candidates: list[tuple[Sequence[str], Sequence[str]]] = [(model_names or (), data_names), folded]
    if num_classes == 1000:
        candidates.append((ImageNetInfo().label_names(), data_names))
    elsewhere = False
    for names, wanted in candidates:
        if list(names) == list(wanted):
            return own
        # A name that stands for two classes (ImageNet has two cranes) decides nothing.
        count = Counter(names)
        index = {name: i for i, name in enumerate(names) if count[name] == 1}
        if index.keys() >= {*wanted}:
            return torch.tensor([index[name] for name in wanted])
        elsewhere |= any(index.get(name, i) != i for i, name in enumerate(wanted))
    if len(data_names) == num_classes and not elsewhere:
        if all(name.isdecimal() for name in data_names):  # folders come in alphabetical order, 10 before 2
            return torch.tensor([int(name) for name in data_names]).argsort().argsort()
        same = sum(name == other for name, other in zip(*folded, strict=False))
        if same >= 0.9 * num_classes or all(re.fullmatch(r"(label|class) ?\d+", name) for name in folded[0]):
            return own
    raise DataError(
        f"The {len(data_names)} classes of {source} ({shortened(data_names)}) cannot be matched to the model's "
        f"{num_classes} classes ({shortened(model_names or ['unnamed'])}).",
        "Give the data's classes (folders, or the names of the labels) the model's names; or, if the model's are "
        "wrong, correct them in the config.json of a copy of it.",
    )


def to_classes(labels: Tensor, classes: Tensor, source: ImageSource) -> Tensor:
    """Labels of the data (n,) → the model's classes (n,), by a :func:`label_map`; a :class:`DataError` for others."""
    if labels.min() < 0 or labels.max() >= len(classes):
        fault = f"a label lies outside 0 … {len(classes) - 1}; images without a label cannot be scored."
        raise DataError(f"Data {source.name} ({source.split}): {fault}")
    return classes[labels]


def _folded(name: str) -> str:
    return name.casefold().replace("_", " ").strip()
