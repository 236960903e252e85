"""Top-1 and top-5 against counting by hand."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature, Value
from embedded import DIGITS
from PIL import Image
from torch import Tensor, nn

from snows_hf import compare, evaluate, finetune, from_pretrained, inspect, probe, prune, sensitivity, train
from snows_hf.data.accuracy import accuracy_of
from snows_hf.data.images import ImageSource, describe_rows
from snows_hf.errors import DataError


class Table(nn.Module):
    """A classifier that looks its logits up: image i is the number i. Only ``fits`` of them fit into memory."""

    def __init__(self, logits: Tensor, fits: int = 10**9) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.9)
        self.fits = fits

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.fits:
            torch.empty(10**15)
        return self.dropout(self.logits[images.long().flatten()])


def numbers(images: list[Image.Image]) -> Tensor:
    return torch.tensor([[float(image.getpixel((0, 0))[0])] for image in images])


def source(labels: list[int], kind: object) -> ImageSource:
    images = [Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(len(labels))]
    features = Features({"image": ImageFeature(), "label": kind})
    return describe_rows("d", "test", Dataset.from_dict({"image": images, "label": labels}, features))


@pytest.mark.parametrize("classes", [2, 4, 5, 12])
@pytest.mark.parametrize(("batch_size", "fits"), [(7, 7), (64, 64), (64, 3)])
def test_against_counting_by_hand(classes: int, batch_size: int, fits: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(40, classes, generator=generator)
    labels = torch.randint(classes, (40,), generator=generator).tolist()
    model = Table(logits, fits).train()
    found = accuracy_of(model, source(labels, Value("int64")), numbers, batch_size=batch_size)
    higher = [sum(bool(other > row[label]) for other in row) for row, label in zip(logits, labels, strict=True)]
    assert found.images == 40
    assert found.top1 == pytest.approx(100 * sum(h < 1 for h in higher) / 40)
    assert found.top5 == pytest.approx(100 * sum(h < 5 for h in higher) / 40)
    first = logits.argmax(1).tolist()
    assert found.confusion == Counter(f"{label} {guess}" for label, guess in zip(labels, first, strict=True))
    assert model.training
    assert model.logits.grad is None


def test_class_names_decide_not_numbers() -> None:
    data = source([0, 1, 1], ClassLabel(names=["dog", "cat"]))
    logits = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # dog, cat, cat
    assert accuracy_of(Table(logits), data, numbers, ("cat", "dog", "bird")).top1 == 100


@pytest.mark.parametrize("labels", [[0, -1], [0, 3]])
def test_labels_out_of_range_are_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match="a label lies outside 0 … 2"):
        accuracy_of(Table(torch.zeros(2, 3)), source(labels, Value("int64")), numbers)


def test_no_image_at_all() -> None:
    with pytest.raises(DataError, match=r"d \(test\) is empty"):
        accuracy_of(Table(torch.zeros(2, 3)), source([], Value("int64")), numbers)


@pytest.mark.slow
def test_models_and_data_are_named_by_text_or_path(
    tmp_path: Path, small_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate(small_vit, DIGITS)
    assert found == evaluate(str(small_vit), data=str(DIGITS), split="test", device="cpu") and found.images == 597
    made = prune(
        small_vit, "2:4", data=DIGITS, eval_data=DIGITS, output=tmp_path / "out", samples=8, k=0, update=False
    )
    assert made.report["source"] == "vit_digits" and made.report["calibration_data"]["name"] == "digits"
    assert inspect(tmp_path / "out")["pattern_ok"]
    assert from_pretrained(tmp_path / "out").source == str(tmp_path / "out")
    assert probe(small_vit, DIGITS, samples=32)["models"][0]["model"] == str(small_vit)
    assert compare([tmp_path / "out"])["models"][0]["model"] == str(tmp_path / "out")
    tuned = finetune(tmp_path / "out", DIGITS, output=tmp_path / "tuned", teacher=small_vit, samples=8, epochs=1)
    assert tuned.report["finetune"]["teacher"] == "vit_digits"
    few = {"samples": 8, "repair_steps": 0, "layers": ("*.0.mlp.fc1",), "mask": "magnitude"}
    assert sensitivity(small_vit, "2:4", data=DIGITS, **few)["source"] == "vit_digits"
    assert train(small_vit, DIGITS, epochs=0).report["source"] == "vit_digits"
    json.dumps([made.report, tuned.report])
