"""The trained CIFAR-10 checkpoints, and the CIFAR ResNets of He et al. that they need."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import snows_hf
from snows_hf.adapters import build_chain
from snows_hf.adapters.outputs import logits_of


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet20_cifar10", "vit_cifar10_timm", "vit_cifar10_hf"])
def test_checkpoint_loads_and_its_chain_is_the_model(shared_models: Path, images: torch.Tensor, name: str) -> None:
    checkpoint = snows_hf.load(str(shared_models / name))
    assert checkpoint.library == ("transformers" if name.endswith("hf") else "timm")
    chain = build_chain(checkpoint.model, images[:1])
    with torch.no_grad():
        expected = logits_of(checkpoint.model, images)
        assert expected.shape == (8, 10)
        torch.testing.assert_close(chain.logits(images), expected, rtol=1e-4, atol=1e-4)


def test_both_vit_checkpoints_are_the_same_network(shared_models: Path, images: torch.Tensor) -> None:
    ours = [snows_hf.load(str(shared_models / name)).model for name in ("vit_cifar10_timm", "vit_cifar10_hf")]
    with torch.no_grad():
        timm_logits, transformers_logits = (logits_of(model, images) for model in ours)
    torch.testing.assert_close(timm_logits, transformers_logits, rtol=1e-4, atol=1e-4)


def test_resnet20_checkpoint_has_exactly_the_models_keys(shared_models: Path) -> None:
    weights = load_file(shared_models / "resnet20_cifar10" / "model.safetensors")
    timm.create_model("resnet20_cifar", pretrained=False).load_state_dict(weights, strict=True)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_are_those_of_he_et_al(depth: int, millions: float) -> None:
    """Table 6 of Deep Residual Learning for Image Recognition: layers and parameters."""
    name = f"resnet{depth}_cifar"
    assert name in timm.list_models("resnet*_cifar")
    model = timm.create_model(name, pretrained=False)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(parameters, 1 if depth == 110 else 2) == millions
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
