"""``snows-hf finetune``: results, messages, exit codes."""

import json
from pathlib import Path

from embedded import DIGITS, RESNET


def test_finetune(run) -> None:
    pruning = ("prune", RESNET, "--pattern", "0.7", "--data", DIGITS, "--samples", 8, "--no-update")
    assert run(*pruning, "--output", "mask").code == 0
    options = ("--data", DIGITS, "--samples", 128, "--epochs", 1, "--no-flip", "--eval-data", DIGITS)
    result = run("finetune", "mask", *options, "--output", "out")
    assert result.code == 0
    assert "retrained" in result.out
    assert "1 epochs on 128 images" in result.out
    assert "Epoch 1/1: learning rate 0.003" in result.err

    again = json.loads(run("finetune", "mask", *options, "--output", "again", "--json").out)
    assert again["output"] == "again"
    assert again["finetune"]["settings"]["flip"] is False
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert (
        json.loads(run("eval", "again", "--data", DIGITS, "--json", "--confusions").out) == again["finetune"]["after"]
    )

    failed = run("finetune", RESNET, *options, "--output", "x")
    assert failed.code == 1
    assert failed.err.splitlines()[-2].startswith("Error: ")
    assert "--no-update" in failed.err
    assert not Path("x").exists()
