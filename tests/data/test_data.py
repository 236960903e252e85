"""Images from every kind of local data, and labels matched to a model's classes."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from embedded import DIGITS
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from snows_hf.data.images import (
    calibration_examples,
    calibration_images,
    describe_rows,
    drawn_labelled,
    label_map,
    labelled_batches,
    labelled_chunks,
    open_images,
    pictures,
    to_classes,
)
from snows_hf.errors import DataError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images → (n, 3, height, width), 0 to 255."""
    assert {image.mode for image in images} == {"RGB"}
    return torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images])


def grey(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), value).save(path)
    return path


def drawn(folder: Path, samples: int, seed: int = 0, split: str = "train") -> list[int]:
    """Values of the calibration images of a folder of plain images."""
    images = calibration_images(open_images(str(folder), split), samples, seed, pixels)
    assert images.shape[1:] == (3, 2, 2)
    return images[:, 0, 0, 0].tolist()


def test_parquet() -> None:
    source = open_images(str(DIGITS), "test")
    assert (source.size, source.image_column, source.label_column) == (597, "image", "label")
    assert source.class_names == tuple("0123456789")
    batches = list(labelled_batches(source, pixels, 256))
    assert [len(labels) for _, labels in batches] == [256, 256, 85]
    assert batches[0][0].shape == (256, 3, 8, 8)


def test_calibration_examples_are_the_calibration_images_with_their_labels(tmp_path: Path) -> None:
    for value in range(12):
        grey(tmp_path / f"d/train/{'even' if value % 2 == 0 else 'odd'}/{value}.png", value)
    source = open_images(str(tmp_path / "d"), "train")
    images, labels = calibration_examples(source, 7, 3, pixels)
    assert torch.equal(images, calibration_images(source, 7, 3, pixels))
    assert labels.tolist() == [value % 2 for value in images[:, 0, 0, 0].tolist()]
    assert to_classes(labels, torch.tensor([5, 8]), source).tolist() == [5 + 3 * label for label in labels.tolist()]
    with pytest.raises(DataError, match="a label lies outside 0 … 0"):
        to_classes(labels, torch.tensor([0]), source)


def test_calibration_examples_need_labels(tmp_path: Path) -> None:
    grey(tmp_path / "d/1.png", 1)
    with pytest.raises(DataError, match="has no labels"):
        calibration_examples(open_images(str(tmp_path / "d"), "train"), 1, 0, pixels)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split, values in (("train", (1, 2, 3)), ("test", (4, 5))):
        for value in values:
            grey(tmp_path / f"d/{split}/{'even' if value % 2 == 0 else 'odd'}/{value}.png", value)
    assert sorted(drawn(tmp_path / "d", 10)) == [1, 2, 3]
    source = open_images(str(tmp_path / "d"), "test")
    assert source.class_names == ("even", "odd")
    (images, labels), *_ = labelled_batches(source, pixels, 8)
    assert [label == value % 2 for label, value in zip(labels, images[:, 0, 0, 0], strict=True)] == [True, True]


def test_image_folder_without_splits_is_train(tmp_path: Path) -> None:
    for value in (1, 2):
        grey(tmp_path / f"d/class{value}/{value}.png", value)
    assert sorted(drawn(tmp_path / "d", 10)) == [1, 2]
    with pytest.raises(DataError, match=r"has no split 'test'. It has train"):
        open_images(str(tmp_path / "d"), "test")


def test_images_without_labels_calibrate_and_do_not_measure(tmp_path: Path) -> None:
    grey(tmp_path / "d/1.png", 1)
    assert drawn(tmp_path / "d", 4) == [1]
    with pytest.raises(DataError, match="has no labels"):
        next(labelled_batches(open_images(str(tmp_path / "d"), "train"), pixels, 4))


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    colour = (200, 100, 50)
    palette = Image.new("RGB", (2, 2), colour).quantize()
    kinds = {
        "RGB": (Image.new("RGB", (2, 2), colour), colour),
        "RGBA": (Image.new("RGBA", (2, 2), (*colour, 128)), colour),
        "P": (palette, colour),
        "L": (Image.new("L", (2, 2), 7), (7, 7, 7)),
        "LA": (Image.new("LA", (2, 2), (7, 128)), (7, 7, 7)),
        "1": (Image.new("1", (2, 2), 1), (255, 255, 255)),
        "I;16": (Image.fromarray(np.full((2, 2), 100 * 257, np.uint16)), (100, 100, 100)),
    }
    (tmp_path / "d").mkdir()
    for name, (image, _) in kinds.items():
        assert image.mode == name
        image.save(tmp_path / "d" / f"{name[0]}{len(name)}.png")
    images = calibration_images(open_images(str(tmp_path / "d"), "train"), 10, 0, pixels)
    found = sorted(tuple(image[:, 0, 0].tolist()) for image in images)
    assert found == sorted(expected for _, expected in kinds.values())


