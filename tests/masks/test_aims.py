"""What layers are fitted to, against least squares on what they read, in float64."""

from dataclasses import replace

import pytest
import torch
from networks import convolutions, evidence, images_for, linears
from torch import Tensor, nn
from torch.func import functional_call

from snows_hf.adapters import Group, Operation, build_chain, register
from snows_hf.adapters.frozen import frozen
from snows_hf.jobs.subject import weights_of
from snows_hf.masks import aims
from snows_hf.masks.aims import (
    APART,
    EVENLY,
    HEAVIEST,
    aim_of,
    bias_for,
    coupled,
    damped,
    dense_aims,
    halfway_aims,
    halfway_fits,
    importance,
    slope_of,
)
from snows_hf.masks.evidence import matrix, unmatrix
from snows_hf.masks.scores.alps import alps
from snows_hf.masks.scores.obc import refit
from snows_hf.method.preconditioner import channels_in_end, gram


def pruned_weights(given, seed: int = 0) -> dict[str, Tensor]:
    """Every layer's weights, half of them gone."""
    generator = torch.Generator().manual_seed(seed)
    return {n: w * (torch.rand(w.shape, generator=generator) < 0.5) for n, w in given.weights.items()}


def aims_with(given, weights):
    """Aims of all layers where each is pruned to ``weights`` as soon as it has its own."""
    done, found = {}, []
    for aim in halfway_aims(given, done):
        found.append(aim)
        done[aim.name] = weights[aim.name]
    return found


@pytest.mark.parametrize("make", [linears, convolutions])
def test_of_a_network_that_stays_dense_each_layer_is_its_own_aim(make):
    given = evidence(make(), "0.5", "alps")
    expected = {aim.name: aim for aim in dense_aims(given, {})}
    found = aims_with(given, given.weights)
    assert [aim.name for aim in found] == list(given.weights)
    for aim in found:
        torch.testing.assert_close(aim.W, expected[aim.name].W)
        torch.testing.assert_close(aim.W, matrix(given.weights[aim.name]))
        if make is linears:  # of a single position
            torch.testing.assert_close(aim.H, expected[aim.name].H)


@pytest.mark.parametrize("make", [linears, convolutions])
def test_positions_and_channels_weigh_as_the_outputs_depend_on_them(make):
    """By whole Jacobians; one random cotangent an image is right on average, and of one output exactly."""
    model = make()
    model.layers[-1] = nn.Linear(4, 1).double()
    given = evidence(model, "0.5", "alps", count=8, batch_size=8)
    with frozen(given.network.model):
        found = importance(given)
    for name, (positions, channels) in found.items():
        module, squares, products = model.get_submodule(name.removesuffix(".weight")), [], 0.0
        for image in given.images:

            def replaced(z, module=module, image=image):
                with module.register_forward_hook(lambda *_: z):
                    return model(image[None])[0, 0]

            (z, *_) = recorded_outputs(model, module, image[None])
            jacobian = torch.autograd.functional.jacobian(replaced, z)
            g = channels_in_end(module, jacobian)
            squares.append(g.square().mean(-1).flatten())
            products = products + torch.einsum("...c,...d->cd", g.flatten(0, -2), g.flatten(0, -2))
        mean = torch.stack(squares).mean(0)
        own = EVENLY + (1 - EVENLY) * (mean / mean.mean()).clamp_max(HEAVIEST)
        torch.testing.assert_close(positions, own.float())
        expected = APART * torch.eye(len(products)) + (1 - APART) * products / products.diagonal().mean()
        torch.testing.assert_close(channels, expected.float())


@pytest.mark.parametrize("products", [torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), torch.nan)])
def test_channels_that_nothing_depends_on_or_nobody_can_tell_count_apart(products):
    assert torch.equal(coupled(products), torch.eye(3))


def recorded_outputs(model: nn.Module, module: nn.Module, x: Tensor) -> list[Tensor]:
    seen = []
    with module.register_forward_hook(lambda m, args, out: seen.append(out.detach())):
        model(x)
    return seen


