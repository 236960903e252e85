"""Biases that move, from a checkpoint to the folder that is saved of it."""

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from embedded import DIGITS, RESNET, VIT, tensors_of
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from snows_hf import inspect, prune
from snows_hf.adapters import build_chain
from snows_hf.hub.load import load
from snows_hf.runtime.run import Progress


QUICK: dict[str, Any] = {"data": str(DIGITS), "samples": 160, "k": 2, "layer_steps": 1, "mask": "magnitude"}
QUICK |= {"biases": True}


@pytest.mark.slow
@pytest.mark.parametrize("source", [VIT, RESNET], ids=["vit", "resnet"])
def test_moved_biases_are_saved(source: Path, tmp_path: Path) -> None:
    """Stock transformers reads them; whatever is neither a pruned weight nor its bias keeps its bits."""
    result = prune(str(source), "2:4", output=tmp_path / "out", eval_data=str(DIGITS), **QUICK)
    models = [AutoModelForImageClassification.from_pretrained(folder) for folder in (tmp_path / "out", source)]
    stock, dense = (model.state_dict() for model in models)
    checkpoint = load(str(source))
    biases = build_chain(checkpoint.model, checkpoint.image()).biases
    assert {*biases} == {*result.report["pruned_parameters"]}
    changed = {name for name, tensor in stock.items() if not torch.equal(tensor, dense[name])}
    layers = [layer for layer in result.report["layers"] if layer["status"] == "improved"]
    improved = [name for layer in layers for name in layer["parameters"]]
    assert improved and changed == {*biases, *map(biases.__getitem__, improved)}
    found = inspect(tmp_path / "out")
    assert found["pattern_ok"] and found["pattern"] == "2:4"
    assert result.report["fidelity"]["pruned"]["divergence"] == pytest.approx(divergence(source, *models), rel=1e-3)


@torch.no_grad()
def divergence(source: Path, pruned: nn.Module, dense: nn.Module) -> float:
    """KL(dense ‖ pruned), the mean over the test images."""
    rows = parquet.read_table(DIGITS / "test.parquet").to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    inputs = AutoImageProcessor.from_pretrained(source)(images=images, return_tensors="pt")
    p, d = (model.eval()(**inputs).logits.double().log_softmax(1) for model in (pruned, dense))
    return float(F.kl_div(p, d, log_target=True, reduction="batchmean"))


@pytest.mark.slow
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
