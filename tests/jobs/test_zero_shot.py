"""Zero-shot accuracy against what transformers' own models say of the same images and prompts; nearest neighbours
against all pairs; and what cannot be measured."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from embedded import DIGITS, VIT, copy_of
from quick import slow
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner
from vision import save_headless_timm, save_model

from snows_hf import evaluate, finetune, load, probe, prune
from snows_hf.adapters import outputs_of
from snows_hf.cli import app
from snows_hf.data.images import labelled_batches, open_images
from snows_hf.data.neighbours import pooled
from snows_hf.errors import ConfigError, DataError


pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a photo of a {}.", "the picture {}"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def unlabelled(folder: Path) -> Path:
    folder.mkdir()
    rows = open_images(DIGITS, "test").rows.select(range(20)).remove_columns("label")
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def nameless(folder: Path) -> Path:
    """Labels that are numbers without names."""
    folder.mkdir()
    rows = open_images(DIGITS, "test").rows.select(range(60))
    rows.cast_column("label", datasets.Value("int64")).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@torch.no_grad()
def logits_per_image(folder: Path, prompts: list[str], padding: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits for each prompt (prompts, n, classes), and the labels (n,)."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    source, preprocess = open_images(DIGITS, "test"), load(folder).preprocess
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    labels = []
    for pixels, own in labelled_batches(source, preprocess, 200):
        for prompt, parts in zip(prompts, found, strict=True):
            texts = [prompt.format(name) for name in source.class_names or ()]
            tokens = tokenizer(texts, return_tensors="pt", padding=padding, max_length=12)
            parts.append(model(**tokens, pixel_values=pixels).logits_per_image)
        labels.append(own)
    return torch.stack([torch.cat(parts) for parts in found]), torch.cat(labels)


@pytest.mark.parametrize("name, padding", [("clip", True), ("siglip", "max_length")])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_accuracy_is_that_of_the_models_own_logits(
    name: str, padding: object, prompt: str, tmp_path: Path
) -> None:
    folder = save_model(name, tmp_path / "m")
    (logits,), labels = logits_per_image(folder, [prompt], padding)
    found = evaluate(folder, DIGITS, prompts=[prompt])
    hits = logits.topk(5).indices == labels[:, None]
    assert (found.method, found.images) == ("zero-shot", len(labels))
    assert found.top1 == pytest.approx(100 * float(hits[:, 0].double().mean()))
    assert found.top5 == pytest.approx(100 * float(hits.any(1).double().mean()))
    assert sum(found.confusion.values()) == len(labels)


def test_of_several_prompts_embeddings_are_averaged(tmp_path: Path) -> None:
    """Logits are linear in the classes' directions: their mean, over the length of the mean direction."""
    folder = save_model("clip", tmp_path / "m")
    logits, labels = logits_per_image(folder, PROMPTS, True)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        directions = []
        for prompt in PROMPTS:
            tokens = tokenizer([prompt.format(n) for n in "0123456789"], return_tensors="pt", padding=True)
            embedded = model.get_text_features(**tokens).pooler_output
            directions.append(embedded / embedded.norm(dim=1, keepdim=True))
    lengths = torch.stack(directions).mean(0).norm(dim=1)
    top1 = 100 * float(((logits.mean(0) / lengths).argmax(1) == labels).double().mean())
    assert evaluate(folder, DIGITS, prompts=PROMPTS).top1 == pytest.approx(top1)


@pytest.mark.parametrize("name", ["vit", "backbone", "resnet", "timm", "clip"])
def test_features_are_measured_by_their_nearest_neighbours(name: str, tmp_path: Path) -> None:
    """So is a model of images and text where the classes have no names."""
    folder = save_headless_timm(tmp_path / "m") if name == "timm" else save_model(name, tmp_path / "m")
    data = nameless(tmp_path / "data")
    found = evaluate(folder, data)
    checkpoint = load(folder)
    (pixels, labels), *_ = labelled_batches(open_images(data, "test"), checkpoint.preprocess, 100)
    with torch.no_grad():
        features = pooled(outputs_of(checkpoint.model, pixels)).double().numpy()
    right = 0
    for i in range(len(labels)):  # one left out after the other
        others = [j for j in range(len(labels)) if j != i]
        judge = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        right += int(judge.fit(features[others], labels[others]).predict(features[i : i + 1])[0] == int(labels[i]))
    assert (found.method, found.images) == ("nearest neighbours", len(labels))
    assert found.top1 == pytest.approx(100 * right / len(labels))
    assert found.top5 >= found.top1