def test_rotated_photographs_are_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "d").mkdir()
    image.save(tmp_path / "d/1.png", exif=exif)
    images = calibration_images(open_images(str(tmp_path / "d"), "train"), 1, 0, pixels)
    assert images[0, 0].tolist() == [[0, 0], [0, 255]]


def test_calibration_images_are_drawn_without_replacement_by_the_seed(tmp_path: Path) -> None:
    for value in range(20):
        grey(tmp_path / f"d/{value}.png", value)
    first = drawn(tmp_path / "d", 8, seed=3)
    assert drawn(tmp_path / "d", 8, seed=3) == first
    assert drawn(tmp_path / "d", 8, seed=4) != first
    assert len(set(first)) == 8
    assert sorted(drawn(tmp_path / "d", 100)) == list(range(20))
    assert drawn(tmp_path / "d", 20, seed=3)[:8] == first


def test_streams_are_drawn_by_the_seed() -> None:
    rows = datasets.load_dataset(str(DIGITS), split="test")
    source = describe_rows("digits", "test", rows.to_iterable_dataset(num_shards=4))
    assert source.size is None
    first = calibration_images(source, 5, 0, pixels)
    assert first.shape == (5, 3, 8, 8)
    assert torch.equal(calibration_images(source, 5, 0, pixels), first)
    assert not torch.equal(calibration_images(source, 5, 1, pixels), first)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    grey(tmp_path / "d/1.png", 1)
    (tmp_path / "d/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Image .*d/2\.png of .* cannot be read"):
        drawn(tmp_path / "d", 2)


def test_a_broken_image_without_a_name_is_numbered() -> None:
    good = (DIGITS / "test.parquet",)
    row = datasets.load_dataset("parquet", data_files=[str(*good)], split="train[:3]")
    images = [*row.cast_column("image", ImageFeature(decode=False))["image"]][:2]
    for broken in ({"bytes": b"no image", "path": None}, None):
        rows = Dataset.from_dict({"image": [*images, broken]}, Features({"image": ImageFeature()}))
        with pytest.raises(DataError, match=r"Image number 2 of d \(train\) cannot be read"):
            calibration_images(describe_rows("d", "train", rows), 3, 0, pixels)


@pytest.mark.parametrize("label, kind", [("cat", Value("string")), (None, Value("int64")), (0.5, Value("float32"))])
def test_labels_that_are_no_numbers(label: object, kind: Value) -> None:
    features = Features({"image": ImageFeature(), "label": kind})
    rows = Dataset.from_dict({"image": [Image.new("RGB", (2, 2))], "label": [label]}, features)
    with pytest.raises(DataError, match=f"Image number 0 of d .test. has the label {label!r}"):
        next(labelled_batches(describe_rows("d", "test", rows), pixels, 4))


def test_the_finer_classes_are_the_labels() -> None:
    columns = {"coarse_label": ClassLabel(num_classes=2), "fine_label": ClassLabel(num_classes=5)}
    rows = Dataset.from_dict(
        {"image": [Image.new("RGB", (2, 2))], "coarse_label": [1], "fine_label": [4]},
        Features({"image": ImageFeature(), **columns}),
    )
    assert describe_rows("d", "test", rows).label_column == "fine_label"


