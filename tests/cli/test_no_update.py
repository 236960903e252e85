"""Criteria from the command line: alone (``--no-update``) and under SNOWS."""

import json
from pathlib import Path

import pytest
import torch
from embedded import DIGITS, RESNET, VIT, copy_of, tensors_of, write_tensors
from quick import rest_slow

from snows_hf.masks.criteria import CRITERIA, needs_labels
from snows_hf.patterns import NM


QUICK = ("--data", DIGITS, "--samples", 40, "--k", 1, "--effort", "quick", "--json")
MEASURED = (*QUICK, "--eval-data", DIGITS)


SOME = {"alps", "sparsegpt", "magnitude", "hp", "grasp", "fd"}


@pytest.mark.parametrize("mask", rest_slow(sorted(CRITERIA), SOME))
def test_every_criterion_alone(run, mask: str) -> None:
    result = run("prune", RESNET, "--pattern", "2:4", "--mask", mask, "--no-update", *QUICK, "--output", "out")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["update"], report["settings"]["mask"], report["later_sweeps"]) == (False, mask, [])
    assert report["criterion"]["labels"] == needs_labels(mask)
    assert report["criterion"]["own_update"] == (mask in ("obc", "sparsegpt", "alps"))
    assert ("variance" in report["criterion"]) == mask.startswith(("hd", "hp", "hts"))
    assert len(report["layers"]) == 8
    before, after = tensors_of(RESNET), tensors_of(Path("out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 8
    for name in changed:
        assert NM(2, 4).holds(after[name])
        assert not torch.signbit(after[name][after[name] == 0]).any()  # packed files would store them
        kept = after[name] != 0
        moved = not torch.equal(after[name][kept], before[name][kept])
        assert moved == report["criterion"]["own_update"]


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["magnitude", "obc"])
def test_what_was_measured_alone_is_the_same_under_snows(run, mask: str) -> None:
    reports = {}
    for name, options in (("alone", ["--no-update"]), ("snows", [])):
        result = run("prune", VIT, "--pattern", "1:4", "--mask", mask, *MEASURED, *options, "--output", name)
        reports[name] = json.loads(result.out)
    alone, snows = reports["alone"], reports["snows"]
    assert alone["masked"] == alone["pruned"] == snows["masked"]
    assert alone["dense"] == snows["dense"]
    assert snows["pruned"]["top1"] > alone["pruned"]["top1"]
    cards = {name: Path(name, "README.md").read_text() for name in reports}
    assert "SNOWS** |" in cards["snows"] and "SNOWS** |" not in cards["alone"]
    assert "--no-update" in cards["alone"] and "--no-update" not in cards["snows"]
    assert all(f"`{mask}`" in card for card in cards.values())
    assert all(("the weights that `obc` makes" in card) == (mask == "obc") for card in cards.values())


def test_labels_are_read_where_a_criterion_needs_them(run) -> None:
    for mask, words in (("snip", "labels read by the mask criterion"), ("wanda", "labels unused")):
        run("prune", VIT, "--pattern", "2:4", "--mask", mask, *QUICK, "--output", mask)
        card = Path(mask, "README.md").read_text()
        assert words in card
        assert ("no labels" in card) == (mask == "wanda")


def test_no_update_for_people(run) -> None:
    options = ["--data", DIGITS, "--samples", 40, "--eval-data", DIGITS, "--output", "out", "--mask", "sparsegpt"]
    result = run("prune", RESNET, "--pattern", "2:4", "--no-update", *options)
    assert result.code == 0
    assert "mask alone" in result.out
    assert "SNOWS" not in result.out
    assert "8 layers pruned to 2:4 (50.0 % zeros) by sparsegpt" in result.out


@pytest.mark.parametrize("mask", ["magnitude", "sparsegpt"])
def test_no_sweep_and_no_joint_step_leave_what_the_criterion_made(run, mask: str) -> None:
    given = ("prune", VIT, "--pattern", "2:4", "--mask", mask, *QUICK)
    assert run(*given, "--no-update", "--output", "alone").code == 0
    assert run(*given, "--set", "sweeps=0", "--output", "out").code == 0
    alone, out = tensors_of(Path("alone")), tensors_of(Path("out"))
    assert all(torch.equal(alone[name], out[name]) for name in alone)
    fitted, card = mask == "sparsegpt", Path("out", "README.md").read_text()  # whose weights are its own
    assert json.loads(Path("out", "snows_config.json").read_text())["update"] == fitted
    assert ("fitted, layer after layer" in card) == fitted and ("took no step" in card) != fitted


def test_where_alps_fits_every_layer_it_is_held_against_the_zeros_alone(run) -> None:
    """No step follows: what ALPS made is the result, and what came before are the dense weights under its mask."""
    result = run("prune", VIT, "--pattern", "1:4", *MEASURED, "--set", "permute=false", "--output", "out")
    report = json.loads(result.out)
    assert result.code == 0 and report["settings"]["sweeps"] == 0
    before, after = tensors_of(VIT), tensors_of(Path("out"))
    pruned = [name for name in before if not torch.equal(before[name], after[name])]
    zeros = copy_of(VIT, Path("zeros"))
    write_tensors(zeros, before | {name: before[name].where(after[name] != 0, 0) for name in pruned})
    measured = json.loads(run("eval", zeros, "--data", DIGITS, "--split", "test", "--json").out)
    assert report["masked"]["top1"] == pytest.approx(measured["top1"])
    assert report["masked"]["top1"] < report["pruned"]["top1"]
    card = Path("out", "README.md").read_text()
    assert "| zeros alone |" in card and "fitted, layer after layer" in card and "K = " not in card
