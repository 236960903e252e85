"""Which models get a chain, and how the others are refused."""

from collections.abc import Callable

import pytest
import timm
import torch
from cases import CASES, timm_mobilenet, timm_resnet, timm_vit, transformers_vit
from timm.layers import SwiGLU
from timm.models.beit import Beit
from timm.models.efficientnet import EfficientNet
from timm.models.res2net import Bottle2neck
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import Dinov2Config, Dinov2ForImageClassification, Swinv2Config, Swinv2ForImageClassification

from snows_hf.adapters import Chain, Group, Operation, State, base, build_chain, register, supported
from snows_hf.adapters.check import check_chain
from snows_hf.adapters.cifar_resnet import CifarResNet
from snows_hf.errors import AdapterError


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the registry, so that what a test registers is gone after it."""
    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x.flatten(1)).relu())


class DerivedToy(Toy):
    pass


def toy_operations(model: nn.Module) -> list[Operation]:
    return [
        Operation("hidden", lambda s: (model.hidden(s[0].flatten(1)),), Group("hidden", ("hidden.weight",), "hidden")),
        Operation("hidden > activation", lambda s: (s[0].relu(),)),
        Operation("head", lambda s: (model.head(s[0]),)),
    ]


def tiny_swin_v2() -> nn.Module:
    config = Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
    return Swinv2ForImageClassification(config)


def test_other_transformers_architecture_is_refused_by_name() -> None:
    with pytest.raises(AdapterError) as caught:
        build_chain(tiny_swin_v2())
    assert "transformers.Swinv2ForImageClassification" in str(caught.value)
    assert all(name in caught.value.remedy for name in supported())


def test_other_timm_architecture_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"timm\.VGG") as caught:
        build_chain(timm.models.VGG([8, "M"], num_classes=2))
    assert all(name in caught.value.remedy for name in supported())


def test_supported_names_library_and_class() -> None:
    assert {
        "timm.VisionTransformer",
        "timm.ResNet",
        "timm.EfficientNet",
        "transformers.ViTForImageClassification",
        "transformers.ResNetForImageClassification",
        "snows_hf.CifarResNet",
    } <= set(supported())


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv2_100", "mixnet_s"])
def test_other_networks_of_the_efficientnet_class_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match=r"blocks\.\d\.\d is a .*expected timm's DepthwiseSeparableConv"):
        build_chain(timm.create_model(name, pretrained=False, num_classes=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_fn": ParallelScalingBlock}, r"blocks\.0 is a ParallelScalingBlock; expected timm's Block"),
        ({"block_fn": ParallelThingsBlock}, r"blocks\.0 is a ParallelThingsBlock; expected timm's Block"),
        ({"block_fn": ResPostBlock}, r"blocks\.0 is a ResPostBlock; expected timm's Block"),
        ({"attn_layer": "diff"}, r"blocks\.0\.attn is a DiffAttention; expected timm's Attention"),
        ({"mlp_layer": SwiGLU}, r"blocks\.0\.mlp is a SwiGLU; expected timm's Mlp"),
    ],
    ids=["parallel-scaling", "parallel-things", "post-norm", "differential-attention", "swiglu"],
)
def test_other_vision_transformer_blocks_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        build_chain(timm_vit(**changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: transformers_vit(Dinov2ForImageClassification, Dinov2Config, use_swiglu_ffn=True),
            r"dinov2\.encoder\.layer\.0\.mlp is a Dinov2SwiGLUFFN; expected an MLP of two layers",
        ),
        (lambda: timm_vit(Beit, swiglu_mlp=True), r"blocks\.0\.mlp is a SwiGLU; expected timm's Mlp"),
    ],
    ids=["dinov2-giant", "beit-swiglu"],
)
def test_gated_mlps_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        build_chain(make())


def test_other_residual_blocks_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"layer1\.0 is a Bottle2neck; expected timm's BasicBlock or Bottleneck"):
        build_chain(timm_resnet(Bottle2neck, base_width=26, block_args={"scale": 4}))


def test_parametrised_weights_are_refused() -> None:
    model = timm_vit()
    weight_norm(model.blocks[1].mlp.fc1)
    with pytest.raises(AdapterError, match=r"blocks\.1\.mlp\.fc1\.weight is not a plain weight"):
        build_chain(model)


def test_shared_layers_are_refused() -> None:
    model = timm_mobilenet()
    model.blocks[1].append(model.blocks[1][-1])
    with pytest.raises(AdapterError, match=r"blocks\.1\.1\.conv_dw\.weight is in two layers"):
        build_chain(model)


def test_new_architecture_is_one_decorated_function(registry: None) -> None:
    with pytest.raises(AdapterError, match="Toy"):
        build_chain(Toy())
    register(Toy, family="toy")(toy_operations)
    chain = build_chain(Toy())
    assert chain.family == "toy"
    assert [group.name for _, group in chain.groups()] == ["hidden"]
    check_chain(chain, torch.randn(2, 3, 2, 2))
    assert any(name.endswith(".Toy") for name in supported())


def test_derived_classes_use_their_parents_adapter(registry: None) -> None:
    register(Toy, family="toy")(toy_operations)
    assert build_chain(DerivedToy()).family == "toy"


def test_the_nearest_adapter_wins(registry: None) -> None:
    register(Toy, family="toy")(toy_operations)
    register(DerivedToy, family="derived")(toy_operations)
    assert build_chain(DerivedToy()).family == "derived"
    assert build_chain(Toy()).family == "toy"


def without(operations: list[Operation], name: str) -> list[Operation]:
    return [operation for operation in operations if operation.name != name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_that_is_not_its_model_is_refused(dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == "cifar-resnet8")
    model = case.model(dtype)
    right = build_chain(model)
    check_chain(right, case.images(2, dtype))
    wrong = Chain(model, without(right.operations, "layer1.0.conv1 > activation"), right.family)
    with pytest.raises(AdapterError, match=r"CifarResNet does not reproduce this model: logits differ by"):
        check_chain(wrong, case.images(2, dtype))


def test_a_chain_of_nan_is_refused() -> None:
    case = next(case for case in CASES if case.name == "cifar-resnet8")
    model = case.model()
    right = build_chain(model)

    def broken(s: State) -> State:
        return (model.linear(s[0].mean((-2, -1))) * float("nan"),)

    wrong = Chain(model, [*right.operations[:-1], Operation("linear", broken)], right.family)
    with pytest.raises(AdapterError, match="does not reproduce"):
        check_chain(wrong, case.images())


def test_a_model_that_overrides_forward_is_refused() -> None:
    """Structure alone cannot tell: what prune() runs before it touches a weight can."""

    class Doubled(EfficientNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = timm_mobilenet().eval()
    model.__class__ = Doubled
    with pytest.raises(AdapterError, match="Doubled does not reproduce"):
        check_chain(build_chain(model), torch.randn(2, 3, 32, 32))


def test_cifar_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 21: expected 6n \\+ 2"):
        CifarResNet(depth=21)
