"""Layers that a pattern does not fit make up for those before them: depthwise convolutions, in a real prune."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from embedded import DIGITS

from snows_hf import prune
from snows_hf.hub.load import load


QUICK: dict[str, Any] = {"data": str(DIGITS), "samples": 40, "sweeps": 0, "joint_steps": 0, "batch_size": 32}


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with weights large enough for outputs to depend on the images."""
    folder = tmp_path_factory.mktemp("efficientnet")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.orthogonal_(parameter)
    model.pretrained_cfg |= {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def changed(folder: Path, **given: Any) -> tuple[set[str], dict[str, Any]]:
    """The tensors that a prune has changed, and its report."""
    result = prune(folder, "2:4", **QUICK | given)
    before, after = load(folder).model.state_dict(), result.model.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}, result.report


def test_what_does_not_fit_is_fitted_and_nothing_else_moves(efficientnet: Path) -> None:
    moved, report = changed(efficientnet)
    unfit = [f"{layer['name']}.weight" for layer in report["dense_layers"]]
    assert report["fitted_dense"] and set(report["fitted_dense"]) <= set(unfit)
    assert moved == {*report["pruned_parameters"], *report["fitted_dense"]}
    assert all("conv_dw" in name for name in report["fitted_dense"])


@pytest.mark.parametrize("given", [{"fit_dense": False}, {"update": False}, {"mask": "sparsegpt"}])
def test_where_it_is_not_asked_for_the_bits_are_the_same(efficientnet: Path, given: dict[str, Any]) -> None:
    moved, report = changed(efficientnet, **given)
    assert report["fitted_dense"] == [] and moved == set(report["pruned_parameters"])


def test_layers_that_are_named_are_pruned_alone(efficientnet: Path) -> None:
    moved, report = changed(efficientnet, layers=["blocks.1.*"])
    assert report["fitted_dense"] == [] and all(name.startswith("blocks.1.") for name in moved)


@pytest.mark.parametrize("fit_dense", [True, False])
def test_the_card_says_so(efficientnet: Path, tmp_path: Path, fit_dense: bool) -> None:
    _, report = changed(efficientnet, fit_dense=fit_dense, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("were fitted, too" in card) == fit_dense
    assert all(f"`{name}`" in card for name in report["fitted_dense"])


@pytest.mark.slow
def test_joint_steps_after_it_are_judged_by_the_dense_network(efficientnet: Path) -> None:
    """They begin with what a run without steps ends with."""
    _, report = changed(efficientnet, joint_steps=2, eval_data=str(DIGITS))
    _, alone = changed(efficientnet, eval_data=str(DIGITS))
    assert report["fidelity"]["masked"] == alone["fidelity"]["pruned"]
    (joint,) = report["later_sweeps"]
    assert 0 < joint["loss_pruned"] <= joint["loss_start"]
