"""``snows-hf train`` from the command line."""

import json
from pathlib import Path

import pytest
from embedded import DIGITS, RESNET


QUICK = ("--data", DIGITS, "--samples", 60, "--epochs", 1, "--output", "out")


def test_a_trained_network_that_eval_and_inspect_read(run) -> None:
    options = ("--pattern", "0.9", "--mask", "snip", "--warm-up-bn", 1, "--eval-data", DIGITS, *QUICK)
    result = run("train", RESNET, *options, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    for line in ("untrained", "Warming up batch norms on 1 batches", "Choosing masks by snip", "Epoch 1/1: loss"):
        assert line in result.err
    assert report["collapse"].keys() == {"layers", "connected"} and len(report["losses"]) == 1
    assert json.loads(run("eval", "out", "--data", DIGITS, "--json", "--confusions").out) == report["accuracy"]
    found = json.loads(run("inspect", "out", "--json").out)
    assert (found["pattern"], found["pattern_ok"]) == ("0.9", True)
    for command in (("report", "out"), ("compare", "out")):
        refused = run(*command)
        assert (refused.code, "out is what `snows-hf train` wrote" in refused.err) == (1, True)
        assert "Prune again" not in refused.err


def test_collapse_is_told(run) -> None:
    result = run("train", RESNET, "--pattern", "0.9999", *QUICK)
    assert result.code == 0 and "Layer collapse: resnet.encoder" in result.out and "no weight is left" in result.out


def test_an_unknown_architecture(run) -> None:
    result = run("train", "resnet21_cifar", *QUICK)
    assert (result.code, result.out) == (1, "") and "no architecture that timm knows" in result.err
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_smaller_network_from_the_beginning(run) -> None:
    given = ("--pattern", "channels:0.5+0.5", "--mask", "hp", "--warm-up-bn", 1, "--eval-data", DIGITS, *QUICK)
    refused = run("train", RESNET, *given)
    assert refused.code == 1 and "--allow-custom" in refused.err and not Path("out").exists()
    result = run("train", RESNET, *given, "--allow-custom", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["pattern"] == "channels:0.5+0.5" and report["custom"]
    assert all(unit["after"] * 2 == unit["before"] for unit in report["units"].values())
    card = Path("out/README.md").read_text()
    assert "whole units are gone, and" in card and "of which 50.0 %" in card and "**Only snows-hf loads it**" in card
    assert json.loads(run("eval", "out", "--data", DIGITS, "--json", "--confusions").out) == report["accuracy"]
    found = json.loads(run("inspect", "out", "--json").out)
    assert (found["pattern"], found["pattern_ok"]) == ("channels:0.5+0.5", True)
