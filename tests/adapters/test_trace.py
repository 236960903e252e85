"""The graph of a model, cut and run in parts: for any number of images, in any type, nothing needless in a state."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Case, randomised, timm_vit, variants
from timm.layers import Conv2dSame
from torch import Tensor, nn
from transformers import OwlViTConfig, OwlViTForObjectDetection

from snows_hf.adapters import Chain, State, build_chain, frozen, outputs_of
from snows_hf.adapters.attention import fused_attention, recorded_attention
from snows_hf.errors import AdapterError
from snows_hf.method.preconditioner import gram, recorded


pytestmark = pytest.mark.usefixtures("own_traces")


KINDS = [
    *("timm-vit", "transformers-beit-position-biases", "timm-vit-map", "timm-swin-padded", "timm-deit-distilled"),
    *("timm-resnet-squeeze-excitation", "timm-mobilenet-skip", "cifar-resnet8", "timm-convnextv2"),
]
"""One case of each kind of state: tokens, windows, the stream beside a gate, two heads, padded shortcuts."""


@cache
def build(case: Case) -> tuple[Chain, list[State]]:
    """The chain in float64, and the states of five images before and after each operation."""
    chain = build_chain(case.model(torch.float64), case.images(1, torch.float64))
    return chain, states_of(chain, case.images(5, torch.float64))


@torch.no_grad()
def states_of(chain: Chain, images: Tensor) -> list[State]:
    states: list[State] = [(images,)]
    with frozen(chain.model):
        for operation in chain.operations:
            states.append(operation.run(states[-1]))
    return states


@pytest.mark.parametrize("name", variants(KINDS))
@pytest.mark.parametrize("part", [slice(0, 1), slice(3, 5), slice(0, 5, 2)], ids=["one", "two", "every second"])
def test_states_of_some_images_are_a_part_of_the_states_of_all(name: str, part: slice) -> None:
    chain, states = build(BY_NAME[name])
    images = states[0][0]
    for state, whole in zip(states_of(chain, images[part]), states, strict=True):
        for tensor, of_all in zip(state, whole, strict=True):
            torch.testing.assert_close(tensor, of_all[part], rtol=0, atol=1e-11)
    with torch.no_grad():
        expected = outputs_of(chain.model, images[part])
        torch.testing.assert_close(chain.results_of(images[part]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", variants(KINDS))
def test_nothing_in_a_state_is_a_constant_or_unread(name: str) -> None:
    """Other images make another tensor of each, and what is not a number there is none in the results."""
    case = BY_NAME[name]
    chain, states = build(case)
    others = states_of(chain, case.images(5, torch.float64).flip(-1, 0) + 0.5)
    for place, (state, other) in enumerate(zip(states, others, strict=True)):
        for i, tensor in enumerate(state):
            assert not torch.equal(tensor, other[i]), (place, i)
            broken: State = (*state[:i], torch.full_like(tensor, torch.nan), *state[i + 1 :])
            for operation in chain.operations[place:]:
                with torch.no_grad():
                    broken = operation.run(broken)
            assert any(result.isnan().any() for result in broken), (place, i)


@pytest.mark.parametrize("name", variants([*KINDS, "timm-beit", "transformers-swin-padded"]))
def test_a_chain_follows_its_model_to_another_type(name: str) -> None:
    """Constants of the graph, such as masks of windows, go with it. It is as close to the truth, in float64, as the
    model in that type."""
    case = BY_NAME[name]
    chain = build_chain(case.model(), case.images(1))
    for dtype in (torch.float64, torch.bfloat16):
        chain.model.to(dtype)
        images = case.images(4, dtype)
        with torch.no_grad(), frozen(chain.model):
            expected, got = outputs_of(chain.model, images)["logits"], chain.logits(images)
            truth = outputs_of(chain.model.double(), images.double())["logits"]
        assert got.dtype == expected.dtype == dtype
        rounding = max((expected - truth).abs().max(), 1e-12 * truth.abs().max())
        assert (got - truth).abs().max() <= 2 * rounding, dtype


class Function(nn.Module):
    """A classifier of images (n, 3, 4, 4) with a function of features (n, 8) between its two layers."""

    def __init__(self, between: Callable[[Tensor], Tensor], inside: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(48, 8), nn.Linear(inside, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x.flatten(1))))


def images(count: int = 4, size: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3)).double()


def made(model: nn.Module, size: int = 4) -> Chain:
    """The chain, which computes what its model does."""
    chain = build_chain(randomised(model).double().eval(), images(1, size))
    with torch.no_grad():
        expected = outputs_of(chain.model, images(4, size))
        torch.testing.assert_close(chain.results_of(images(4, size)), expected, rtol=0, atol=1e-12)
    return chain


def read_after_it_is_overwritten(x: Tensor) -> Tensor:
    y = x.relu_()
    return y * 2 + x.tanh()


def read_before_and_after(x: Tensor) -> Tensor:
    before = x.sin()
    x.mul_(3).add_(1)
    return before + x.sigmoid()


def a_slice_is_overwritten(x: Tensor) -> Tensor:
    x = x * 1.0
    x[:, :3] = x[:, 3:6].relu()
    x[:, 5:].mul_(2)
    return x.tanh()


def a_view_is_overwritten(x: Tensor) -> Tensor:
    whole = x * 1.0
    whole.view(-1, 2, 4).select(1, 0).sigmoid_()
    return whole


@pytest.mark.parametrize(
    "between", [read_after_it_is_overwritten, read_before_and_after, a_slice_is_overwritten, a_view_is_overwritten]
)
def test_values_that_are_overwritten_in_place(between: Callable[[Tensor], Tensor]) -> None:
    """And no state changes while the operation after it is run."""
    chain = made(Function(between))
    states = states_of(chain, images())
    kept = [tuple(tensor.clone() for tensor in state) for state in states]
    for operation, (state, after) in zip(chain.operations, pairwise(kept), strict=True):
        with torch.no_grad():
            got = operation.run(state)
        assert all(torch.equal(a, b) for a, b in zip(got, after, strict=True))
    for state, before in zip(states_of(chain, images()), kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("between", [a_slice_is_overwritten, a_view_is_overwritten])
def test_second_derivatives_of_what_is_overwritten_in_part(between: Callable[[Tensor], Tensor]) -> None:
    chain = made(Function(between))

    def second(outputs: Callable[[Tensor], dict[str, Tensor]]) -> Tensor:
        x = images().requires_grad_()
        (first,) = torch.autograd.grad(outputs(x)["logits"].square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(chain.results_of), second(lambda x: outputs_of(chain.model, x)))


def on_what_it_shows(x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x


def on_how_many_there_are(x: Tensor) -> Tensor:
    return x.relu() if x.shape[0] == 2 else x.tanh()


def two_of_them(x: Tensor) -> Tensor:
    return x.reshape(2, 8).relu()


def test_a_model_that_looks_at_its_images_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"^Function cannot be traced on images of \(3, 4, 4\): \w+: ") as caught:
        build_chain(Function(on_what_it_shows), images(1).float())
    assert caught.value.remedy.startswith("Its forward pass must not depend on what the images show")


@pytest.mark.parametrize("between", [on_how_many_there_are, two_of_them])
def test_a_model_for_one_number_of_images_is_refused(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AdapterError, match=r"^Function cannot be traced: .* depends on the number of images"):
        build_chain(Function(between), images(1).float())


def test_a_model_that_wants_text_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = OwlViTConfig(text_config=sizes, vision_config=sizes | {"image_size": 16, "patch_size": 4})
    with pytest.raises(AdapterError, match=r"^OwlViTForObjectDetection takes input_ids, pixel_values: not images"):
        build_chain(OwlViTForObjectDetection(config))


def test_a_model_that_takes_no_images_of_a_size_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"^VisionTransformer cannot be traced on images of \(3, 20, 20\): .*20"):
        build_chain(timm_vit(), torch.zeros(1, 3, 20, 20))


class Convolution(nn.Module):
    """A stem, the convolution, and a classifier of its mean."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), conv, nn.Linear(conv.out_channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).tanh()).relu().mean((2, 3)))


