"""Which models get a chain, which of their layers have a group, and what is refused."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain as chain_of
from types import MappingProxyType
from typing import NamedTuple

import pytest
import timm
import torch
from cases import BY_NAME, randomised, timm_mobilenet, timm_resnet, timm_vit, transformers_vit
from quick import rest_slow
from timm.layers import ScaledStdConv2d, StdConv2d, SwiGLU
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.beit import Beit
from timm.models.efficientnet import EfficientNet
from timm.models.res2net import Bottle2neck
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    BitConfig,
    BitForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from snows_hf.adapters import Chain, Group, Operation, State, base, build_chain, logits_of, register
from snows_hf.adapters.check import check_chain
from snows_hf.adapters.cifar_resnet import CifarResNet
from snows_hf.adapters.cut import HEAD, SHARED, STANDARDISED, STEM
from snows_hf.errors import AdapterError


pytestmark = pytest.mark.usefixtures("own_traces")


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


def tiny_efficientnet(*stages: str, **changes: object) -> nn.Module:
    settings = {"num_features": 32, "stem_size": 8, "fix_stem": True, "num_classes": 5}
    return EfficientNet(decode_arch_def([[stage] for stage in stages]), **settings | changes)


def tiny_dinov2_giant() -> nn.Module:
    return transformers_vit(Dinov2ForImageClassification, Dinov2Config, use_swiglu_ffn=True)


class Other(NamedTuple):
    """A model of no family that the cases have: which of its layers are dense, and its joint groups; all other layers
    are groups of their own."""

    make: Callable[[], nn.Module]
    size: int
    dense: list[str]
    joint: Mapping[str, list[str]] = MappingProxyType({})
    family: str = "vit"


TIMM_VIT = {"size": 16, "dense": ["patch_embed.proj", "head"]}
MOBILE = {"size": 32, "dense": ["conv_stem", "classifier"], "family": "mobilenet"}
QKV = {f"blocks.{i}.attn.qkv": [f"blocks.{i}.attn.qkv"] for i in (0, 1)}
SEPARATE = ["q_proj", "k_proj", "v_proj"]
BLOCK, POSITIONS = "swinv2.encoder.layers.0.blocks.0.attention.self", "continuous_position_bias_mlp"
OTHERS = {
    "vgg": Other(lambda: timm.models.VGG([8, "M", 8], num_classes=2), 32, ["features.0", "head.fc"], {}, "resnet"),
    "swin-v2": Other(
        tiny_swin_v2,
        16,
        [
            "swinv2.embeddings.patch_embeddings.projection",
            "classifier",
            *(f"{BLOCK}.{POSITIONS}.{i}" for i in (0, 2)),  # reads positions
        ],
        {f"{BLOCK}.qkv": [f"{BLOCK}.{name}" for name in ("query", "key", "value")]},
    ),
    "efficientnet": Other(
        partial(tiny_efficientnet, "ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k3_s2_e2_c24_se0.25", act_layer=nn.SiLU),
        **MOBILE,
    ),
    "mobilenet-v2": Other(
        partial(tiny_efficientnet, "ds_r1_k3_s1_c16", "ir_r2_k3_s2_e2_c24", act_layer=nn.ReLU6), **MOBILE
    ),
    "mixnet": Other(partial(tiny_efficientnet, "ds_r1_k3_s1_c16", "ir_r2_k3.5_a1.1_p1.1_s2_e2_c24_se0.5"), **MOBILE),
    "parallel-scaling": Other(
        partial(timm_vit, block_fn=ParallelScalingBlock),
        **TIMM_VIT,
        joint={f"blocks.{i}.in_proj": [f"blocks.{i}.in_proj"] for i in (0, 1)},
    ),
    "parallel-things": Other(
        partial(timm_vit, block_fn=ParallelThingsBlock),
        **TIMM_VIT,
        joint={f"blocks.{i}.attns.{j}.attn.qkv": [f"blocks.{i}.attns.{j}.attn.qkv"] for i in (0, 1) for j in (0, 1)},
    ),
    "post-norm": Other(partial(timm_vit, block_fn=ResPostBlock), **TIMM_VIT, joint=QKV),
    "differential-attention": Other(partial(timm_vit, attn_layer="diff"), **TIMM_VIT, joint=QKV),
    "swiglu": Other(partial(timm_vit, mlp_layer=SwiGLU), **TIMM_VIT, joint=QKV),
    "beit-swiglu": Other(partial(timm_vit, Beit, swiglu_mlp=True), **TIMM_VIT, joint=QKV),
    "dinov2-giant": Other(
        tiny_dinov2_giant,
        16,
        ["dinov2.embeddings.patch_embeddings.projection", "classifier"],
        {
            f"dinov2.encoder.layer.{i}.attention.qkv": [f"dinov2.encoder.layer.{i}.attention.{n}" for n in SEPARATE]
            for i in (0, 1)
        },
    ),
    "res2net": Other(
        partial(timm_resnet, Bottle2neck, layers=(1, 1, 1, 1), base_width=26, block_args={"scale": 4}),
        32,
        ["conv1", "fc"],
        family="resnet",
    ),
}


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def chain_that_is_its_model(model: nn.Module, size: int) -> Chain:
    """The chain of the model, which computes what the model does to the last digits."""
    model, images = randomised(model).double().eval(), torch.randn(2, 3, size, size, dtype=torch.float64)
    chain = build_chain(model, images[:1])
    with torch.no_grad():
        torch.testing.assert_close(chain.logits(images), logits_of(model, images), rtol=0, atol=1e-10)
    return chain


QUICK = {"vgg", "swiglu", "parallel-things", "efficientnet", "mobilenet-v2"}


@pytest.mark.parametrize("name", rest_slow(OTHERS, QUICK))
def test_other_architectures_have_the_right_groups(name: str) -> None:
    """Both halves of gated MLPs, gates, and every branch of parallel blocks."""
    other = OTHERS[name]
    chain = chain_that_is_its_model(other.make(), other.size)
    assert set(chain.dense) == set(other.dense)
    single = layers_of(chain.model) - {*other.dense, *chain_of(*other.joint.values())}
    expected = {layer: [layer] for layer in single} | dict(other.joint)
    groups = [group for _, group in chain.groups()]
    got = {group.name: [name.removesuffix(".weight") for name in group.parameters] for group in groups}
    assert len(got) == len(groups) and got == expected
    assert {group.name for group in groups if group.kind == "qkv"} == set(other.joint)
    assert chain.family == other.family


@pytest.mark.parametrize("old", [True, False], ids=["hook", "parametrisation"])
def test_parametrised_weights_are_refused(old: bool) -> None:
    """As torch does now, and as it did with a hook that computes the weight before each call."""
    model = timm_vit()
    if old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model.blocks[1].mlp.fc1)
    else:
        weight_norm(model.blocks[1].mlp.fc1)
    with pytest.raises(
        AdapterError, match=r"^Layer blocks\.1\.mlp\.fc1 of VisionTransformer: .*parametrised"
    ) as caught:
        build_chain(model)
    assert caught.value.remedy.startswith("Merge or remove parametrisations such as LoRA or weight norm")


class Convolutions(nn.Module):
    """A plain stem, a standardised convolution, a plain one, and a classifier."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem, self.standard, self.plain = nn.Conv2d(3, 4, 3), kind(4, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(self.standard(self.stem(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d, WeightStandardizedConv2d])
