"""Allocation and sensitivity from the command line, and the proof of each layer's own pattern."""

import json
from pathlib import Path

import pytest
import torch
from embedded import DIGITS, RESNET, VIT, tensors_of, write_tensors

from snows_hf.patterns import NM


QUICK = ("--data", DIGITS, "--samples", 32, "--k", 1, "--mask", "sparsegpt", "--json")


def test_every_layer_its_own_n_m_proven_by_inspect(run) -> None:
    options = ("--pattern", "1:4,2:4,dense", "--sparsity", 0.55, *QUICK)
    result = run("prune", RESNET, *options, "--no-update", "--output", "out")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    patterns = report["allocation"]["patterns"]
    assert report["allocation"]["kind"] == "sensitivity"
    assert set(patterns.values()) <= {"1:4", "2:4", "dense"} and len(set(patterns.values())) > 1
    tensors = tensors_of(Path("out"))
    zeros = sum(int((tensors[name] == 0).sum()) for name in patterns)
    assert report["sparsity"] == zeros / sum(tensors[name].numel() for name in patterns) >= 0.55
    left = {name for name, pattern in patterns.items() if pattern == "dense"}
    assert all(torch.equal(tensors[name], tensors_of(RESNET)[name]) for name in left)
    card = Path("out", "README.md").read_text()
    assert "1:4,2:4,dense" in card and "chosen by its sensitivity under a budget of weights" in card

    found = json.loads(run("inspect", "out", "--json").out)
    assert found["pattern_ok"] and found["pattern"] == "1:4,2:4,dense"
    for layer in found["layers"]:
        assert {patterns[name] for name in layer["parameters"]} == {layer["pattern"] or "dense"}
        assert layer["pattern_ok"] is (None if layer["pattern"] is None else True)

    # One weight more than 1:4 allows, which 2:4 would: only the layer's own pattern tells.
    name = next(name for name, pattern in patterns.items() if pattern == "1:4")
    weight = tensors[name]
    group = weight[0, :4, 0, 0]
    group[int((group == 0).nonzero()[0, 0])] = 1.0
    assert NM(2, 4).holds(weight) and not NM(1, 4).holds(weight)
    write_tensors(Path("out"), tensors)
    found = json.loads(run("inspect", "out", "--json").out)
    assert not found["pattern_ok"]
    assert [name in layer["parameters"] for layer in found["layers"]] == [
        layer["pattern_ok"] is False for layer in found["layers"]
    ]


def test_sparsities_of_each_layers_own(run) -> None:
    reports = {}
    for allocation in ("uniform", "global", "sensitivity"):
        options = ("--pattern", 0.8, "--allocation", allocation, "--no-update", *QUICK, "--mask", "magnitude")
        result = run("prune", RESNET, *options, "--output", allocation)
        assert result.code == 0, result.err
        reports[allocation] = json.loads(result.out)
        assert abs(reports[allocation]["sparsity"] - 0.8) < 1e-4
        assert json.loads(run("inspect", allocation, "--json").out)["pattern_ok"]
    assert {round(layer["sparsity"], 2) for layer in reports["uniform"]["layers"]} == {0.8}
    for allocation in ("global", "sensitivity"):
        assert len({round(layer["sparsity"], 2) for layer in reports[allocation]["layers"]}) > 1
    claimed = reports["sensitivity"]["allocation"]["patterns"]
    for layer in reports["sensitivity"]["layers"]:
        assert abs(layer["sparsity"] - float(claimed[layer["parameters"][0]])) < 1e-9


def test_what_does_not_go_together_is_said_before_anything_is_loaded(run) -> None:
    result = run("prune", "absent", "--pattern", "1:4,2:4", "--data", DIGITS, "--output", "out")
    assert (result.code, result.out) == (1, "")
    assert "Add --sparsity" in result.err and not Path("out").exists()


@pytest.mark.slow
def test_sensitivity_as_a_table_as_json_and_as_a_plot(run) -> None:
    options = ("--patterns", "1:4,2:4", "--data", DIGITS, "--samples", 24, "--layers", "*layers.0*")
    result = run("sensitivity", VIT, *options, "--json", "--plot", "plot.png")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["patterns"] == ["1:4", "2:4"] and report["samples"] == 24
    assert [layer["name"].rpartition(".")[2] for layer in report["layers"]] == ["qkv", "o_proj", "fc1", "fc2"]
    for layer in report["layers"]:
        assert [(c["pattern"], c["sparsity"]) for c in layer["candidates"]] == [("1:4", 0.75), ("2:4", 0.5)]
        assert layer["candidates"][0]["loss"] > layer["candidates"][1]["loss"] > 0
        assert layer["flops"] > 0
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    people = run("sensitivity", VIT, *options, "--repair-steps", 0)
    assert "2:4" in people.out and "fc2" in people.out
    assert run("sensitivity", VIT, *options, "--quiet").out == ""


def test_a_plot_that_could_not_be_made_is_refused_first(run) -> None:
    result = run("sensitivity", "absent", "--plot", "plot.docx")
    assert result.code == 1 and "expected a name that ends in one of" in result.err
    result = run("sensitivity", VIT, "--data", DIGITS, "--patterns", "1:5", "--quiet")
    assert result.code == 1 and "fits no layer" in result.err
