"""What is in a saved folder, and that it is whole or not there."""

import json
import math
import os
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from embedded import EMBEDDED, RESNET, VIT, Pruned, copy_of, edit_config, pruned, tensors_of, write_tensors
from huggingface_hub import ModelCard
from quick import rest_slow
from safetensors import SafetensorError
from safetensors.torch import save_file

from snows_hf import load, prune
from snows_hf.errors import SaveError
from snows_hf.hub.save import save_checkpoint
from snows_hf.patterns import NM
from snows_hf.runtime.files import check_output, whole_folder


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def recast(source: Path, folder: Path, dtype: str) -> Path:
    copy_of(source, folder)
    write_tensors(
        folder, {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors_of(source).items()}
    )
    return edit_config(folder, dtype=dtype) if source in (VIT, RESNET) else folder


@pytest.mark.parametrize(
    ("family", "dtype"),
    rest_slow(product(("vit", "resnet", "timm"), DTYPES), {("vit", "bfloat16"), ("resnet", "float16")}),
)
def test_only_pruned_weights_change_and_every_type_stays(family: str, dtype: str, tmp_path: Path, tiny_timm) -> None:
    source = recast({"vit": VIT, "resnet": RESNET, "timm": tiny_timm}[family], tmp_path / "source", dtype)
    result = pruned(source, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(result.folder)
    assert before.keys() == after.keys()
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    everything = [name for name in before if not torch.equal(before[name], after[name])]
    changed = [name for name in everything if name.endswith(".weight")]
    assert len(changed) == sum(len(layer["parameters"]) for layer in result.report["layers"])
    assert {name.removesuffix(".bias") + ".weight" for name in everything if name not in changed} <= {*changed}
    for name in changed:
        assert before[name].ndim in (2, 4)
        assert not any(part in name for part in ("classifier", "head", "embed", "norm"))
        assert NM(2, 4).holds(after[name])
        assert (after[name] == 0).sum() >= after[name].numel() // 2


def test_config(result: Pruned) -> None:
    before = json.loads((result.source / "config.json").read_text())
    after = json.loads((result.folder / "config.json").read_text())
    summary = after.pop("snows")
    assert summary.keys() == {"version", "pattern", "sparsity", "weights"}
    assert (summary["pattern"], summary["sparsity"]) == ("2:4", 0.5)
    assert summary["weights"] == sum(math.prod(layer["shape"]) for layer in result.report["layers"])
    if result.report["library"] == "timm":
        assert before["model_args"].pop("num_classes") == before["num_classes"]
    assert after == before


@pytest.mark.slow
def test_an_old_config_is_kept_as_it_was(tmp_path: Path) -> None:
    changes = {"dtype": None, "torch_dtype": "float32", "transformers_version": "4.13.0", "finetuning_task": "digits"}
    source = edit_config(copy_of(VIT, tmp_path / "source"), **changes)
    folder = pruned(source, tmp_path / "out").folder
    after = json.loads((folder / "config.json").read_text())
    assert after.pop("snows")["pattern"] == "2:4"
    assert after == json.loads((source / "config.json").read_text())


def test_an_old_flat_timm_config_gets_the_form_of_today(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / "source"), safe_serialization=True)
    nested = json.loads((tmp_path / "source/config.json").read_text())
    flat = {"architecture": "test_vit", **nested["pretrained_cfg"], "num_classes": 10}
    (tmp_path / "source/config.json").write_text(json.dumps(flat))
    folder = pruned(tmp_path / "source", tmp_path / "out", samples=2, k=0, layers=("blocks.0.attn.proj",)).folder
    after = json.loads((folder / "config.json").read_text())
    assert after["snows"]["pattern"] == "2:4"
    assert after["pretrained_cfg"]["mean"] == flat["mean"]
    assert load(str(folder)).model.num_classes == 10


