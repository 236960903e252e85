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

    dense = run("finetune", RESNET, *options, "--output", "x")
    assert dense.code == 0
    assert "dense on 597 images" in dense.out and "no weight held at zero" in " ".join(dense.out.split())
    for command in ("report", "compare"):
        refused = run(command, "x")
        assert (refused.code, "x is what `snows-hf finetune` wrote" in refused.err) == (1, True)
        assert "again" not in refused.err
