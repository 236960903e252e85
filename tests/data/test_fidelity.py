"""Fidelity against outputs of both models that are all stored, and compared with other functions; and what a prune
says of it."""

import copy
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from embedded import DIGITS, VIT
from PIL import Image as Pillow
from scipy.spatial.distance import cosine
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor
from vision import save_model

from snows_hf import fidelity, load, prune
from snows_hf.adapters import outputs_of
from snows_hf.data.fidelity import IMAGES, Outputs, fidelity_of
from snows_hf.data.images import describe_rows, image_batches, open_images
from snows_hf.errors import ConfigError, MemoryLimitError


QUICK = {"data": str(DIGITS), "samples": 16, "k": 1, "mask": "sparsegpt", "layer_steps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def stored(model: Outputs, source, preprocess) -> dict[str, Tensor]:
    with torch.no_grad():
        parts = [model(pixels) for pixels in image_batches(source, preprocess, 50)]
    return {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}


def check(found, dense: dict[str, Tensor], pruned: dict[str, Tensor]) -> None:
    assert found["outputs"].keys() == dense.keys()
    for name, figures in found["outputs"].items():
        a, b = dense[name].flatten(1).numpy(), pruned[name].flatten(1).numpy()
        error = ((b - a) ** 2).sum() ** 0.5 / (a**2).sum() ** 0.5
        assert figures["error"] == pytest.approx(error, rel=1e-6)
        mean = sum(1 - cosine(*pair) for pair in zip(a, b, strict=True)) / len(a)
        assert figures["cosine"] == pytest.approx(mean, rel=1e-6)


def disturbed(model: torch.nn.Module, by: float) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vit", "clip", "backbone", "detr"])
def test_every_output_of_any_model(name: str, tmp_path: Path) -> None:
    checkpoint = load(save_model(name, tmp_path / "m"))
    few = open_images(DIGITS, "test")
    few = describe_rows("few", "test", few.rows.select(range(20)))
    models = [lambda x, model=m: outputs_of(model, x) for m in (checkpoint.model, disturbed(checkpoint.model, 0.02))]
    found = fidelity_of(*models, few, checkpoint.preprocess, classifier=False, batch_size=7).to_dict()
    assert (found["images"], found["agreement"], found["divergence"]) == (20, None, None)
    check(found, *(stored(model, few, checkpoint.preprocess) for model in models))


def test_a_prune_compares_with_the_dense_model(tmp_path: Path, small_vit: Path) -> None:
    """Which it does without a second copy of it: what stands in the report is what the two folders give."""
    report = prune(small_vit, "1:4", output=tmp_path / "out", eval_data=DIGITS, **QUICK).report
    alone = prune(small_vit, "1:4", output=tmp_path / "mask", eval_data=DIGITS, update=False, **QUICK).report
    assert report["fidelity"]["masked"] == alone["fidelity"]["masked"] == alone["fidelity"]["pruned"]
    dense = load(small_vit)
    source = open_images(DIGITS, "test")
    expected = stored(lambda x: outputs_of(dense.model, x), source, dense.preprocess)
    for folder, key in (("mask", "masked"), ("out", "pruned")):
        model = load(tmp_path / folder).model
        own = stored(lambda x, model=model: outputs_of(model, x), source, dense.preprocess)
        found = report["fidelity"][key]
        assert found["images"] == len(own["logits"])
        check(found, expected, own)
        a, b = expected["logits"].numpy(), own["logits"].numpy()
        assert found["agreement"] == pytest.approx(100 * (a.argmax(1) == b.argmax(1)).mean())
        divergence = entropy(softmax(a, 1), softmax(b, 1), axis=1).mean()
        assert found["divergence"] == pytest.approx(divergence, rel=1e-6)
        other = fidelity(tmp_path / folder, small_vit, DIGITS)
        assert other.agreement == pytest.approx(found["agreement"])
        check(other.to_dict(), expected, own)
    assert report["task"] == "image-classification"
    assert {report[key]["method"] for key in ("dense", "masked", "pruned")} == {"classifier"}
    card = (tmp_path / "out/README.md").read_text()
    assert f"| SNOWS | `logits` | {100 * report['fidelity']['pruned']['outputs']['logits']['error']:.2f} |" in card


@pytest.mark.parametrize("permuted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_channels_in_another_order_are_compared_in_that_order(permuted: bool) -> None:
    options = {"permute": permuted, "update": False, "layers": ("vit.layers.0.mlp.fc1",)}
    found = prune(VIT, "3:4", eval_data=DIGITS, **QUICK | options).report["fidelity"]["masked"]
    assert 0 < found["outputs"]["logits"]["error"] < 0.5


def test_images_without_labels_are_enough(tmp_path: Path) -> None:
    rows = open_images(DIGITS, "test").rows.select(range(30)).remove_columns("label")
    (tmp_path / "images").mkdir()
    rows.to_parquet(tmp_path / "images/test-00000-of-00001.parquet")
    report = prune(VIT, "2:4", eval_data=tmp_path / "images", output=tmp_path / "out", **QUICK).report
    assert (report["dense"], report["masked"], report["pruned"]) == (None, None, None)
    assert report["fidelity"]["pruned"]["images"] == 30
    assert "the images have no labels" in (tmp_path / "out/README.md").read_text()


def test_at_most_so_many_images_are_compared(tmp_path: Path) -> None:
    image = Pillow.new("RGB", (4, 4))
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    rows = Dataset.from_list([{"image": image, "label": 0}] * (IMAGES + 5), features=features)
    source = describe_rows("many", "test", rows)
    model: Outputs = lambda pixels: {"features": torch.ones(len(pixels), 2)}  # noqa: E731
    found = fidelity_of(model, model, source, lambda images: torch.zeros(len(images), 3, 1, 1), classifier=False)
    assert found.images == IMAGES
    assert found.outputs["features"] == {"error": 0, "cosine": pytest.approx(1)}


def test_outputs_of_zero_have_no_relative_error() -> None:
    source = open_images(DIGITS, "test")
    zeros: Outputs = lambda pixels: {"features": torch.zeros(len(pixels), 2)}  # noqa: E731
    found = fidelity_of(zeros, zeros, source, lambda images: torch.zeros(len(images), 3, 1, 1), classifier=False)
    assert found.outputs["features"]["error"] is None


def test_batches_are_halved_where_memory_runs_out() -> None:
    """Down to two images, not below."""
    source = open_images(DIGITS, "test")
    dense = load(VIT)

    def hungry(fits: int) -> Outputs:
        def outputs(pixels: Tensor) -> dict[str, Tensor]:
            if len(pixels) > fits:
                torch.empty(10**15)
            return outputs_of(dense.model, pixels)

        return outputs

    few = describe_rows("few", "test", source.rows.select(range(8)))
    one, other = (fidelity_of(hungry(n), hungry(n), few, dense.preprocess, classifier=True) for n in (2, 8))
    assert one.images == other.images == 8
    assert one.agreement == other.agreement == 100
    with pytest.raises(MemoryLimitError):
        fidelity_of(hungry(0), hungry(0), few, dense.preprocess, classifier=True)


@pytest.mark.filterwarnings("ignore")
def test_models_of_another_kind_are_no_reference(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(ViTModel\) has other weights than .* \(ViTForImageClassification\)"):
        fidelity(VIT, save_model("vit", tmp_path / "m"), DIGITS)