def test_report(result: Pruned) -> None:
    saved = json.loads((result.folder / "snows_config.json").read_text())
    assert saved == {name: value for name, value in result.report.items() if name != "output"}
    assert saved["seed"] == saved["settings"]["seed"] == 0
    assert saved["settings"]["samples"] == saved["samples"] == 32
    assert {"snows-hf", "torch", "transformers", "timm", "safetensors", "python"} <= saved["versions"].keys()
    assert len(saved["layers"]) == {"vit_digits": 16, "resnet_digits": 8, "tiny_vit": 8}[result.source.name]
    assert {"name", "loss_start", "loss_pruned", "status", "k"} <= saved["layers"][0].keys()


def test_card(result: Pruned) -> None:
    card = ModelCard.load(result.folder / "README.md")
    assert card.data.library_name == result.report["library"]
    assert card.data.pipeline_tag == "image-classification"
    assert {"snows-hf", "2:4"} <= set(card.data.tags)
    assert card.data.model_name == result.folder.name
    metrics = {metric.metric_name: metric for metric in card.data.eval_results}
    for name, key in (("top-1 accuracy (%)", "top1"), ("top-5 accuracy (%)", "top5")):
        assert metrics[name].metric_value == pytest.approx(result.report["pruned"][key], abs=1e-4)
        assert (metrics[name].dataset_name, metrics[name].dataset_split) == ("digits", "test")
    assert f"`{result.source.name}` pruned one-shot to **2:4**" in card.text
    assert f"{result.report['pruned']['top1']:.2f}" in card.text
    assert "create_model" in card.text if card.data.library_name == "timm" else "from_pretrained" in card.text


def test_card_without_measurement(tmp_path: Path) -> None:
    card = ModelCard.load(pruned(VIT, tmp_path / "out").folder / "README.md")
    assert card.data.eval_results is None
    assert "Accuracy was not measured" in card.text


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    masks = {"vit.layers.0.mlp.fc1.weight": NM(2, 4).mask(torch.rand(96, 48))}
    save_file(masks, tmp_path / "masks.safetensors")
    for source, name in ((str(VIT), "a"), (f"local-dir:{VIT}", "b")):
        settings = {
            "data": str(EMBEDDED / "digits"),
            "samples": 8,
            "k": 0,
            "mask": str(tmp_path / "masks.safetensors"),
        }
        prune(source, "2:4", output=tmp_path / name, **settings)
        for path in (tmp_path / name).glob("*"):
            content = path.read_bytes()
            for secret in (EMBEDDED, tmp_path, Path.home(), Path.cwd()):
                assert f"{secret}/".encode() not in content
        assert "base_model" not in (tmp_path / name / "README.md").read_text()
        assert "vit_digits" in (tmp_path / name / "README.md").read_text()


def test_no_output_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = prune(str(VIT), "2:4", data=str(EMBEDDED / "digits"), samples=8, k=0)
    assert result.output is None
    assert result.report["output"] is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    previous = os.umask(umask)
    try:
        with whole_folder(tmp_path / "a/out") as folder:
            save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(previous)
    assert (tmp_path / "a/out").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "a/out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError(28, "No space left on device"), SaveError),
        (SafetensorError("disk"), SaveError),
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_exception_leaves_nothing(
    error: BaseException, raised: type[BaseException], exists: bool, tmp_path: Path
) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(raised), whole_folder(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("out")
    check_output(tmp_path / "link", 0)
    before = (tmp_path / "out").stat().st_ino
    with whole_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("a")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert (tmp_path / "out").stat().st_ino == before
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_nothing_shows_before_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
        assert folder.name.startswith(".")
    assert (tmp_path / "out/a").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_without_room(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="and its disk has"):
        check_output(tmp_path / "a/b/c", 10**18)
    assert not any(tmp_path.iterdir())


def test_weights_that_two_modules_share_are_saved_for_each(tmp_path: Path, tiny_timm: Path) -> None:
    checkpoint = load(str(tiny_timm))
    model = checkpoint.model
    model.blocks[1].mlp = model.blocks[0].mlp
    save_checkpoint(checkpoint, tmp_path, {}, {})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
