"""What needs no model, images or device comes without the large libraries: help, versions, and every refusal."""

import json
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from embedded import DIGITS, NO_HUB, VIT

from snows_hf.cli.prune import prune


MAIN = """
import contextlib, io, json, sys
from snows_hf.cli import main

outcomes = []
for arguments in json.load(sys.stdin):
    sys.argv = ["snows-hf", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            outcomes.append((leaving.code or 0, out.getvalue(), err.getvalue()))
loaded = [name for name in ("torch", "transformers", "timm", "datasets", "accelerate") if name in sys.modules]
print(json.dumps([outcomes, loaded]))
"""


def run_all(folder: Path, commands: list[list[object]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every command, all run in one new process that must load no large library."""
    given = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", MAIN], input=given, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes, loaded = json.loads(done.stdout)
    assert loaded == []
    return outcomes


COMMANDS = [
    "prune", "eval", "inspect", "sensitivity", "finetune", "probe", "attention", "report", "compare", "train", "pack",
    "unpack", "push", "bench", "demo",
]  # fmt: skip


def test_help_and_version(elsewhere: Path) -> None:
    outcomes = run_all(elsewhere, [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
    assert [code for code, _, _ in outcomes] == [0] * len(outcomes)
    for name in COMMANDS:
        assert name in outcomes[1][1]


PRUNE = ["prune", VIT, "--data", DIGITS]
NM, SET = [*PRUNE, "--pattern", "2:4"], [*PRUNE, "--pattern", "1:4,2:4,dense"]
SENSITIVITY = ["sensitivity", VIT, "--data", DIGITS]
FINETUNE = ["finetune", VIT, "--data", DIGITS, "--output", "o"]
TRAIN = ["train", "resnet20_cifar", "--data", DIGITS, "--output", "o"]
REFUSALS = [
    ([*PRUNE, "--pattern", "4:2"], "0 < N < M"),
    ([*PRUNE, "--pattern", "1.5"], "between 0 and 1"),
    (PRUNE, "Neither a pattern nor a speed"),
    ([*PRUNE, "--faster", 1], "expected a number above 1"),
    ([*NM, "--faster", 1.5], "chooses the pattern itself"),
    ([*PRUNE, "--pattern", "1:4,2:4", "--sparsity", 0.9], "have 0.75"),
    ([*SET], "Add --sparsity"),
    ([*SET, "--sparsity", 0.6, "--allocation", "uniform"], "Allocation 'uniform' takes one pattern"),
    ([*SET, "--sparsity", 0.6, "--mask", "m.safetensors"], "A mask file has decided"),
    ([*NM, "--sparsity", 0.5], "goes with a set"),
    ([*NM, "--set", "budget=flops"], "Budget 'flops' goes with"),
    ([*PRUNE, "--pattern", "0.5", "--set", "permute=true"], "Channels cannot be ordered for 0.5"),
    ([*NM, "--mask", "sparkle"], "Mask criterion 'sparkle'"),
    ([*NM, "--mask", "m.safetensors"], "Mask file m.safetensors does not exist"),
    ([*NM, "--set", "colour=red"], "Unknown setting 'colour'"),
    ([*NM, "--set", "damping=much"], "Setting damping = 'much': expected a number ≥ 0"),
    ([*NM, "--config", "no.yaml"], "Settings file no.yaml cannot be read"),
    ([*NM, "--k", -1], "Setting k = -1"),
    ([*NM, "--effort", "fast"], "Effort 'fast'"),
    ([*NM, "--device", "tpu"], "Device 'tpu'"),
    ([*NM, "--dtype", "int8"], "dtype 'int8'"),
    ([*NM, "--format", "zip"], "Format 'zip'"),
    ([*NM, "--memory", 0], "Setting memory = 0.0"),
    ([*NM, "--eval-data", DIGITS, "--eval-split", "train"], "the same split 'train'"),
    ([*NM, "--output", VIT], "exists and is not empty"),
    ([*NM, "--push-to", "nobody"], "Cannot push to 'nobody'"),
    (["prune", "./nothing", "--pattern", "2:4"], "Model folder nothing does not exist"),
    (["prune", VIT, "--pattern", "2:4", "--data", "./nothing"], "Data folder ./nothing does not exist"),
    ([*SENSITIVITY, "--plot", "none/x.png"], "Plot none/x.png: its folder does not exist"),
    ([*SENSITIVITY, "--plot", "x.doc"], "Plot x.doc: expected a name that ends in"),
    ([*SENSITIVITY, "--mask", "sparkle"], "Mask criterion 'sparkle'"),
    ([*SENSITIVITY, "--patterns", "2:4,half"], "Pattern 'half'"),
    ([*FINETUNE, "--lr", 0], "Setting lr = 0.0: expected a number > 0"),
    ([*FINETUNE, "--set", "crop=1"], "Setting crop = 1: expected a number ≥ 0 and < 1"),
    ([*FINETUNE, "--eval-data", DIGITS, "--eval-split", "train"], "the same split 'train'"),
    ([*TRAIN, "--pattern", "0.9", "--layer-cap", 0.5], "Layer cap 0.5"),
    ([*TRAIN, "--set", "schedule=linear"], "Setting schedule = 'linear': expected 'cosine' or 'step'"),
    (["eval", VIT, "--data", DIGITS, "--device", "tpu"], "Device 'tpu'"),
    (["inspect", "./nothing"], "Model folder nothing does not exist"),
    (["probe", VIT, "--data", DIGITS, "--samples", 1], "samples = 1"),
    (["attention", VIT, "--data", DIGITS, "--output", "a.jpg"], "ends in .png"),
    *(
        (["attention", VIT, "--data", DIGITS, "--output", "a.png", f"--{what}", count], f"{what} = {count}: expected")
        for what in ("samples", "images")
        for count in (-5, 0)
    ),
    (["report", "nobody/nothing"], "Give --output"),
    (["compare", VIT, "--output", "a.pdf"], "ends in .html"),
    (["pack", VIT, VIT], "exists and is not empty"),
    (["bench", VIT, "--batch-sizes", "1,0"], "Batch sizes [1, 0]"),
    (["demo", "--pattern", "half"], "Pattern 'half'"),
    (["demo", "--output", VIT], f"Output {VIT} exists and is not empty.\nChoose another --output, or remove it."),
    ([*NM, "--set", "layers=*.fc1", "--set", "layer=*.fc2"], "Unknown setting 'layer'.\nKnown: allocation, "),
    ([*FINETUNE, "--set", "k=3"], "Unknown setting 'k'.\nKnown: batch_size, "),
]


def test_refusals(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)
    for (arguments, expected), (code, out, err) in zip(
        REFUSALS, run_all(elsewhere, [arguments for arguments, _ in REFUSALS]), strict=True
    ):
        assert (code, out) == (1, ""), arguments
        assert err.startswith("Error: ") and expected in err, (arguments, err)
    assert list(elsewhere.iterdir()) == []


def test_the_help_of_prune_is_short_and_names_the_rest(run) -> None:
    """The other options, which are accepted, and every setting by --set."""
    shown = run("prune", "--help").out
    table = shown.partition("For more:")[0]
    options = [word for line in table.splitlines() for word in line.split()[:3] if word.startswith("--")]
    assert len(set(options)) <= 12
    for part in ("What to prune", "Images", "Result", "512", "for N:M and in ViTs alps;", "magnitude)", "NAME=VALUE"):
        assert part in table
    accepted = {f"--{name.replace('_', '-')}" for name in signature(prune).parameters}
    assert {name for name in accepted if name not in shown} == {"--model", "--pairs", "--as-json"}


def test_precedence_of_settings(run, elsewhere: Path) -> None:
    """Effort, below the file, below --set, below an option of its own."""
    Path("s.yaml").write_text("k: 1\nsamples: 9\nseed: 3\nbeta: 1e-4\n")
    options = ["--config", "s.yaml", "--set", "samples=8", "--set", "seed=4", "--seed", 5, "--set", "cg_max_iter=2"]
    result = run("prune", VIT, "--pattern", "2:4", "--data", DIGITS, *options, "--output", "o", "--json", "--quiet")
    assert result.code == 0, result.err
    made = json.loads(result.out)["settings"]
    assert (made["k"], made["samples"], made["seed"]) == (1, 8, 5)
    assert (made["solver"]["beta"], made["solver"]["cg_max_iter"], made["solver"]["passes"]) == (1e-4, 2, 8)
