"""Images from every kind of local data, and labels matched to a model's classes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature, Value
from embedded import DIGITS
from hub.server import Hub
from PIL import Image
from pyarrow import parquet
from timm.data import ImageNetInfo
from torch import Tensor

from snows_hf.data.images import (
    calibration_images,
    describe_rows,
    drawn as drawn_from,
    drawn_labelled,
    label_map,
    labelled_batches,
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
    ((images, labels),) = labelled_batches(drawn_from(source, 7, 3), pixels)
    assert torch.equal(images, calibration_images(source, 7, 3, pixels))
    assert labels.tolist() == [value % 2 for value in images[:, 0, 0, 0].tolist()]
    assert to_classes(labels, torch.tensor([5, 8]), source).tolist() == [5 + 3 * label for label in labels.tolist()]
    with pytest.raises(DataError, match="a label lies outside 0 … 0"):
        to_classes(labels, torch.tensor([0]), source)


def test_calibration_examples_need_labels(tmp_path: Path) -> None:
    grey(tmp_path / "d/1.png", 1)
    with pytest.raises(DataError, match="has no labels"):
        next(labelled_batches(drawn_from(open_images(str(tmp_path / "d"), "train"), 1, 0), pixels))


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
        source = describe_rows("d", "train", rows)
        labelled = describe_rows("d", "train", rows.add_column("label", [0, 1, 2]))
        for read in (
            lambda source=source: calibration_images(source, 3, 0, pixels),
            lambda source=labelled: pictures(drawn_labelled(source, 3, 0)[0], range(3)),
        ):
            with pytest.raises(DataError, match=r"Image number 2 of d \(train\) cannot be read"):
                read()


def rows_that_name(folder: Path, *paths: str) -> Path:
    """A folder of parquet whose rows have no bytes, but name these."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(2)})
    images = pa.array([{"bytes": None, "path": path} for path in paths], features["image"].pa_type)
    table = pa.table({"image": images, "label": pa.array([0] * len(paths), pa.int64())})
    folder.mkdir(parents=True)
    parquet.write_table(table.cast(features.arrow_schema), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("how", ["local", "file://", "..", "relative", "zip://", "http://", "hf://", "http in a zip"])
def test_a_row_that_names_something_elsewhere_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = grey(tmp_path / "outside.png", 7)
    with Hub().running() as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_file_system.constants.ENDPOINT", hub.url)
        named = {
            "local": str(outside),
            "file://": f"file://{outside}",
            "..": f"{tmp_path}/d/../outside.png",
            "relative": "outside.png",
            "zip://": f"zip://a.png::{tmp_path}/outside.zip",
            "http://": f"{hub.url}/datasets/me/d/resolve/main/a.png",
            "hf://": "hf://datasets/me/d@main/a.png",
            "http in a zip": f"{hub.url}/a.png::{tmp_path}/d/train.parquet",
        }[how]
        monkeypatch.chdir(tmp_path)
        source = open_images(rows_that_name(tmp_path / "d", named), "train")
        stream = describe_rows("d", "train", source.rows.to_iterable_dataset(), source.homes)
        reads = (
            lambda: calibration_images(source, 1, 0, pixels),
            lambda: next(labelled_batches(source, pixels, 4)),
            lambda: pictures(drawn_labelled(stream, 1, 0)[0], [0]),
        )
        for read in reads:
            with pytest.raises(DataError, match="which is no file of the data's own, and is not read"):
                read()
        assert hub.requests == []


def test_bytes_are_read_and_not_the_file_that_has_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets, where it encodes rows, takes a file of that name in place of the bytes."""
    grey(tmp_path / "1.png", 200)
    monkeypatch.chdir(tmp_path)
    carried = {"bytes": grey(tmp_path / "other/2.png", 7).read_bytes(), "path": "1.png"}
    features = Features({"image": ImageFeature(decode=False), "label": Value("int64")})
    images = pa.array([carried], features["image"].pa_type)
    rows = Dataset(pa.table({"image": images, "label": [0]}).cast(features.arrow_schema)).cast_column(
        "image", ImageFeature()
    )
    for each in (rows, rows.to_iterable_dataset()):
        found, _ = drawn_labelled(describe_rows("d", "train", each), 1, seed=0)
        assert pixels(pictures(found, [0])).unique().tolist() == [7]


def test_files_of_the_folders_own_are_read_through_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = grey(tmp_path / "elsewhere/9.png", 9)
    grey(tmp_path / "d/train/a/1.png", 1)
    (tmp_path / "d/train/a/2.png").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to("d")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "d", Path("d"), tmp_path / "link", Path("link"), Path("elsewhere/../d")):
        assert sorted(drawn(folder, 4)) == [1, 9]
    own = rows_that_name(tmp_path / "rows", str(tmp_path / "rows/images/1.png"))
    grey(own / "images/1.png", 5)
    assert open_images(own, "train").size == 1
    (tmp_path / "rows/images/1.png").unlink()
    with pytest.raises(DataError, match=r"rows/images/1\.png of .* cannot be read"):
        drawn(own, 1)


def test_images_in_an_archive(tmp_path: Path) -> None:
    for value in (1, 2):
        grey(tmp_path / f"images/{value}.png", value)
    (tmp_path / "d").mkdir()
    shutil.make_archive(str(tmp_path / "d/train"), "zip", tmp_path / "images")
    assert sorted(drawn(tmp_path / "d", 4)) == [1, 2]


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
    chunks = list(labelled_batches(drawn_from(source, 20, 3), pixels, 16))
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
