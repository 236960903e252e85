"""Biases that move, from a checkpoint to the folder that is saved of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import DIGITS, RESNET, VIT, tensors_of
from transformers import AutoModelForImageClassification

from snows_hf import inspect, prune
from snows_hf.adapters import build_chain
from snows_hf.hub.load import load
from snows_hf.runtime.run import Progress


QUICK: dict[str, Any] = {"data": str(DIGITS), "samples": 32, "k": 1, "layer_steps": 1, "biases": True}


@pytest.mark.parametrize("source", [VIT, RESNET], ids=["vit", "resnet"])
def test_moved_biases_are_saved(source: Path, tmp_path: Path) -> None:
    """Stock transformers reads them; whatever is neither a pruned weight nor its bias keeps its bits."""
    result = prune(str(source), "2:4", output=tmp_path / "out", eval_data=str(DIGITS), **QUICK)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    dense = AutoModelForImageClassification.from_pretrained(source).state_dict()
    checkpoint = load(str(source))
    biases = build_chain(checkpoint.model, checkpoint.image()).biases
    assert {*biases} == {*result.report["pruned_parameters"]}
    changed = {name for name, tensor in stock.items() if not torch.equal(tensor, dense[name])}
    layers = [layer for layer in result.report["layers"] if layer["status"] == "improved"]
    improved = [name for layer in layers for name in layer["parameters"]]
    assert improved and changed == {*biases, *map(biases.__getitem__, improved)}
    found = inspect(tmp_path / "out")
    assert found["pattern_ok"] and found["pattern"] == "2:4"
    fidelity = result.report["fidelity"]
    assert fidelity["pruned"]["divergence"] < fidelity["masked"]["divergence"]


def test_a_prune_that_is_broken_off_gives_the_same_bits(tmp_path: Path) -> None:
    class BrokenOffError(Exception):
        pass

    def break_off(progress: Progress) -> None:
        if progress.stage == "Layers" and progress.done >= 4:
            raise BrokenOffError

    given = {"eval_data": str(DIGITS), **QUICK}
    prune(str(RESNET), "2:4", output=tmp_path / "whole", **given)
    with pytest.raises(BrokenOffError):
        prune(str(RESNET), "2:4", output=tmp_path / "out", on_progress=break_off, **given)
    assert prune(str(RESNET), "2:4", output=tmp_path / "out", **given).report["resumed"]
    whole, again = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
