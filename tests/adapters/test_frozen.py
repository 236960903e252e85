"""Convolutions and norms as a chain differentiates them against PyTorch's own, to second and third order, in
float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import grad

from snows_hf.adapters import Chain, build_chain, frozen


pytestmark = pytest.mark.usefixtures("own_traces")


LAYERS = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "strided, uneven": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "dilated": nn.Conv2d(4, 6, (3, 2), dilation=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "string padding": nn.Conv2d(4, 6, 3, padding="same"),
    "reflected padding": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "norm": nn.BatchNorm2d(4),
    "norm without weights": nn.BatchNorm2d(4, affine=False),
    "norm without statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "norm and activation": BatchNormAct2d(4),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name])
    if isinstance(layer, nn.BatchNorm2d):
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(), layer, nn.Softplus()).double().eval()


def images(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(2, 3, 8, 7, dtype=torch.float64).contiguous(memory_format=layout)


def through(chain: Chain, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return chain.outputs((x,), 0, len(chain.operations), weights)[-1]


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of a loss, and the Hessian of the loss times a vector, all in x."""
    x = x.clone().requires_grad_()
    y = f(x)
    (g,) = grad(y.pow(3).sum(), x, create_graph=True)
    (Hx,) = grad(g, x, torch.ones_like(x))
    return y.detach(), g.detach(), Hx


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_derivatives_are_those_of_the_model(name, layout):
    model, x = network(name), images(layout)
    expected, chain = derivatives(model, x), build_chain(model, x[:1])
    with frozen(model):
        got = derivatives(chain.logits, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_weight_put_in_place_is_differentiated():
    model, x = network("padded"), images()
    chain = build_chain(model, x[:1])
    weight = model[2].weight.detach().clone().requires_grad_()
    replaced = {"2.weight": weight}
    (expected,) = grad(torch.func.functional_call(model, replaced, (x,)).pow(2).sum(), weight)
    with frozen(model):
        (got,) = grad(through(chain, x, replaced).pow(2).sum(), weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [name for name in LAYERS if "norm" not in name])
def test_weights_in_two_layers_have_their_derivatives_to_third_order(name, layout):
    """In both weights and the image at once, of a loss that all of them enter nonlinearly."""
    model, x = network(name), images(layout).requires_grad_()
    chain = build_chain(model, x[:1].detach())
    variables = [x, *(model[i].weight.detach().clone().requires_grad_() for i in (0, 2))]

    def orders(output: Tensor) -> list[Tensor]:
        derivatives, scalar = [], output.pow(3).sum()
        for _ in range(3):
            found = grad(scalar, variables, create_graph=True)
            derivatives += [d.detach() for d in found]
            scalar = sum((d * torch.linspace(-1, 1, d.numel()).double().reshape(d.shape)).sum() for d in found)
        return derivatives

    replaced = {"0.weight": variables[1], "2.weight": variables[2]}
    expected = orders(torch.func.functional_call(model, replaced, (x,)))
    with frozen(model):
        got = orders(through(chain, x, replaced))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_only_the_gradients_that_are_asked_for_are_computed():
    """Of Jᵀu along u: a convolution for each tangent of an input, and one for that of the weight."""
    model, x = network("padded"), images().requires_grad_()
    chain = build_chain(model, x[:1].detach())
    weight = 2 * model[2].weight.detach().clone().requires_grad_()  # no leaf, as no weight that is scattered is
    with frozen(model):
        y = through(chain, x, {"2.weight": weight})
        u = torch.ones_like(y, requires_grad=True)
        gradients = grad(y, (weight, x), u, create_graph=True)
        with torch.profiler.profile() as profile:
            grad(gradients, u, [torch.ones_like(g) for g in gradients])
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::conv2d"] == 3 and "aten::convolution_backward" not in calls


def test_a_weight_that_changes_meanwhile_is_used():
    model, x = network("padded"), images()
    chain = build_chain(model, x[:1])
    with torch.no_grad(), frozen(model):
        before = chain.logits(x)
        model[2].weight.zero_()
        after = chain.logits(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x))


def test_a_layer_that_fails_has_its_own_forward_again():
    """A convolution is called as the module that it is, with the simpler form in its place meanwhile."""
    model, x = network("padded"), images()
    chain = build_chain(model, x[:1])

    def fail(*_: object) -> None:
        raise RuntimeError("half way")

    handle = model[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        chain.logits(x)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
