"""Structured pruning from a checkpoint to a smaller one that stock transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from embedded import DIGITS, VIT, copy_of, tensors_of, write_tensors
from quick import rest_slow
from torch import nn
from transformers import AutoModelForImageClassification
from vision import save_model

from snows_hf import inspect, prune, train
from snows_hf.errors import ConfigError, SnowsError
from snows_hf.hub.load import load
from snows_hf.jobs import smaller
from snows_hf.masks.criteria import SCORES
from snows_hf.runtime.run import Progress


QUICK: dict[str, Any] = {
    "data": str(DIGITS),
    "samples": 120,
    "batch_size": 32,
    "k": 3,
    "joint_steps": 2,
    "mask": "magnitude",
    "views": 1,
}


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("mlp:0.5", 0),
        pytest.param("mlp:0.5", 2, marks=pytest.mark.slow),
        pytest.param("mlp:0.5+heads:0.25+2:4", 2, marks=pytest.mark.slow),
    ],
)
def test_a_smaller_checkpoint_is_an_ordinary_one(pattern: str, steps: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {"joint_steps": steps, "samples": 240, "views": 4}
    result = prune(str(VIT), pattern, output=out, eval_data=str(DIGITS), **QUICK | changes)
    report = result.report
    stock = AutoModelForImageClassification.from_pretrained(out)
    assert stock.config.intermediate_size == 48
    assert stock.vit.layers[0].mlp.fc1.weight.shape == (48, 48)
    checkpoint = load(str(out))
    pixels = checkpoint.image()
    with torch.no_grad():
        assert torch.equal(stock.eval()(pixels).logits, checkpoint.model(pixels).logits)
    assert report["pattern"] == pattern
    assert report["parameters"]["total"] == sum(p.numel() for p in stock.parameters())
    dense = sum(p.numel() for p in load(str(VIT)).model.parameters())
    assert report["parameters"]["dense"] == dense > report["parameters"]["total"]
    assert report["flops"]["pruned"] < 0.8 * report["flops"]["dense"]
    assert bool(report["settings"]["sweeps"]) == ("2:4" in pattern)
    assert len(report["later_sweeps"]) == bool(steps)
    for joint in report["later_sweeps"]:
        assert joint["name"] == "all layers" and joint["loss_pruned"] < joint["loss_start"]
    assert report["pruned"]["top1"] > 95
    masked, pruned = (report["fidelity"][what]["divergence"] for what in ("masked", "pruned"))
    assert steps or pruned < 7e-6 < masked / 50  # without steps, what was cut as it was is held against the repair
    found = inspect(out)
    assert found["pattern_ok"] and found["pattern"] == pattern
    assert json.loads((out / "config.json").read_text())["snows"]["pattern"] == pattern
    card = (out / "README.md").read_text()
    assert ("mask criterion" in card) == ("the zeros are in the file" in card) == ("2:4" in pattern)


@pytest.mark.slow
def test_obs_keeps_more_than_magnitude(small_vit: Path) -> None:
    cases: dict[str, dict[str, Any]] = {"obs": {}, "ridge": {"units": "magnitude"}}
    cases["magnitude"] = {"units": "magnitude", "repair": False}
    found = {}
    for name, given in cases.items():
        report = prune(small_vit, "mlp:0.75", update=False, eval_data=str(DIGITS), **QUICK, **given).report
        found[name] = report["fidelity"]["pruned"]["outputs"]["logits"]["error"]
    assert found["obs"] < found["ridge"] < found["magnitude"]


def test_zeros_of_the_dense_model_are_no_pattern(tmp_path: Path) -> None:
    tensors = tensors_of(VIT)
    tensors["vit.encoder.layer.0.attention.attention.query.weight"][0] = 0
    source = write_tensors(copy_of(VIT, tmp_path / "dense"), tensors)
    result = prune(str(source), "mlp:0.5", output=tmp_path / "out", update=False, **QUICK)
    assert result.report["sparsity"] == 0
    assert "mask criterion" not in (tmp_path / "out" / "README.md").read_text()


def test_layers_lose_as_many_units_as_they_can_spare(tmp_path: Path) -> None:
    out, given = tmp_path / "out", {**QUICK, "joint_steps": 0, "samples": 240, "eval_data": str(DIGITS)}
    even = prune(str(VIT), "mlp:0.5", **given).report
    report = prune(str(VIT), "mlp:0.5", output=out, allow_custom=True, allocation="sensitivity", **given).report
    left = [unit["after"] for unit in report["units"].values()]
    assert len(set(left)) > 1 and sum(left) == 4 * 48
    assert report["custom"] and report["allocation"] == {"kind": "sensitivity"}
    assert report["parameters"]["total"] == even["parameters"]["total"]
    assert report["fidelity"]["pruned"]["divergence"] < 0.6 * even["fidelity"]["pruned"]["divergence"]
    widths = [layer.mlp.fc1.out_features for layer in load(str(out)).model.vit.layers]
    assert widths == left and inspect(out)["pattern_ok"]


@pytest.mark.slow
def test_stages_that_lose_what_they_can_spare_are_an_ordinary_checkpoint(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (4, 8)}
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes)
    timm.models.save_for_hf(model, str(tmp_path / "swin"), model_args=sizes, safe_serialization=True)
    given = {**QUICK, "joint_steps": 0, "samples": 32, "allocation": "sensitivity"}
    report = prune(tmp_path / "swin", "mlp:0.5+heads:0.5", output=tmp_path / "out", **given).report
    left = {kind: [u["after"] for u in report["units"].values() if u["kind"] == kind] for kind in ("mlp", "heads")}
    first, _, last = left["mlp"]
    assert left["mlp"] == [first, first, last] and 2 * first != last
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert [stage.blocks[-1].mlp.fc1.out_features for stage in stock.layers] == [first, last]
    assert [block.attn.num_heads for stage in stock.layers for block in stage.blocks] == left["heads"]
    assert not report["custom"]


@pytest.mark.parametrize(
    ("pattern", "custom", "fault"),
    [
        ("mlp:0.5", False, "a configuration of ViTForImageClassification says one width for all"),
        ("ranks:0.5", True, "ranks go alike everywhere"),
    ],
)
def test_layers_that_cannot_lose_as_many_as_they_can_spare(
    pattern: str, custom: bool, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fault):
        prune(
            str(VIT),
            pattern,
            output=tmp_path / "out",
            allow_custom=custom,
            allocation="sensitivity",
            **QUICK | {"data": str(tmp_path / "no data is read before")},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_prune_that_is_broken_off_gives_the_same_bits(tmp_path: Path) -> None:
    class BrokenOffError(Exception):
        pass

    def break_off(progress: Progress) -> None:
        if progress.stage == "Layers" and progress.done >= 3:
            raise BrokenOffError

    given = QUICK | {"sweeps": 1, "layer_steps": 1}
    out, again = tmp_path / "out", tmp_path / "again"
    with pytest.raises(BrokenOffError):
        prune(str(VIT), "mlp:0.5", output=out, on_progress=break_off, **given)
    assert prune(str(VIT), "mlp:0.5", output=out, **given).report["resumed"]
    prune(str(VIT), "mlp:0.5", output=again, **given)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


UNTRAINED: dict[str, Any] = {"samples": 40, "criterion_samples": 20, "epochs": 0, "seed": 3}


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    return train(VIT, DIGITS, **UNTRAINED).model


@pytest.mark.parametrize("mask", rest_slow(SCORES, ("magnitude", "hp", "synflow")))
def test_an_untrained_network_is_cut_by_every_criterion_with_scores(mask: str, whole: nn.Module) -> None:
    result = train(VIT, DIGITS, "mlp:0.5", mask=mask, **UNTRAINED)
    name = "vit.layers.0.mlp.fc1.weight"
    rows = {tuple(row) for row in whole.get_parameter(name).tolist()}
    left = {tuple(row) for row in result.model.get_parameter(name).tolist()}
    assert left < rows and len(left) == 48, "no repair"
    assert set(result.report["units"]) == {f"vit.layers.{i}.mlp.fc1" for i in range(4)}


@pytest.mark.slow
def test_a_network_that_is_smaller_from_the_beginning_is_an_ordinary_one(whole: nn.Module, tmp_path: Path) -> None:
    given = UNTRAINED | {"epochs": 1}
    report = train(VIT, DIGITS, "mlp:0.5+heads:0.25", mask="hp", output=tmp_path / "out", **given).report
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert {unit["after"] for unit in report["units"].values()} == {3, 48}
    assert report["parameters"]["dense"] == sum(p.numel() for p in whole.parameters())
    assert report["parameters"]["total"] == sum(p.numel() for p in stock.parameters()) < report["parameters"]["dense"]
    card = (tmp_path / "out/README.md").read_text()
    assert "then trained: whole units are gone, and" in card and "chosen by `hp` on the untrained network" in card
    assert "It is an ordinary checkpoint" in card
    found = inspect(tmp_path / "out")
    assert found["pattern"] == "mlp:0.5+heads:0.25" and found["pattern_ok"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ({"units": "magnitude"}, {"units": "magnitude", "repair": False})
        ),
    ],
)
def test_heads_that_lose_ranks_are_an_ordinary_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    """By magnitude without other bases, which keeps less."""
    out, given = tmp_path / "out", {"eval_data": str(DIGITS), **QUICK, "joint_steps": 0, **changes}
    report = prune(str(VIT), "ranks:0.5", output=out, **given).report
    stock = AutoModelForImageClassification.from_pretrained(out).eval()
    assert (stock.config.num_attention_heads, stock.config.head_dim) == (4, 6)
    checkpoint = load(str(out))
    pixels = checkpoint.image()
    with torch.no_grad():
        assert torch.equal(stock(pixels).logits, checkpoint.model(pixels).logits)
    assert {(unit["kind"], unit["before"], unit["after"]) for unit in report["units"].values()} == {("ranks", 12, 6)}
    found = report["fidelity"]["pruned"]["divergence"]
    assert (found < 2e-4) == (not changes)
    if not changes:
        assert found < report["fidelity"]["masked"]["divergence"]
        heads = prune(str(VIT), "heads:0.5", **given).report
        assert found < heads["fidelity"]["pruned"]["divergence"] / 100


def test_ranks_that_a_class_does_not_let_go_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if products were not taken by 1/√d, and as if heads computed something else in other bases."""
    with monkeypatch.context() as patch:
        patch.setattr(smaller, "rescaled", lambda state, keep: dict(state))
        with pytest.raises(ConfigError, match="computes other outputs than the whole one"):
            prune(str(VIT), "ranks:0.5", output=tmp_path / "out", **QUICK)
    others = smaller.random_bases
    monkeypatch.setattr(smaller, "random_bases", lambda *of: {k: 2 * v for k, v in others(*of).items()})
    with pytest.raises(ConfigError, match="heads in other bases compute other outputs"):
        prune(str(VIT), "ranks:0.5", output=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_units_go_by_the_sums_of_their_scores(whole: nn.Module) -> None:
    smaller = train(VIT, DIGITS, "mlp:0.5", mask="magnitude", **UNTRAINED).model
    for i in range(len(whole.get_submodule("vit.layers"))):
        maker, reader = (f"vit.layers.{i}.mlp.fc{k}.weight" for k in (1, 2))
        scores = whole.get_parameter(maker).abs().sum(1) + whole.get_parameter(reader).abs().sum(0)
        kept = scores.topk(48).indices.sort().values
        assert torch.equal(smaller.get_parameter(maker), whole.get_parameter(maker)[kept])
        assert torch.equal(smaller.get_parameter(reader), whole.get_parameter(reader)[:, kept])


REFUSED = [
    ("dinov2", "mlp:0.3", "no configuration says mlp of 45 in place of 64"),
    pytest.param("clip vision", "heads:0.5", "no configuration says heads of 1 in place of 2", marks=pytest.mark.slow),
    pytest.param("vit", "channels:0.5", "has no such structure that can be cut", marks=pytest.mark.slow),
    pytest.param("vit", "heads:0.2", "has 2 heads, and 2 would be left", marks=pytest.mark.slow),
    pytest.param("vit", "mlp:0.99", "has 32 units, and 0 would be left", marks=pytest.mark.slow),
    ("clip vision", "ranks:0.5", "no configuration says ranks of 4 in place of 8"),
    pytest.param("resnet", "channels:0.5", "or --allow-custom, which makes a model", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, pattern, message", REFUSED)
def test_what_cannot_go_is_refused_before_any_image_is_read(
    name: str, pattern: str, message: str, tmp_path: Path
) -> None:
    said = list[str]()
    with pytest.raises(SnowsError, match=message):
        prune(save_model(name, tmp_path / "m"), pattern, output=tmp_path / "out", on_stage=said.append, **QUICK)
    assert said and not any(line.startswith("Reading") for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