CONVOLUTIONS = {
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "grouped": nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False),
    "pointwise": nn.Conv2d(4, 6, 1),
    "same by word": nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "same as TensorFlow": Conv2dSame(4, 6, 3, stride=2),
    "same as TensorFlow, depthwise": Conv2dSame(4, 4, 5, stride=2, groups=4, bias=False),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_what_a_convolution_reads_has_the_right_gram_matrix(name: str) -> None:
    """Held against JᵀJ, J being the derivative of the model's own outputs of that layer in the weights of one row."""
    conv = CONVOLUTIONS[name]
    chain = made(Convolution(conv), 7)
    with recorded(chain, ["conv.weight"]) as seen, torch.no_grad():
        chain.logits(images(2, 7))
    module, x, z = seen["conv.weight"]
    assert module is conv
    got = gram(module, x)
    features = chain.model.stem(images(2, 7)).tanh().detach()
    rows = conv.out_channels // conv.groups
    for row in range(conv.out_channels):

        def output(weight: Tensor, row: int = row) -> Tensor:
            weights = conv.weight.detach().clone()
            weights[row] = weight
            return torch.func.functional_call(conv, {"weight": weights}, (features,))[:, row].flatten()

        jacobian = torch.autograd.functional.jacobian(output, conv.weight[row].detach()).flatten(1)
        torch.testing.assert_close(got[row // rows], jacobian.T @ jacobian)
    torch.testing.assert_close(z, conv(features))


def test_the_bias_of_qkv_may_be_made_of_parts() -> None:
    """BEiT's keys have none. The model multiplies by the weight without calling the layer; the chain calls it."""
    chain = made(BY_NAME["timm-beit"].make(), 16)
    attention = chain.model.blocks[0].attn
    with recorded(chain, ["blocks.0.attn.qkv.weight"]) as seen, torch.no_grad():
        chain.logits(images(2, 16))
    module, x, z = seen["blocks.0.attn.qkv.weight"]
    bias = torch.cat([attention.q_bias, torch.zeros(32), attention.v_bias])
    assert module is attention.qkv and attention.q_bias.abs().min() > 0
    torch.testing.assert_close(z, x @ module.weight.T + bias)


ACTIVATIONS = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * x.sigmoid(),
    "silu, factor first": lambda x: x.sigmoid() * x,
    "hard swish": F.hardswish,
    "relu6": F.relu6,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_that_are_written_out_are_activations(name: str) -> None:
    model = Function(ACTIVATIONS[name])
    model.middle = nn.Linear(8, 8)
    model.between = lambda x: ACTIVATIONS[name](model.middle(x.relu()))
    chain = made(model)
    assert [operation.name for operation in chain.operations] == [
        *("first", "first > activation", "middle", "middle > activation", "last"),
    ]
    assert [group.kind for _, group in chain.groups()] == ["mlp0"]
    x = states_of(chain, images())
    torch.testing.assert_close(x[4][0], ACTIVATIONS[name](x[3][0]))


def test_a_gate_is_no_activation() -> None:
    """One half of a layer times the sigmoid of the other."""
    model = Function(lambda x: x[:, :4] * x[:, 4:].sigmoid(), inside=4)
    assert [operation.name for operation in made(model).operations] == ["first", "last"]


def test_the_hard_sigmoid_is_torchs_and_can_be_differentiated_twice() -> None:
    chain = made(Function(F.hardsigmoid))
    x = 3 * images().requires_grad_()
    (expected,) = torch.autograd.grad(chain.model(x).pow(2).sum(), x)
    (got,) = torch.autograd.grad(chain.logits(x).pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(got, expected)
    (second,) = torch.autograd.grad(got.sum(), x)
    assert second.abs().max() > 0
    features = chain.model.first(x.flatten(1))
    assert (features < -3).any() and (features > 3).any()


def masks() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(4)
    seen = torch.rand(2, 1, 7, 7, generator=generator) < 0.7
    seen[..., 0] = True  # no query without a key
    return {
        "plain": {},
        "bool mask": {"attn_mask": seen},
        "float mask": {"attn_mask": torch.randn(4, 7, 7, generator=generator).double()},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "grouped queries": {"enable_gqa": True},
        "all": {"attn_mask": seen, "scale": 0.3, "enable_gqa": True},
    }


@pytest.mark.parametrize("name", masks())
def test_fused_attention_is_torchs(name: str) -> None:
    options = masks()[name]
    heads = 2 if options.get("enable_gqa") else 4
    shapes = [(2, 4, 7, 6), (2, heads, 7, 6), (2, heads, 7, 3)]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    renamed = {{"attn_mask": "mask"}.get(option, option): value for option, value in options.items()}
    with recorded_attention() as record:
        got = fused_attention(q, k, v, **renamed)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.pow(3).sum(), (q, k, v)),
        torch.autograd.grad(expected.pow(3).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    (probabilities,) = record
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 7).double())
