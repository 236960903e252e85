"""Every command on the embedded checkpoints, for people, as JSON and quietly."""

import json
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import psutil
import pytest
import torch
from embedded import DIGITS, RESNET, VIT, copy_of, tensors_of
from PIL import Image
from quick import slow
from safetensors.torch import save_file

import snows_hf
from snows_hf import __version__
from snows_hf.cli import app
from snows_hf.jobs.bench import bench
from snows_hf.patterns import NM
from snows_hf.settings import FinetuneConfig, PruneConfig, TrainConfig


QUICK = ("--data", DIGITS, "--samples", 64, "--k", 1, "--mask", "sparsegpt")
MEASURED = (*QUICK, "--eval-data", DIGITS)
ALONE = ("--data", DIGITS, "--samples", 64, "--mask", "magnitude", "--no-update")
"""What is enough for tests of what is done with a pruned folder: the mask, which takes no time."""


@pytest.mark.parametrize(
    ("model", "layers"),
    [pytest.param(VIT, 16, id="vit"), pytest.param(RESNET, 8, id="resnet", marks=pytest.mark.slow)],
)
def test_prune_as_json(run, model: Path, layers: int) -> None:
    result = run("prune", model, "--pattern", "2:4", *MEASURED, "--output", "out", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    keys = {"output", "pattern", "samples", "seconds", "dense", "masked", "pruned", "layers"}
    assert keys <= report.keys()
    assert (report["output"], report["pattern"], report["samples"]) == ("out", "2:4", 64)
    assert report["seconds"] > 0
    for what in ("dense", "masked", "pruned"):
        accuracy = report[what]
        assert accuracy.keys() == {"top1", "top5", "images", "confusion", "method"}
        assert accuracy["images"] == 597
        assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 100
    assert len(report["layers"]) == layers
    for layer in report["layers"]:
        keys = {"name", "shape", "sparsity", "loss_start", "loss_pruned", "cg_iterations", "seconds", "status"}
        assert keys <= layer.keys()
        assert layer["sparsity"] == 0.5
        assert 0 <= layer["loss_pruned"] <= layer["loss_start"]
    solved = layers + len(report["later_sweeps"])
    for line in ("Loading", "Reading 64", f"Pruning {layers} layers to 2:4", f"{solved}/{solved}", "Saving to out"):
        assert line in result.err

    evaluated = run("eval", "out", "--data", DIGITS, "--json", "--confusions")
    assert evaluated.code == 0
    assert json.loads(evaluated.out) == report["pruned"]

    inspected = run("inspect", "out", "--json")
    assert inspected.code == 0
    found = json.loads(inspected.out)
    assert (found["pattern"], found["pattern_ok"]) == ("2:4", True)
    assert 0.5 <= found["sparsity"] < 0.51
    for layer in found["layers"]:
        assert {"name", "shape", "sparsity", "pattern_ok"} <= layer.keys()
        assert layer["pattern_ok"] is True
    assert [layer["name"] for layer in found["layers"]] == [layer["name"] for layer in report["layers"]]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "relaxed"), [("1:4", "2:4"), ("0.8", "0.6")])
