"""Guards: a chain that is not its model is refused, whatever the types, the sizes of the logits and the images."""

from functools import cache
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, variants
from embedded import DIGITS, VIT
from quick import slow
from torch import nn
from transformers import ViTForImageClassification

from snows_hf import load, prune
from snows_hf.adapters import Chain, Operation, State, base, build_chain, register
from snows_hf.adapters.base import example
from snows_hf.adapters.check import ROUNDING, TOLERANCE, check_chain
from snows_hf.adapters.traced import traced_chain
from snows_hf.errors import AdapterError
from snows_hf.jobs.attention import attention_maps
from snows_hf.jobs.sensitivity import sensitivity


BLOCKS = {
    "transformers-vit": "vit.layers.1.",
    "timm-vit": "blocks.1.",
    "timm-vit-layer-scale": "blocks.1.",
    "transformers-dinov2": "dinov2.encoder.layer.1.",
    "transformers-beit": "beit.layers.1.",
    "transformers-clip": "vision_model.encoder.layers.1.",
    "transformers-swin": "swin.encoder.layers.1.blocks.1.",
    "timm-swin": "layers.0.blocks.1.",
    "transformers-convnext": "convnext.encoder.stages.1.layers.1.",
    "timm-convnext": "stages.2.blocks.1.",
    "timm-resnet-basic": "layer2.1",
    "cifar-resnet20": "layer3.2",
}
"""One block of a network each, whose input could be its output: not the first, whose first operation embeds."""


def without(chain: Chain, prefix: str) -> Chain:
    """The chain less all operations of one block."""
    kept = [operation for operation in chain.operations if not operation.name.startswith(prefix)]
    assert 3 <= len(chain.operations) - len(kept) <= 5
    return Chain(chain.model, kept, chain.family)


def off_by(chain: Chain, error: float) -> Chain:
    """The chain with so much added to one of the logits."""
    head = chain.operations[-1]

    def run(s: State) -> State:
        (logits,) = head.run(s)
        return (logits + error * nn.functional.one_hot(torch.tensor(1), logits.shape[1]),)

    return Chain(chain.model, [*chain.operations[:-1], Operation(head.name, run)], chain.family)


def classifier(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@cache
def build(name: str, dtype: torch.dtype = torch.float32) -> Chain:
    """The chain of a case; its model is not to be changed."""
    return build_chain(BY_NAME[name].model(dtype), BY_NAME[name].images(1, dtype))


@pytest.fixture
def broken_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain of transformers' ViT lacks a block."""
    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))

    def forgetful(model: nn.Module) -> list[Operation]:
        operations = traced_chain(model, example(model), {}).operations
        return [operation for operation in operations if not operation.name.startswith("vit.layers.1.")]

    register(ViTForImageClassification, family="vit")(forgetful)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16), slow(torch.float16)])
@pytest.mark.parametrize("name", variants(BLOCKS))
def test_what_is_the_model_passes_and_is_left_as_it_was(name: str, dtype: torch.dtype) -> None:
    chain = build(name, dtype)
    model = chain.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = check_chain(chain, BY_NAME[name].images(2, dtype))
    assert got["logits"].shape == (2, classes_of(model)) and model.training
    model.eval()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def classes_of(model: nn.Module) -> int:
    return getattr(model, "num_labels", None) or model.num_classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, slow(torch.float64)])
@pytest.mark.parametrize("name", variants(BLOCKS))
def test_a_block_that_is_missing_is_seen_in_any_type(name: str, dtype: torch.dtype) -> None:
    case, chain = BY_NAME[name], build(name, dtype)
    check_chain(chain, case.images(2, dtype))
    with pytest.raises(AdapterError, match=r"does not reproduce this model: logits differ by .* of their spread"):
        check_chain(without(chain, BLOCKS[name]), case.images(2, dtype))


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e4])
@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit", "transformers-swin"])
def test_a_block_that_is_missing_is_seen_whatever_the_logits_size(name: str, scale: float) -> None:
    """Their bias, which no image changes, is left as it is."""
    case = BY_NAME[name]
    model = case.model()
    classifier(model).weight.data *= scale
    chain = build_chain(model, case.images(1))
    check_chain(chain, case.images())
    with pytest.raises(AdapterError, match="does not reproduce"):
        check_chain(without(chain, BLOCKS[name]), case.images())


