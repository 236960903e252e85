"""Masks by criterion and by file."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from snows_hf.errors import ConfigError, MaskError, PatternError, SnowsError
from snows_hf.masks.choose import choose_masks, load_masks, split_by_fit
from snows_hf.masks.criteria import CRITERIA, Criterion
from snows_hf.patterns import NM, Unstructured


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = {"stem": randn(4, 3, 3, 3), "conv": randn(4, 8, 3, 3, seed=1), "linear": randn(6, 12, seed=2)}


def test_weights_that_the_pattern_does_not_fit_stay_dense():
    assert split_by_fit(WEIGHTS, NM(2, 4)) == (["conv", "linear"], ["stem"])
    assert split_by_fit(WEIGHTS, Unstructured(0.5)) == (["stem", "conv", "linear"], [])
    masks = choose_masks(WEIGHTS, NM(2, 4), "magnitude")
    assert list(masks) == ["conv", "linear"]
    for name, mask in masks.items():
        assert torch.equal(mask, NM(2, 4).mask(WEIGHTS[name].abs()))


def test_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(PatternError, match=r"2:16 fits no layer.*3, 8, 12"):
        choose_masks(WEIGHTS, NM(2, 16), "magnitude")


def test_unstructured_masks_rank_all_layers_together():
    masks = choose_masks(WEIGHTS, Unstructured(0.5), "magnitude")
    total = sum(weight.numel() for weight in WEIGHTS.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.5 * total)


@pytest.fixture
def reverse_magnitude(monkeypatch: pytest.MonkeyPatch) -> str:
    """A criterion that exists only during one test."""
    module = ModuleType("reversed")
    module.reverse = lambda evidence: {name: -weight.abs() for name, weight in evidence.weights.items()}
    monkeypatch.setitem(sys.modules, "snows_hf.masks.scores.reversed", module)
    monkeypatch.setitem(CRITERIA, "reverse-magnitude", Criterion("reversed:reverse"))
    return "reverse-magnitude"


def test_new_criterion_is_used_by_its_name(reverse_magnitude):
    masks = choose_masks(WEIGHTS, NM(2, 4), reverse_magnitude)
    largest = choose_masks(WEIGHTS, NM(2, 4), "magnitude")
    assert all(torch.equal(mask, ~largest[name]) for name, mask in masks.items())


def test_unknown_criterion_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'nonsense'.*magnitude.*safetensors"):
        choose_masks(WEIGHTS, NM(2, 4), "nonsense")


def valid(pattern: NM) -> dict[str, Tensor]:
    return {name: pattern.mask(randn(*WEIGHTS[name].shape, seed=9)) for name in ("conv", "linear")}


@pytest.mark.parametrize("names", [("conv", "linear"), ("linear",)])
def test_mask_file_round_trip(tmp_path, names):
    masks = {name: valid(NM(2, 4))[name] for name in names}
    save_file(masks, tmp_path / "masks.safetensors")
    loaded = choose_masks(WEIGHTS, NM(2, 4), str(tmp_path / "masks.safetensors"))
    assert list(loaded) == list(names)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_mask_file_may_be_sparser_than_the_pattern(tmp_path):
    save_file({"linear": torch.zeros(6, 12, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    assert not load_masks(tmp_path / "masks.safetensors", WEIGHTS, NM(2, 4))["linear"].any()


@pytest.mark.parametrize("asked, zeros", [(0.5, 0.5), (0.5, 0.75), (0.5, 0.25), (0.5, 0.0)])
def test_a_mask_file_is_as_sparse_as_an_unstructured_pattern_asks(tmp_path, asked, zeros):
    path = tmp_path / "masks.safetensors"
    save_file({"linear": torch.arange(72).view(6, 12) >= 72 * zeros}, path)
    if zeros < asked:
        with pytest.raises(MaskError, match=rf"{zeros:.1%} of its entries are zeros, and --pattern asks for 50.0%"):
            load_masks(path, WEIGHTS, Unstructured(asked))
    else:
        assert int((~load_masks(path, WEIGHTS, Unstructured(asked))["linear"]).sum()) == 72 * zeros


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"linear": valid(NM(2, 4))["linear"].float()}, r"linear is torch\.float32.*expected torch\.bool"),
        ({"linear": torch.ones(12, 6, dtype=torch.bool)}, r"shape \(12, 6\).*expected.*\(6, 12\)"),
        ({"linaer": valid(NM(2, 4))["linear"]}, "'linaer' is no prunable weight"),
        ({"linear": torch.ones(6, 12, dtype=torch.bool)}, "linear does not follow the pattern 2:4"),
        ({"linear": valid(NM(3, 4))["linear"]}, "linear does not follow the pattern 2:4"),
        ({"stem": torch.ones(4, 3, 3, 3, dtype=torch.bool)}, "stem does not follow the pattern 2:4"),
        ({}, "holds no mask"),
    ],
    ids=["dtype", "shape", "name", "dense", "wrong pattern", "does not fit", "empty"],
)
def test_bad_mask_file(tmp_path, masks, message):
    save_file(masks, tmp_path / "masks.safetensors")
    with pytest.raises(MaskError, match=message) as caught:
        choose_masks(WEIGHTS, NM(2, 4), str(tmp_path / "masks.safetensors"))
    assert "masks.safetensors" in str(caught.value)


def missing(path: Path) -> None:
    pass


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no safetensors file at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    save_file(valid(NM(2, 4)), path)
    path.write_bytes(path.read_bytes()[:-10])


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [missing, garbage, empty, cut_short, folder])
def test_unreadable_mask_file(tmp_path, make):
    path = tmp_path / "masks.safetensors"
    make(path)
    with pytest.raises(SnowsError, match="cannot be read") as caught:
        choose_masks(WEIGHTS, NM(2, 4), str(path))
    assert isinstance(caught.value, MaskError)
    assert caught.value.remedy