def test_a_gram_matrix_of_weighted_positions_is_a_sum_over_them():
    model = convolutions()
    x, module = images_for(model), model.layers[1]
    columns = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    weights = torch.rand(columns.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sum(
        w * torch.einsum("ngc,ngd->gcd", column, column)
        for w, column in zip(weights, columns.unflatten(1, (2, -1)).unbind(-1), strict=True)
    )
    torch.testing.assert_close(gram(module, x, weights=weights), expected)


def recorded(model: nn.Module, weights: dict[str, Tensor], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every layer reads and puts out with these weights."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            note = lambda m, x, out, n=f"{name}.weight": seen.update({n: (x[0].detach(), out.detach())})  # noqa: E731
            handles.append(module.register_forward_hook(note))
    functional_call(model, weights, (images,))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("count, batch_size", [(12, 12), (12, 5)])
def test_two_views_of_each_image_are_as_many_images(count, batch_size):
    """Mirrored images, given as images of their own, lead to the same aims where all positions weigh alike."""
    model = convolutions()
    images = images_for(model, count)
    given = evidence(model, "0.5", "alps", count=count, batch_size=batch_size, views=2)
    both = replace(given, images=torch.cat([images, images.flip(3)]), config=given.config.updated(views=1))
    found, expected = (fits_with(own, pruned_weights(given)) for own in (given, both))
    assert torch.equal(given.images, images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.gram, other.gram)
        torch.testing.assert_close(one.shift, other.shift)


def fits_with(given, weights):
    """As :func:`aims_with`, with positions that weigh alike."""
    done, fits = {}, []
    alike = {n: own._replace(positions=torch.ones_like(own.positions)) for n, own in importance(given).items()}
    for fit in halfway_fits(given, done, alike):
        fits.append(fit)
        done[fit.name] = weights[fit.name]
    return fits


class Residual(nn.Module):
    """A residual stream; what is added to it is scaled, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.0, -3.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.scale * self.two(torch.tanh(x))


@register(Residual, family="small")
def residual(model: Residual) -> list[Operation]:
    def first(state):
        return (state[0] + model.one(state[0]),)

    def second(state):
        return (state[0] + model.scale * model.two(torch.tanh(state[0])),)

    return [
        Operation("one", first, Group.of("one", "linear")),
        Operation("two", second, Group.of("two", "linear")),
    ]


def test_a_layer_makes_up_for_half_of_what_the_residual_stream_lacks():
    """z* is found by hand: (z* - W x̂) · scale is half of the difference between the two streams after the layer."""
    model = Residual().double().eval()
    given = evidence(linears(), "0.5", "alps")
    chain, images = build_chain(model), images_for(linears(), 40)
    given = replace(given, weights=weights_of(chain), chain=chain, images=images)
    weights = pruned_weights(given)
    _, aim = aims_with(given, weights)
    with torch.no_grad():
        dense, pruned = (functional_call(model, w, (images,)) for w in ({}, {"one.weight": weights["one.weight"]}))
    _, (x, z) = recorded(model, {"one.weight": weights["one.weight"]}, images).values()
    wanted = z + (dense - pruned) / 2 / model.scale.detach()
    H = x.T @ x
    ridge = (damped(H[None])[0] - H).diagonal().sqrt().diag()
    W = model.two.weight.detach()
    lhs, rhs = torch.cat([x, ridge]), torch.cat([wanted, ridge @ W.T])
    torch.testing.assert_close(aim.W, torch.linalg.lstsq(lhs, rhs).solution.T)


class Products(nn.Module):
    """Two layers that read the same, and one that is mixed with itself afterwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two, self.mixed = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.mixed(self.one(x) * self.two(x)).softmax(-1)


@register(Products, family="small")
def products(model: Products) -> list[Operation]:
    return [
        Operation("first", lambda state: (model.first(state[0]).tanh(),), Group.of("first", "linear")),
        Operation(
            "both",
            lambda state: (model.one(state[0]) * model.two(state[0]),),
            Group("both", ("one.weight", "two.weight"), "linear"),
        ),
        Operation("mixed", lambda state: (model.mixed(state[0]).softmax(-1),), Group.of("mixed", "linear")),
    ]


def test_layers_whose_outputs_are_mixed_are_fitted_to_the_mean_of_their_own_outputs():
    model = Products().double().eval()
    chain, images = build_chain(model), images_for(linears(), 40)
    given = evidence(linears(), "0.5", "alps")
    given = replace(given, weights=weights_of(chain), chain=chain, images=images)
    weights = pruned_weights(given)
    dense, pruned = (recorded(model, w, images) for w in ({}, weights))
    for aim in aims_with(given, weights)[1:]:
        W, (x, _), (x_now, _) = given.weights[aim.name], dense[aim.name], pruned[aim.name]
        ridge = (damped((x_now.T @ x_now)[None])[0] - x_now.T @ x_now).diagonal().sqrt().diag()
        lhs, rhs = torch.cat([x_now, ridge]), torch.cat([(x + x_now) / 2 @ W.T, ridge @ W.T])
        torch.testing.assert_close(aim.W, torch.linalg.lstsq(lhs, rhs).solution.T)


class Biased(nn.Module):
    """Two convolutions, the second one in groups, the last with a bias of its own or a batch norm after it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, (1, 2), groups=2, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x).tanh()))


@register(Biased, family="small")
def biased(model: Biased) -> list[Operation]:
    bias = "two.bias" if isinstance(model.norm, nn.Identity) else "norm.bias"
    return [
        Operation("one", lambda state: (model.one(state[0]).tanh(),), Group.of("one", "conv", "one.bias")),
        Operation("two", lambda state: (model.norm(model.two(state[0])),), Group.of("two", "conv", bias)),
    ]


@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_that_moves_is_fitted_with_the_weights_that_are_left(monkeypatch, norm):
    """Against least squares of each row on what it still reads and a constant; positions weigh alike."""
    monkeypatch.setattr(aims, "DAMPING", 1e-9)
    model = Biased(norm).double().eval()
    chain, images = build_chain(model), images_for(convolutions(), 60)
    given = evidence(convolutions(), "0.5", "alps", biases=True)
    given = replace(given, weights=weights_of(chain), chain=chain, images=images)
    weights = pruned_weights(given)
    _, fit = fits_with(given, weights)
    aim = aim_of(given, fit)
    kept = torch.rand(aim.W.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    updated = refit(aim.W, aim.H, kept)
    ((name, bias),) = bias_for(given, aim, updated).items()

    with torch.no_grad():
        x = functional_call(model.one, {"weight": weights["one.weight"]}, images).tanh()
        wanted = (model.two(x) + model.two(model.one(images).tanh())) / 2  # norms only scale what is lacking
        columns = nn.functional.unfold(x, (1, 2)).unflatten(1, (2, -1)).movedim(-1, 1).flatten(0, 1)
        if norm:
            bias = -bias  # the norm's mean was 0
    assert name == ("norm.running_mean" if norm else "two.bias")
    for row in range(6):
        own = unmatrix(kept, model.two.weight.shape)[row].flatten()
        inputs = torch.cat([columns[:, row // 3, own], torch.ones(len(columns), 1)], 1)
        found = torch.linalg.lstsq(inputs, wanted[:, row].flatten()).solution
        torch.testing.assert_close(unmatrix(updated, model.two.weight.shape)[row].flatten()[own], found[:-1])
        torch.testing.assert_close(bias[row], found[-1])


class Hidden(nn.Module):
    """A residual stream with units between two layers, which a smaller network has fewer of."""

    def __init__(self, units: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, units), nn.Linear(units, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).tanh())


@register(Hidden, family="small")
def hidden(model: Hidden) -> list[Operation]:
    return [
        Operation("one", lambda state: (model.one(state[0]).tanh(), state[0]), Group.of("one", "linear")),
        Operation("two", lambda state: (state[1] + model.two(state[0]),), Group.of("two", "linear")),
    ]


def test_a_network_without_units_is_fitted_to_the_one_that_has_them():
    """What reads the stream keeps its own units, of which the other has more; what ends in it goes halfway."""
    whole, model = Hidden(8).double().eval(), Hidden(3).double().eval()
    chain, images = build_chain(model), images_for(linears(), 40)
    given = evidence(linears(), "0.5", "alps")
    given = replace(given, weights=weights_of(chain), chain=chain, images=images, teacher=build_chain(whole))
    one, two = aims_with(given, given.weights)
    torch.testing.assert_close(one.W, given.weights["one.weight"])
    with torch.no_grad():
        x = model.one(images).tanh()
        wanted = model.two(x) + (whole(images) - model(images)) / 2
    ridge = (damped((x.T @ x)[None])[0] - x.T @ x).diagonal().sqrt().diag()
    lhs, rhs = torch.cat([x, ridge]), torch.cat([wanted, ridge @ given.weights["two.weight"].T])
    torch.testing.assert_close(two.W, torch.linalg.lstsq(lhs, rhs).solution.T)


def test_biases_stay_where_they_are_not_asked_to_move():
    given = evidence(convolutions(), "0.5", "alps")
    assert all(bias_for(given, aim, aim.W) == {} for aim in aims_with(given, pruned_weights(given)))


def test_a_layer_that_stays_dense_reaches_its_aim_and_those_after_read_what_it_makes_then():
    """It has no mask; with the last layer free, what that ends with is the aim of one that is not pruned."""
    given = evidence(convolutions(), "0.5", "alps")
    *_, (last, weight) = given.weights.items()
    given = replace(given, weights={n: w for n, w in given.weights.items() if n != last}, free={last: weight})
    choice = alps(given)
    assert list(choice.masks) == list(given.weights) and list(choice.free) == [last]
    aim = aims_with(given, {**choice.weights, last: weight})[-1]
    torch.testing.assert_close(matrix(choice.weights[last]), aim.W)
    assert not torch.allclose(choice.weights[last], weight)


class NormBetween(nn.Module):
    """A batch norm that no operation ends with: it is part of the next layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)))