@pytest.mark.parametrize("name", ["transformers-vit", "cifar-resnet20"])
def test_images_that_are_all_the_same_tell_as_well(name: str) -> None:
    chain, images = build(name), torch.zeros_like(BY_NAME[name].images())
    check_chain(chain, images)
    check_chain(chain, images[:1])
    with pytest.raises(AdapterError, match="does not reproduce"):
        check_chain(without(chain, BLOCKS[name]), images)


@pytest.mark.parametrize("name", ["transformers-vit", "timm-vit-average", "timm-resnet-basic"])
def test_the_tolerance_is_a_share_of_the_spread(name: str) -> None:
    case, chain = BY_NAME[name], build(name)
    noise = torch.randn(1, *case.images().shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = chain.logits(torch.cat([case.images(), noise]))
    spread = float((logits - logits.mean(0)).square().mean().sqrt() * (3 / 2) ** 0.5)
    assert TOLERANCE == 1e-3
    for sign in (1, -1):
        check_chain(off_by(chain, sign * 0.9e-3 * spread), case.images())
        with pytest.raises(AdapterError, match=r"differ by .*, 0\.0012 of their spread"):
            check_chain(off_by(chain, sign * 1.2e-3 * spread), case.images())


def test_logits_that_do_not_vary_may_be_rounded_and_no_more() -> None:
    case = BY_NAME["transformers-vit"]
    model = case.model()
    head = classifier(model)
    head.weight.data.zero_()
    unit = float(head.bias.detach().abs().max()) * torch.finfo(torch.float32).eps
    chain = build_chain(model, case.images(1))
    check_chain(off_by(chain, 0.9 * ROUNDING * unit), case.images())
    with pytest.raises(AdapterError, match="inf of their spread"):
        check_chain(off_by(chain, 1.2 * ROUNDING * unit), case.images())
    assert ROUNDING == 30


def test_the_model_itself_is_the_measure_and_no_frozen_one() -> None:
    """A chain computes convolutions in a form of its own, and so does not see a forward that an instance is given
    later."""
    case = BY_NAME["cifar-resnet8"]
    model = case.model()
    chain = build_chain(model, case.images(1))
    conv = model.layer2[0].conv1
    conv.forward = lambda x: 2 * nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    with pytest.raises(AdapterError, match="does not reproduce"):
        check_chain(chain, case.images())
    check_chain(build_chain(model, case.images(1)), case.images())  # given before, it is followed


def test_images_that_the_adapter_or_the_model_cannot_run() -> None:
    case = BY_NAME["transformers-beit-position-biases"]
    with pytest.raises(
        AdapterError, match=r"^The chain of BeitForImageClassification cannot run these images: .* Give images"
    ):
        check_chain(build_chain(case.model()), torch.zeros(2, 3, 24, 24))
    right = build("cifar-resnet8")
    flat = Chain(right.model, [Operation("flat", lambda s: (s[0].flatten(1),)), *right.operations], right.family)
    with pytest.raises(AdapterError, match=r"^The chain of CifarResNet cannot run these images: \w+Error: "):
        check_chain(flat, torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prune_refuses_before_anything_is_measured(broken_vit: None, tmp_path: Path, dtype: str) -> None:
    said: list[str] = []
    with pytest.raises(AdapterError, match="ViTForImageClassification does not reproduce"):
        prune(
            str(VIT),
            "2:4",
            data=str(DIGITS),
            eval_data=str(DIGITS),
            samples=8,
            output=tmp_path / "out",
            dtype=dtype,
            on_stage=said.append,
        )
    assert [line.split()[0] for line in said] == ["Loading", "Reading"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sensitivity_refuses_before_anything_is_measured(broken_vit: None, dtype: str) -> None:
    said: list[str] = []
    with pytest.raises(AdapterError, match="ViTForImageClassification does not reproduce"):
        sensitivity(str(VIT), "2:4", data=str(DIGITS), samples=8, dtype=dtype, on_stage=said.append)
    assert [line.split()[0] for line in said] == ["Loading", "Reading"]


def test_attention_maps_of_another_network_are_refused(broken_vit: None) -> None:
    with pytest.raises(AdapterError, match="ViTForImageClassification does not reproduce"):
        attention_maps(build_chain(load(str(VIT)).model), torch.randn(2, 3, 16, 16))
