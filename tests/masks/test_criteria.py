"""What holds for every criterion: valid masks, nothing changed, clear words where something is missing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from embedded import DIGITS, VIT
from hypothesis import given as given_examples, settings, strategies as st
from networks import Small, evidence
from torch import nn

import snows_hf
from snows_hf.errors import MaskError, NumericsError
from snows_hf.masks.choose import choose
from snows_hf.masks.criteria import CRITERIA, needs_labels
from snows_hf.patterns import parse_pattern


@st.composite
def networks(draw: st.DrawFn) -> Small:
    """A first layer with 4 inputs, one of each kind in the middle, and a classifier."""
    torch.manual_seed(draw(st.integers(0, 100)))
    kind = draw(st.sampled_from(["linear", "conv", "grouped conv"]))
    if kind == "linear":
        return Small(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)).double().eval()
    groups = draw(st.sampled_from([2, 4])) if kind == "grouped conv" else 1
    options = {
        "kernel_size": draw(st.sampled_from([1, 2, (1, 3)])),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "dilation": draw(st.integers(1, 2)),
    }
    middle = nn.Conv2d(4 * groups, 4, groups=groups, **options)
    return Small(nn.Conv2d(4, 4 * groups, 3, padding=1), middle, nn.Linear(4, 3)).double().eval()


@pytest.mark.parametrize("mask", sorted(CRITERIA))
@given_examples(model=networks(), pattern=st.sampled_from(["2:4", "1:4", "1:2", "0.3", "0.75"]))
@settings(max_examples=8, deadline=None)
def test_masks_obey_the_pattern(mask: str, model: Small, pattern: str):
    given = evidence(model, pattern, mask, count=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choice = choose(given)
    assert choice.masks.keys() == given.weights.keys()
    for name, kept in choice.masks.items():
        assert kept.dtype == torch.bool
        assert kept.shape == given.weights[name].shape
        assert given.pattern.holds(kept)
        if ":" in pattern:
            assert float((~kept).sum()) == pytest.approx(given.pattern.sparsity * kept.numel())
    if ":" not in pattern:
        total = sum(kept.numel() for kept in choice.masks.values())
        zeros = sum(int((~kept).sum()) for kept in choice.masks.values())
        assert zeros == round(float(pattern) * total)
    for name, weight in choice.weights.items():
        assert not weight[~choice.masks[name]].any()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mask", sorted(CRITERIA))
def test_layers_that_the_pattern_does_not_fit_are_left_out(mask: str):
    torch.manual_seed(0)
    model = Small(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 1), nn.Linear(8, 3)).double().eval()
    assert list(choose(evidence(model, "2:4", mask)).masks) == ["layers.0.weight", "layers.2.weight"]


@pytest.mark.parametrize("mask", sorted(CRITERIA))
def test_same_seed_same_masks(mask: str):
    torch.manual_seed(0)
    model = Small(nn.Linear(4, 8), nn.Linear(8, 3)).double().eval()
    first, second = (choose(evidence(model, "2:4", mask)).masks for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_random_depends_on_the_seed():
    model = Small(nn.Linear(4, 64), nn.Linear(64, 3)).double().eval()
    first, second = (choose(evidence(model, "2:4", "random", seed=seed)).masks for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mask", sorted(CRITERIA))
def test_what_is_missing_is_named(mask: str):
    model = Small(nn.Linear(4, 8), nn.Linear(8, 3)).double().eval()
    whole = evidence(model, "2:4", mask)
    unlabelled = replace(whole, labels=None)
    if needs_labels(mask):
        with pytest.raises(MaskError, match=f"'{mask}' needs labels"):
            choose(unlabelled)
    else:
        choose(unlabelled)
    if mask in ("magnitude", "random"):
        choose(replace(whole, chain=None, images=None))
        return
    with pytest.raises(MaskError, match=f"'{mask}' needs calibration images"):
        choose(replace(whole, images=None))
    with pytest.raises(MaskError, match=f"'{mask}' needs the network"):
        choose(replace(whole, chain=None))


@pytest.mark.parametrize("mask", [name for name in sorted(CRITERIA) if name not in ("magnitude", "random", "synflow")])
def test_images_that_overflow_are_an_error(mask: str):
    torch.manual_seed(0)
    model = Small(nn.Linear(4, 8), nn.Linear(8, 3)).double().eval()
    given = evidence(model, "2:4", mask)
    with pytest.raises(NumericsError, match=r"numbers.*magnitude"):
        choose(replace(given, images=given.images * torch.nan))


@pytest.mark.parametrize("mask", ["wanda", "sparsegpt", "obc", "alps"])
def test_layers_of_another_kind_are_refused(mask: str):
    model = Small(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 4, 1), nn.Linear(4, 3)).double().eval()
    with pytest.raises(MaskError, match=r"layers\.1\.weight belongs to a ConvTranspose2d.*--layers"):
        choose(evidence(model, "2:4", mask))


@pytest.mark.slow
def test_a_new_criterion_is_one_new_file_and_one_row(tmp_path: Path):
    """A copy of the package with both has it in the command."""
    package = Path(snows_hf.__file__).parent
    shutil.copytree(package, tmp_path / "snows_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "snows_hf/masks/scores/smallest.py").write_text(
        "from ..evidence import Evidence\n\n\n"
        "def smallest(evidence: Evidence):\n"
        "    return {name: -weight.abs() for name, weight in evidence.weights.items()}\n"
    )
    table = tmp_path / "snows_hf/masks/criteria.py"
    row = 'CRITERIA = {\n    "smallest": Criterion("smallest:smallest"),\n'
    table.write_text(table.read_text().replace("CRITERIA = {\n", row, 1))
    command = ("-m", "snows_hf", "prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--mask", "smallest")
    options = ("--no-update", "--samples", 4, "--output", "out", "--quiet")
    done = warm.run(*command, *options, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    dense, pruned = snows_hf.load(str(VIT)).model, snows_hf.load(str(tmp_path / "out")).model
    weight, kept = (model.vit.layers[0].mlp.fc1.weight.detach() for model in (dense, pruned))
    assert torch.equal(kept != 0, parse_pattern("2:4").mask(-weight.abs()))