def test_a_cnn_comes_to_its_masks_gradually(run, pattern, relaxed) -> None:
    """Fewer than half of the weights; the report, the card, the page and the weights tell the same."""
    Path("s.yaml").write_text("joint_steps: 6\nlayer_steps: 1\ngradual: 0.34\n")
    options = ("prune", RESNET, "--data", DIGITS, "--samples", 40, "--config", "s.yaml", "--json")
    report = json.loads(run(*options, "--pattern", pattern, "--report", "--output", "out").out)
    sparsity = {"1:4": 0.75, "0.8": 0.8}[pattern]
    assert report["criterion"]["thinned_out_from"] == relaxed
    thinning, joint = report["later_sweeps"]
    assert (thinning["status"], thinning["steps"], joint["steps"]) == ("thinned_out", 2, 4)
    assert report["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    found = json.loads(run("inspect", "out", "--json").out)
    assert (found["pattern"], found["pattern_ok"]) == (pattern, True)
    shares = {layer["name"]: layer["sparsity"] for layer in found["layers"]}
    assert shares == {layer["name"]: layer["sparsity"] for layer in report["layers"]}
    assert f"for {relaxed}, thinned out to {pattern} while the weights moved" in Path("out/README.md").read_text()
    assert "all layers, thinning out" in Path(report["page"]).read_text()

    Path("s.yaml").write_text("joint_steps: 6\nlayer_steps: 1\ngradual: 0\n")
    fixed = json.loads(run(*options, "--pattern", pattern, "--output", "fixed").out)
    assert fixed["criterion"]["thinned_out_from"] is None
    assert [solved["name"] for solved in fixed["later_sweeps"]] == ["all layers"]


@pytest.mark.slow
def test_channels_in_another_order_are_the_same_network(run) -> None:
    """The dense model's accuracy is measured after its channels were put in order."""
    options = ("prune", VIT, "--pattern", "2:4", *MEASURED, "--mask", "magnitude", "--json", "--no-update")
    plain = json.loads(run(*options, "--output", "plain").out)
    report = json.loads(run(*options, "--set", "permute=true", "--output", "out").out)
    assert plain["permuted"] == {} and report["dense"] == plain["dense"]
    assert report["permuted"] and all(s["kept_after"] > s["kept_before"] for s in report["permuted"].values())
    assert all("fc2" in name for name in report["permuted"])
    assert "come in another order than in the base model" in Path("out/README.md").read_text()
    assert json.loads(run("eval", "out", "--data", DIGITS, "--json", "--confusions").out) == report["pruned"]
    found = json.loads(run("report", "out", "--dense", VIT, "--data", DIGITS, "--json").out)
    rows = found["attention"]["models"]
    assert len(rows) == 3 and rows[1]["last"] == rows[2]["last"], "the result is the mask alone"


def test_channels_that_cannot_be_ordered_are_refused(run) -> None:
    refused = run("prune", VIT, "--pattern", "0.5", *QUICK, "--set", "permute=true", "--output", "refused")
    assert refused.code == 1 and "Channels cannot be ordered for 0.5" in refused.err
    save_file({"x": torch.ones(1, dtype=torch.bool)}, "masks.safetensors")
    masks = ("--mask", "masks.safetensors", "--pattern", "2:4", "--set", "permute=true", "--output", "refused")
    refused = run("prune", VIT, *QUICK, *masks)
    assert refused.code == 1 and "not for another order" in refused.err
    assert not Path("refused").exists()


def test_prune_for_people(run) -> None:
    result = run("prune", VIT, "--pattern", "2:4", *MEASURED, "--output", "out")
    assert result.code == 0
    for text in ("2:4 on 597 images", "dense", "mask alone", "SNOWS", "50.0 % zeros", "Saved to out"):
        assert text in result.out
    assert "Loading" in result.err
    assert "\n\n" not in result.err
    assert "Loading" not in result.out


@pytest.mark.parametrize("flags", [["--quiet"], ["--quiet", "--json"]], ids=" ".join)
def test_prune_quietly(run, flags: list[str]) -> None:
    result = run("prune", VIT, "--pattern", "2:4", *ALONE, "--output", "out", *flags)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["output"] == "out" if "--json" in flags else result.out == ""


def test_eval_for_people_and_quietly(run) -> None:
    result = run("eval", VIT, "--data", DIGITS)
    assert result.code == 0
    assert re.search(r"top-1 98\.99 %, top-5 100\.00 % on 597 images", result.out)
    assert "Measuring" in result.err
    result = run("eval", VIT, "--data", DIGITS, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_inspect_of_a_dense_model(run) -> None:
    result = run("inspect", RESNET, "--json", "--operations")
    found = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    assert (found["pattern"], found["pattern_ok"]) == (None, False)
    assert {layer["pattern_ok"] for layer in found["layers"]} == {None}
    assert [operation["index"] for operation in found["operations"]] == list(range(len(found["operations"])))
    solved = [operation["group"] for operation in found["operations"] if operation["group"]]
    assert solved == [layer["name"] for layer in found["layers"]]
    people = run("inspect", RESNET, "--operations")
    for layer in found["layers"]:
        assert layer["name"] in people.out  # in one piece, where a terminal would fold it
    assert "no pattern, 0.0 %" in people.out
    assert found["operations"][-1]["name"] in people.out


def test_inspect_does_not_believe_the_metadata(run) -> None:
    run("prune", VIT, "--pattern", "2:4", *ALONE, "--output", "out")
    tensors = tensors_of(Path("out"))
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight") or "fc1.weight" in name)
    tensors[name][0, :4] = 1
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    result = run("inspect", "out", "--json")
    found = json.loads(result.out)
    assert (found["pattern"], found["pattern_ok"]) == ("2:4", False)
    assert [layer["pattern_ok"] for layer in found["layers"]].count(False) == 1
    people = run("inspect", "out")
    assert "NO" in people.out
    assert (result.code, people.code) == (1, 1)
    assert "does not hold the pattern 2:4 that it claims: vit.layers.0.mlp.fc1." in people.err
    tensors[name] += 0.01  # no zero is left
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    assert json.loads(run("inspect", "out", "--json").out)["pattern_ok"] is False
    config = json.loads(Path("out/config.json").read_text())
    config["snows"]["pattern"] = "2 of 4"  # claimed, but nothing that could be held
    Path("out/config.json").write_text(json.dumps(config))
    assert run("inspect", "out").code == 1


@pytest.mark.parametrize("pattern", ["15:16", "0.05"])
def test_inspect_of_few_zeros(run, pattern: str) -> None:
    run("prune", VIT, "--pattern", pattern, *ALONE, "--output", "out")
    result = run("inspect", "out", "--json")
    assert (result.code, json.loads(result.out)["pattern_ok"]) == (0, True)
    tensors = tensors_of(Path("out"))
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, "out/model.safetensors", {"format": "pt"})
    assert run("inspect", "out").code == 1


def test_unstructured(run) -> None:
    result = run("prune", VIT, "--pattern", "0.7", *QUICK, "--json")
    report = json.loads(result.out)
    assert report["pattern"] == "0.7"
    assert report["output"] == "vit_digits-0.7"
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-4)
    found = json.loads(run("inspect", "vit_digits-0.7", "--json").out)
    assert (found["pattern"], found["pattern_ok"]) == ("0.7", True)
    assert found["sparsity"] == pytest.approx(0.7, abs=1e-4)