SYNSETS = ImageNetInfo().label_names()
MATCHES = [
    ("exact", ["dog", "cat"], ["cat", "dog"], 2, [1, 0]),
    ("subset", ["dog"], ["cat", "dog", "bird"], 3, [1]),
    ("case", ["Great_White", "tench"], ["tench", "great white"], 2, [1, 0]),
    ("numbers by name", ["0", "1", "10", "2"], [str(i) for i in range(11)], 11, [0, 1, 10, 2]),
    ("ImageNet synsets", ["n01440764", "n01443537"], ["tench", *["x"] * 999], 1000, [0, 1]),
    ("ImageNet synsets, unnamed model", ["n15075141"], None, 1000, [999]),
    ("two cranes", ["a", "crane", "b", "crane"], ["a", "crane", "b", "crane"], 4, [0, 1, 2, 3]),
    ("as many", ["cat", "dog"], ["LABEL_0", "LABEL_1"], 2, [0, 1]),
    ("as many, class 0", ["cat", "dog"], ["class 0", "class 1"], 2, [0, 1]),
    ("as many, one synonym", [*"abcdefghi", "car"], [*"abcdefghi", "automobile"], 10, list(range(10))),
    ("folders by number", [str(i) for i in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)], None, 11, [0, 1, 10, *range(2, 10)]),
    ("numbers from 1", ["1", "2"], ["cat", "dog"], 2, [0, 1]),
    ("as many, unnamed model", ["cat", "dog"], None, 2, [0, 1]),
    ("unnamed data", None, ["cat", "dog"], 2, [0, 1]),
]


@pytest.mark.parametrize("data, model, classes, expected", [m[1:] for m in MATCHES], ids=[m[0] for m in MATCHES])
def test_labels_match(data: list[str] | None, model: list[str] | None, classes: int, expected: list[int]) -> None:
    assert label_map(data, model, classes, "d").tolist() == expected


def test_labels_of_all_of_imagenet() -> None:
    assert torch.equal(label_map(SYNSETS, None, 1000, "d"), torch.arange(1000))


@pytest.mark.parametrize(
    "data, model, classes",
    [
        (["cat", "dog"], ["cat", "bird", "fish"], 3),
        (["cat", "dog"], None, 3),
        (["n01440764", "n01443537"], None, 999),
        (["crane"], ["crane", "dog", "crane"], 3),
        (["dog", "cat", "fish"], ["cat", "dog", "bird"], 3),  # as many, but the order is not the model's
        (["1", "2"], ["0", "1"], 2),
        (["Hund", "Katze"], ["cat", "dog"], 2),  # as many, but other names
        (["eins", "null"], ["0", "1"], 2),
        (["plane", "car"], ["plane", "automobile"], 2),
    ],
)
def test_labels_that_cannot_be_matched(data: list[str], model: list[str] | None, classes: int) -> None:
    with pytest.raises(DataError, match="cannot be matched to the model's"):
        label_map(data, model, classes, "d")


def test_what_cannot_be_matched_is_shown() -> None:
    with pytest.raises(DataError, match=r"\(h, i, j, k, l, …\) cannot .* \(a, b, c, d, e, …\).*the model's names"):
        label_map("hijklm", "abcdef", 6, "d")


@pytest.mark.parametrize("streamed", [False, True])
def test_drawn_images_are_read_by_number_and_keep_their_labels(streamed: bool) -> None:
    source = open_images(str(DIGITS), "test")
    labels_of = {image.numpy().tobytes(): int(y) for x, ys in labelled_batches(source, pixels, 64)
                 for image, y in zip(x, ys, strict=True)}  # fmt: skip
    if streamed:
        source = describe_rows("digits", "test", source.rows.to_iterable_dataset())
        with pytest.raises(DataError, match="--samples"):
            drawn_labelled(source, None, 0)
    found, labels = drawn_labelled(source, 20, seed=3)
    images = pixels(pictures(found, range(20)))
    assert [labels_of[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert torch.equal(pixels(pictures(found, [7, 7, 2])), images[[7, 7, 2]])
    again, same = drawn_labelled(source, 20, seed=3)
    assert torch.equal(pixels(pictures(again, range(20))), images)
    assert torch.equal(labels, same)
    chunks = list(labelled_chunks(source, 20, 3, pixels))
    assert torch.equal(torch.cat([x for x, _ in chunks]), images)
    assert torch.equal(torch.cat([y for _, y in chunks]), labels)
    if not streamed:
        assert len(drawn_labelled(source, None, 0)[1]) == 597


def test_a_stream_in_the_order_of_its_classes_gives_most_of_them(tmp_path: Path) -> None:
    """50 classes one after the other, as image folders are: a buffer of neighbours would hold a few of them."""
    png = (grey(tmp_path / "0.png", 7)).read_bytes()
    rows = {"image": [{"bytes": png, "path": None}] * 5000, "label": [i // 100 for i in range(5000)]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(50)})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet", batch_size=50)
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), streaming=True)["train"]
    _, labels = drawn_labelled(describe_rows("sorted", "train", stream), 200, seed=0)
    assert len(labels) == 200 and len(labels.unique()) >= 40