def test_a_probe_reads_the_pooled_output(tmp_path: Path) -> None:
    found = probe(save_model("vit", tmp_path / "m"), DIGITS, samples=50)
    assert found["models"][0]["features"] == 16
    assert found["models"][0]["top1"] > 20


@pytest.mark.parametrize("name", [slow("vit"), "clip"])
def test_a_prune_measures_it(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path / "m")
    report = prune(folder, "2:4", data=DIGITS, samples=8, k=0, eval_data=DIGITS, output=tmp_path / "out").report
    method = {"vit": "nearest neighbours", "clip": "zero-shot"}[name]
    assert {report[key]["method"] for key in ("dense", "masked", "pruned")} == {method}
    assert report["dense"]["top1"] == evaluate(folder, DIGITS).top1
    assert report["pruned"]["top1"] == evaluate(tmp_path / "out", DIGITS).top1
    assert report["tower"] == (None if name == "vit" else "vision")
    output = "pooler_output" if name == "vit" else "image_embeds"
    assert 0 < report["fidelity"]["pruned"]["outputs"][output]["error"] < 1
    card = (tmp_path / "out/README.md").read_text()
    assert f"pipeline_tag: {report['task']}" in card
    assert method in card
    if name == "clip":
        assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert "text tower is untouched" in card


@pytest.mark.slow
def test_a_prune_of_a_dense_predictor_measures_fidelity_alone(tmp_path: Path) -> None:
    folder = save_model("segformer", tmp_path / "m")
    report = prune(folder, "2:4", data=DIGITS, samples=4, k=0, eval_data=DIGITS, output=tmp_path / "out").report
    assert report["dense"] is None
    assert report["fidelity"]["pruned"]["outputs"].keys() == {"logits"}


@pytest.mark.parametrize("name", ["segformer", "detr", "depth", "sam"])
def test_dense_predictors_have_no_accuracy(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path / "m")
    with pytest.raises(ConfigError, match="of which accuracy is not defined"):
        evaluate(folder, DIGITS)
    with pytest.raises(ConfigError, match="is for "):
        probe(folder, DIGITS)


def test_what_a_prompt_needs(tmp_path: Path) -> None:
    clip = save_model("clip", tmp_path / "m")
    with pytest.raises(ConfigError, match=r"has no \{\} for the name of a class"):
        evaluate(clip, DIGITS, prompts=["a photo"])
    with pytest.raises(DataError, match="has no names of classes"):
        evaluate(clip, nameless(tmp_path / "nameless"), prompts=PROMPTS)
    with pytest.raises(DataError, match="has no labels"):
        evaluate(clip, unlabelled(tmp_path / "unlabelled"))
    with pytest.raises(ConfigError, match="has no tower for text"):
        evaluate(VIT, DIGITS, prompts=PROMPTS)
    without = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        evaluate(copy_of(clip, tmp_path / "none", without), DIGITS, prompts=PROMPTS)


def test_what_needs_a_classifier(tmp_path: Path) -> None:
    folder = save_model("clip", tmp_path / "m")
    with pytest.raises(ConfigError, match="no classifier, which retraining needs"):
        finetune(folder, DIGITS, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="no classifier, which a teacher needs"):
        finetune(VIT, DIGITS, teacher=folder, output=tmp_path / "out")


@pytest.mark.parametrize("arguments, code, expected", [
    (["{clip}", "--data", "{digits}", "--prompt", "a photo of a {{}}.", "--prompt", "{{}}"], 0, "zero-shot"),
    (["{clip}", "--data", "{digits}", "--reference", "{clip}"], 0, "m: image_embeds"),
    (["{clip}", "--data", "{digits}", "--prompt", "a photo"], 1, "has no {} for the name of a class"),
    (["{clip}", "--data", "{digits}", "--prompt", "{{}}", "--reference", "{clip}"], 1, "--reference measures none"),
])  # fmt: skip
def test_the_command(arguments: list[str], code: int, expected: str, tmp_path: Path) -> None:
    places = {"clip": save_model("clip", tmp_path / "m"), "digits": DIGITS}
    result = CliRunner().invoke(app, ["eval", *(argument.format(**places) for argument in arguments)])
    if code:
        assert isinstance(result.exception, ConfigError)
        assert expected in result.exception.message
    else:
        assert result.exit_code == 0, result.output
        assert expected in result.output