def test_standardised_convolutions_are_dense(kind: type[nn.Conv2d]) -> None:
    """Their zeros would be zeros no more once the mean is taken off."""
    chain = chain_that_is_its_model(Convolutions(kind), 12)
    assert chain.dense == {"stem": STEM, "standard": STANDARDISED, "head": HEAD}
    assert "standardisation" in STANDARDISED
    assert [group.name for _, group in chain.groups()] == ["plain"]


def test_all_of_a_standardised_network_is_dense() -> None:
    config = BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, num_groups=4)
    chain = chain_that_is_its_model(BitForImageClassification(config), 32)
    expected = dict.fromkeys(layers_of(chain.model), STANDARDISED) | {"classifier.1": HEAD}
    assert chain.dense == expected and not chain.groups()


class Twice(nn.Module):
    """The layer ``a`` is called twice, or its weight is that of ``b``, which is called in its place."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.a, self.between = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b = nn.Linear(8, 8) if tied else self.a
        self.head = nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.stem, self.a, self.between, self.b):
            x = layer(x.flatten(1)).relu()
        return self.head(x)


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_that_is_used_twice_is_dense(tied: bool) -> None:
    chain = chain_that_is_its_model(Twice(tied), 2)
    shared = {name: reason for name, reason in chain.dense.items() if reason == SHARED}
    assert set(shared) == {"a", "b"} & layers_of(chain.model) and "more than once" in SHARED
    assert [group.name for _, group in chain.groups()] == ["between"]


def test_a_block_that_is_called_twice_is_dense() -> None:
    model = timm_mobilenet()
    model.blocks[1].append(model.blocks[1][-1])
    chain = chain_that_is_its_model(model, 32)
    shared = {name for name, reason in chain.dense.items() if reason == SHARED}
    assert shared == {"blocks.1.1.conv_dw", "blocks.1.1.conv_pw"}


def test_a_layer_of_two_names_that_is_called_once_has_a_group() -> None:
    """By the first of the names, as in ``named_parameters``; and it is called, so that its hooks are run."""
    model = Toy()
    model.first, model.alias = nn.Linear(8, 8), nn.Linear(8, 8)
    model.hidden, model.alias = nn.Sequential(model.hidden, nn.ReLU(), model.first), model.first
    chain = chain_that_is_its_model(model, 2)
    (_, group), *others = chain.groups()
    assert not others and group.parameters[0] in dict(model.named_parameters())
    called = list[nn.Module]()
    model.first.register_forward_hook(lambda module, *_: called.append(module))
    chain.logits(torch.randn(2, 3, 2, 2, dtype=torch.float64))
    assert called == [model.alias]


def test_a_chain_by_hand_may_not_have_a_weight_twice(registry: None) -> None:
    def twice(model: nn.Module) -> list[Operation]:
        return [*toy_operations(model), *toy_operations(model)]

    register(Toy, family="toy")(twice)
    with pytest.raises(AdapterError, match=r"Layer hidden of Toy: hidden\.weight is in two layers"):
        build_chain(Toy())


def test_a_chain_by_hand_is_one_decorated_function(registry: None) -> None:
    images = torch.randn(2, 3, 2, 2)
    assert build_chain(Toy(), images[:1]).family == "resnet"  # traced
    register(Toy, family="toy")(toy_operations)
    chain = build_chain(Toy())
    assert chain.family == "toy"
    assert [group.name for _, group in chain.groups()] == ["hidden"]
    check_chain(chain, images)


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
    case = BY_NAME["cifar-resnet8"]
    model = case.model(dtype)
    right = build_chain(model, case.images(1))
    check_chain(right, case.images(2, dtype))
    wrong = Chain(model, without(right.operations, "layer1.0.conv1 > activation"), right.family)
    with pytest.raises(AdapterError, match=r"CifarResNet does not reproduce this model: logits differ by"):
        check_chain(wrong, case.images(2, dtype))


def test_a_chain_of_nan_is_refused() -> None:
    case = BY_NAME["cifar-resnet8"]
    model = case.model()
    right = build_chain(model, case.images(1))

    def broken(s: State) -> State:
        return (model.linear(s[0].mean((-2, -1))) * float("nan"),)

    wrong = Chain(model, [*right.operations[:-1], Operation("linear", broken)], right.family)
    with pytest.raises(AdapterError, match="does not reproduce"):
        check_chain(wrong, case.images())


def test_a_forward_pass_of_a_models_own_is_followed() -> None:
    class Doubled(EfficientNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = timm_mobilenet()
    model.__class__ = Doubled
    chain_that_is_its_model(model, 32)


def test_cifar_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 21: expected 6n \\+ 2"):
        CifarResNet(depth=21)