def test_inspect_counts_unstructured_zeros(run) -> None:
    run("prune", VIT, "--pattern", "0.7", *ALONE, "--output", "out")
    config = json.loads(Path("out/config.json").read_text())
    config["snows"]["pattern"] = "0.8"
    Path("out/config.json").write_text(json.dumps(config))
    found = json.loads(run("inspect", "out", "--json").out)
    assert (found["pattern"], found["pattern_ok"]) == ("0.8", False)
    assert "vit.layers.0.attention.qkv, " in run("inspect", "out").err


def test_default_output(run, elsewhere: Path) -> None:
    assert run("prune", VIT, "--pattern", "1:4", *ALONE, "--quiet").code == 0
    assert [path.name for path in elsewhere.iterdir()] == ["vit_digits-1to4"]


def test_default_output_for_the_folder_here(run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy_of(VIT, elsewhere / "mine"))
    assert json.loads(run("prune", ".", "--pattern", "2:4", *ALONE, "--json").out)["output"] == "mine-2to4"


def test_settings_file_and_options_on_top(run) -> None:
    Path("s.yaml").write_text("samples: 48\nk: 2\ndamping: 1e-3\nlayers: '*.mlp.fc2'\n")
    result = run("prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--config", "s.yaml", "--k", 0, "--json")
    report = json.loads(result.out)
    settings = report["settings"]
    assert (report["samples"], settings["k"], settings["solver"]["damping"]) == (48, 0, 1e-3)
    assert [layer["name"] for layer in report["layers"]] == [f"vit.layers.{i}.mlp.fc2" for i in range(4)]


@pytest.mark.parametrize("content", ["", "# nothing\n", "{}"])
def test_empty_settings_file(run, content: str) -> None:
    Path("s.yaml").write_text(content)
    result = run("prune", VIT, "--pattern", "2:4", *QUICK, "--config", "s.yaml", "--layers", "*0.mlp.fc2", "--quiet")
    assert result.code == 0