@register(NormBetween, family="small")
def norm_between(model: NormBetween) -> list[Operation]:
    return [
        Operation("one", lambda state: (model.one(state[0]),), Group.of("one", "linear")),
        Operation("two", lambda state: (model.two(model.norm(state[0])),), Group.of("two", "linear")),
    ]


def test_a_layer_reads_what_a_mean_that_has_moved_makes_of_the_layer_before():
    model = NormBetween().double().eval()
    chain, images = build_chain(model), images_for(linears(), 40)
    given = evidence(linears(), "0.5", "alps")
    given = replace(given, weights=weights_of(chain), chain=chain, images=images)
    done = dict[str, Tensor]()
    fits = halfway_fits(given, done)
    next(fits)
    done |= {"one.weight": pruned_weights(given)["one.weight"], "norm.running_mean": torch.arange(4.0).double()}
    fit = next(fits)
    with torch.no_grad():
        own = functional_call(model.one, {"weight": done["one.weight"]}, images)
        x = functional_call(model.norm, {"running_mean": done["norm.running_mean"]}, own)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    torch.testing.assert_close(fit.gram[0], (x.T @ x).to(fit.gram))
    assert not model.norm.running_mean.any()  # that of the dense network stays


def test_slopes_are_of_outputs_that_depend_on_one_entry_each():
    z = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(slope_of(z * scale + 1, z), scale.abs().expand(3, 5, 4))
    torch.testing.assert_close(slope_of(z.relu(), z), (z > 0).double())
    assert slope_of(z.softmax(-1), z) is None
    assert slope_of(z.cumsum(1), z) is None
    assert slope_of(z.sum(-1), z) is None