def test_layers(run) -> None:
    chosen = ("--layers", "vit.layers.0.mlp.*", "--layers", "vit.layers.3.attention.q_proj.weight")
    result = run("prune", VIT, "--pattern", "2:4", *QUICK, "--output", "out", *chosen, "--json")
    names = [layer["name"] for layer in json.loads(result.out)["layers"]]
    assert names == ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2", "vit.layers.3.attention.qkv"]
    before, after = tensors_of(VIT), tensors_of(Path("out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted({name.rpartition(".")[2] for name in changed}) == ["bias", "weight"]
    assert len({name.rpartition(".")[0] for name in changed}) == 2 + 3
    found = json.loads(run("inspect", "out", "--json").out)
    assert found["pattern_ok"] is True
    assert [layer["name"] for layer in found["layers"] if layer["pattern_ok"]] == names


def test_mask_file(run) -> None:
    generator = torch.Generator().manual_seed(0)
    names = {"vit.layers.1.mlp.fc1.weight": (96, 48), "vit.layers.1.attention.q_proj.weight": (48, 48)}
    masks = {name: NM(2, 4).mask(torch.rand(shape, generator=generator)) for name, shape in names.items()}
    save_file(masks, "masks.safetensors")
    result = run("prune", VIT, "--pattern", "2:4", *QUICK, "--mask", "masks.safetensors", "--output", "out", "--json")
    report = json.loads(result.out)
    assert [layer["name"] for layer in report["layers"]] == ["vit.layers.1.attention.qkv", "vit.layers.1.mlp.fc1"]
    assert len(report["dense_layers"]) == 14
    assert "no mask" in report["dense_layers"][0]["reason"]
    zeros = [tensor == 0 for tensor in tensors_of(Path("out")).values()]
    for mask in masks.values():
        assert any(zero.shape == mask.shape and torch.equal(zero, ~mask) for zero in zeros)
    found = json.loads(run("inspect", "out", "--json").out)
    assert found["pattern_ok"] is True
    assert [layer["pattern_ok"] for layer in found["layers"]].count(True) == 2


def test_same_seed_same_bytes(run) -> None:
    def weights(seed: int, name: str) -> bytes:
        options = ("--pattern", "2:4", "--data", DIGITS, "--samples", 32, "--k", 1, "--mask", "sparsegpt")
        options += ("--layers", "*.stages.0.*", "--set", "joint_steps=1", "--seed", seed, "--output", name)
        assert run("prune", RESNET, *options, "--quiet").code == 0
        return Path(name, "model.safetensors").read_bytes()

    first = weights(1, "a")
    assert weights(1, "b") == first
    assert weights(2, "c") != first


def test_fewer_images_than_asked_for(run, tmp_path: Path) -> None:
    for i in range(3):
        path = tmp_path / f"few/train/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 * i).save(path)
    result = run("prune", VIT, "--pattern", "2:4", "--data", tmp_path / "few", "--samples", 64, "--k", 0, "--json")
    report = json.loads(result.out)
    assert (report["samples"], report["settings"]["samples"]) == (3, 64)
    assert "has only 3 images" in result.err


@pytest.mark.parametrize("dtype", [slow("float64"), "bfloat16"])
def test_other_solver_types(run, dtype: str) -> None:
    options = ("--layers", "*.0.*", "--dtype", dtype, "--output", "out", "--json")
    result = run("prune", VIT, "--pattern", "2:4", *QUICK, *options)
    assert result.code == 0
    assert json.loads(result.out)["dtype"] == dtype
    assert {tensor.dtype for tensor in tensors_of(Path("out")).values()} == {torch.float32}


def test_the_papers_settings_with_options_over_them(run) -> None:
    options = ("--effort", "paper", *QUICK, "--layers", "*0.mlp.fc2", "--json")
    settings = json.loads(run("prune", VIT, "--pattern", "2:4", *options).out)["settings"]
    assert (settings["k"], settings["samples"], settings["solver"]["curvature"]) == (1, 64, "hessian")


@pytest.mark.slow
def test_pack_and_unpack(run) -> None:
    """What `prune` makes goes there and back; what `prune --format packed` makes is read by every command."""
    run("prune", VIT, "--pattern", "2:4", *ALONE, "--output", "out", "--quiet")
    packing = run("pack", "out", "packed", "--json")
    sizes = json.loads(packing.out)
    assert (packing.code, sizes["output"]) == (0, "packed")
    assert sizes["bytes_after"] < 0.6 * sizes["bytes_before"]  # embeddings and header are dense
    unpacking = run("unpack", "packed", "again")
    assert unpacking.code == 0
    assert re.search(r"^Weights: 0\.\d+ MB in packed, 0\.\d+ MB in again", unpacking.out)
    for path in Path("out").iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name

    options = ("--eval-data", DIGITS, "--output", "small", "--format", "packed", "--json")
    result = run("prune", VIT, "--pattern", "2:4", *ALONE, *options)
    report = json.loads(result.out)
    assert not Path("small/model.safetensors").exists()
    assert json.loads(run("inspect", "small", "--json").out)["pattern_ok"] is True
    assert json.loads(run("eval", "small", "--data", DIGITS, "--json", "--confusions").out) == report["pruned"]

    for arguments in (
        ("pack", "packed", "x"),
        ("unpack", "out", "x"),
        ("pack", "nowhere", "x"),
        ("pack", "out", "out"),
    ):
        failed = run(*arguments)
        assert failed.code == 1
        assert failed.err.startswith("Error: ")
    assert not Path("x").exists()


def test_version_and_help(run) -> None:
    result = run("--version")
    assert (result.code, result.out.strip()) == (0, __version__)
    names = ("prune", "eval", "inspect", "probe", "finetune", "attention", "pack", "unpack", "demo")
    for command in ((), *((name,) for name in names)):
        result = run(*command, "--help")
        assert result.code == 0
        assert "Usage:" in result.out
    assert "prune" in run().out


def test_prune_within_a_budget_of_memory(run) -> None:
    budget = psutil.Process().memory_info().rss / 1e9 + 1
    assert run("prune", RESNET, "--pattern", "2:4", *QUICK, "--memory", budget, "--set", "joint_steps=3").code == 0
    assert run("inspect", "resnet_digits-2to4").code == 0

    result = run("prune", RESNET, "--pattern", "2:4", *QUICK, "--memory", "0.1", "--output", "refused")
    assert result.code != 0
    assert "the libraries and the model alone take" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_bench_without_a_gpu(run) -> None:
    run("prune", VIT, "--pattern", "2:4", *ALONE, "--output", "out")
    result = run("bench", "out")
    assert result.code == 0
    assert "Not measured: 2:4 kernels need an NVIDIA GPU, and this is a CPU." in result.out
    assert "24 of 25 Linear layers qualify" in result.out
    found = json.loads(run("bench", "out", "--json").out)
    assert (found["supported"], len(found["sparse_layers"]), found["batches"]) == (False, 24, [])
    wrong = run("bench", "out", "--batch-sizes", "1,many")
    assert wrong.code == 1
    assert "Batch sizes '1,many'" in wrong.err


def test_eval_counts_confusions_where_it_is_asked_to(run) -> None:
    found = json.loads(run("eval", VIT, "--data", DIGITS, "--json").out)
    assert found.keys() == {"top1", "top5", "images", "method"}
    counted = json.loads(run("eval", VIT, "--data", DIGITS, "--json", "--confusions").out)
    assert sum(counted.pop("confusion").values()) == counted["images"] == 597
    assert counted == found


@pytest.mark.parametrize("text", ["*.1.mlp.*,vit.layers.0.mlp.fc2", "['*.1.mlp.*', vit.layers.0.mlp.fc2]"])
def test_names_of_layers_by_set(run, text: str) -> None:
    result = run("prune", VIT, "--pattern", "2:4", *ALONE, "--set", f"layers={text}", "--json")
    assert result.code == 0, result.err
    names = [layer["name"] for layer in json.loads(result.out)["layers"]]
    assert names == ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"]


JOBS: dict[str, tuple[Callable[..., object], set[str]]] = {
    "prune": (snows_hf.prune, {"config", "no_update", "report", "push_to", "private"}),
    "eval": (snows_hf.evaluate, {"confusions", "prompt", "reference"}),
    "inspect": (snows_hf.inspect, {"model"}),
    "sensitivity": (snows_hf.sensitivity, {"samples", "plot"}),
    "finetune": (snows_hf.finetune, set()),
    "probe": (snows_hf.probe, set()),
    "attention": (snows_hf.attention, set()),
    "report": (snows_hf.report, set()),
    "compare": (snows_hf.compare, set()),
    "train": (snows_hf.train, set()),
    "pack": (snows_hf.pack, {"model"}),
    "unpack": (snows_hf.unpack, {"model"}),
    "push": (snows_hf.push, set()),
    "bench": (bench, {"model"}),
    "demo": (snows_hf.prune, set()),
}
"""What each command calls, and which of its options are its own, or are given under another name."""


def test_every_option_reaches_its_job() -> None:
    """An option that the job does not take would be passed to nobody."""
    assert {command.name for command in app.registered_commands} == JOBS.keys()
    for command in app.registered_commands:
        job, own = JOBS[str(command.name)]
        options = signature(command.callback).parameters
        settings = {name for name in options if name in PruneConfig.known() | FinetuneConfig.own() | TrainConfig.own()}
        takes = signature(job).parameters
        handed = options.keys() - {"as_json", "quiet", "pairs"} - own - (settings if "settings" in takes else set())
        assert handed <= takes.keys(), command.name
