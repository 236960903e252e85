"""Channels in another order: the same network, and more that the pattern keeps."""

import itertools

import pytest
import tiny
import torch
from cases import BY_NAME
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from snows_hf.adapters import Chain, Operation, build_chain
from snows_hf.errors import ConfigError
from snows_hf.masks.permutation import better_order, candidates, free_channels, kept, order_channels, order_like
from snows_hf.patterns import NM, Unstructured
from snows_hf.patterns.plan import order_for
from snows_hf.settings import PruneConfig


def bottlenecks() -> ResNet:
    return tiny.randomised(ResNet(Bottleneck, [1, 1, 1, 1], channels=(8, 8, 16, 16), num_classes=3), 0)


FREE = {
    tiny.cifar_resnet: {f"layer{stage}.0.conv2.weight" for stage in (1, 2, 3)},
    tiny.timm_resnet: {f"layer{stage}.0.conv2.weight" for stage in (1, 2, 3, 4)},
    bottlenecks: {f"layer{stage}.0.conv{place}.weight" for stage in (1, 2, 3, 4) for place in (2, 3)},
    tiny.timm_vit: {f"blocks.{block}.mlp.fc2.weight" for block in (0, 1)},
    tiny.transformers_vit: {f"vit.layers.{block}.mlp.fc2.weight" for block in (0, 1)},
}


@pytest.mark.parametrize("network", FREE)
def test_channels_are_free_where_no_residual_stream_or_head_reads_them(network):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chain = build_chain(model)
    found = free_channels(chain, tiny.images(2), [name for _, group in chain.groups() for name in group.parameters])
    assert {channels.reader for channels in found} == FREE[network]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=str)
@pytest.mark.parametrize("network", FREE)
def test_the_network_stays_what_it_is_and_the_pattern_keeps_more(network, pattern):
    model, dense = network(), network()
    gains = order_channels(build_chain(model), pattern, tiny.images(2), FREE[network])
    assert set(gains) == FREE[network]
    images = tiny.images(5, seed=3)
    with torch.no_grad():
        logits, expected = (build_chain(net).logits(images) for net in (model, dense))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for name, shares in gains.items():
        measured = []
        for net in (dense, model):
            weight = net.get_parameter(name).detach().abs()
            measured.append(float(weight[pattern.mask(weight)].sum() / weight.sum()))
        assert shares == pytest.approx(measured, rel=1e-5)
        assert measured[1] >= measured[0] - 1e-6
    assert any(after > before for before, after in gains.values())


@pytest.mark.parametrize("network", FREE)
def test_an_order_is_found_again_from_biases_and_norms(network):
    model, dense = network(), network()
    names = order_channels(build_chain(model), NM(1, 4), tiny.images(2), FREE[network])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = {name: tensor + (tensor.dim() > 1) for name, tensor in expected.items()}
    assert order_like(build_chain(dense), pruned, tiny.images(1, seed=3), names)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.state_dict().items())


def test_an_order_that_cannot_be_told_is_not_guessed():
    model, dense = tiny.timm_vit(), tiny.timm_vit()
    names = order_channels(build_chain(model), NM(1, 4), tiny.images(2), FREE[tiny.timm_vit])
    retrained = {name: tensor + 1e-3 for name, tensor in model.state_dict().items()}
    assert not order_like(build_chain(dense), retrained, tiny.images(1), names)
    with torch.no_grad():
        for net in (model, dense):  # the same bias in two channels
            net.blocks[0].mlp.fc1.bias.zero_()
    assert not order_like(build_chain(dense), model.state_dict(), tiny.images(1), names)
    for name in names:
        assert torch.equal(dense.get_parameter(name), tiny.timm_vit().get_parameter(name)) == ("blocks.0" in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_images_and_weights_may_differ_in_precision(dtype):
    for weights, images in ((torch.float64, dtype), (dtype, torch.float64)):
        model = tiny.timm_vit().to(weights)
        given = tiny.images(2).to(images)
        assert set(order_channels(build_chain(model), NM(1, 4), given, FREE[tiny.timm_vit])) == FREE[tiny.timm_vit]


def test_layers_that_are_not_pruned_keep_their_order():
    model, dense = tiny.cifar_resnet(), tiny.cifar_resnet()
    name = "layer2.0.conv2.weight"
    assert set(order_channels(build_chain(model), NM(1, 4), tiny.images(2), [name])) == {name}
    for key, tensor in model.state_dict().items():
        moved = key == name or (key.startswith(("layer2.0.conv1", "layer2.0.bn1")) and tensor.dim() > 0)
        assert torch.equal(tensor, dense.state_dict()[key]) != moved, key


FAMILIES = {
    "timm-mobilenet": 4,  # through the depthwise convolution
    "timm-vit-scale-norms": 2,  # through the norm inside the MLP
    "timm-resnet-squeeze-excitation": 10,
    "transformers-dinov2": 2,
    "transformers-siglip": 2,
    "timm-swin": 4,
    "transformers-convnext": 3,
    "transformers-convnextv2": 0,  # its response norm looks across channels
    "timm-resnext": 0,  # grouped convolutions
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name):
    case = BY_NAME[name]
    model, dense = case.model(torch.float64), case.model(torch.float64)
    names = [name for _, group in build_chain(model).groups() for name in group.parameters]
    gains = order_channels(build_chain(model), NM(1, 2), case.images(2, torch.float64), names)
    assert len(gains) == FAMILIES[name]
    images = case.images(3, torch.float64).flip(-1)
    with torch.no_grad():
        logits, expected = (build_chain(net).logits(images) for net in (model, dense))
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


def test_channels_of_grouped_convolutions_stay():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))).mean((2, 3))

    model = Grouped()
    chain = Chain(model, [Operation("all", lambda state: (model(*state),))], "")
    assert candidates(chain, torch.zeros(2, 3, 4, 4), {"b.weight", "c.weight"}) == []


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 4), (2, 3), (4, 8)])
def test_what_is_kept_is_the_best_of_all_choices(n, m):
    groups = torch.rand(6, m, 5, generator=torch.Generator().manual_seed(0))
    choices = [groups[:, list(some)].sum(1) for some in itertools.combinations(range(m), n)]
    torch.testing.assert_close(kept(groups, n), torch.stack(choices).amax(0).sum(1))


def kept_by(magnitudes: Tensor, order: list[int], pattern: NM) -> float:
    return float(kept(magnitudes[order].unflatten(0, (-1, pattern.m)), pattern.n).sum())


@pytest.mark.parametrize("pattern", [NM(1, 3), NM(2, 3), NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_of_two_columns_would_gain(pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(4 * pattern.m, 5, generator=generator)
    order = better_order(magnitudes, pattern).tolist()
    assert sorted(order) == list(range(len(order)))
    reached = kept_by(magnitudes, order, pattern)
    for i, j in itertools.combinations(range(len(order)), 2):
        swapped = list(order)
        swapped[i], swapped[j] = order[j], order[i]
        assert kept_by(magnitudes, swapped, pattern) <= reached * (1 + 1e-5)


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4)], ids=str)
def test_two_groups_come_close_to_the_best_of_all_orders(pattern):
    """Of all 35 ways to divide eight columns between two groups."""
    ratios = []
    for seed in range(20):
        magnitudes = torch.rand(8, 6, generator=torch.Generator().manual_seed(seed))
        ways = [[0, *rest] for rest in itertools.combinations(range(1, 8), 3)]
        best = max(kept_by(magnitudes, [*way, *(set(range(8)) - set(way))], pattern) for way in ways)
        ratios.append(kept_by(magnitudes, better_order(magnitudes, pattern).tolist(), pattern) / best)
    assert min(ratios) > 0.97 and sum(ratio > 0.99999 for ratio in ratios) >= 12


def test_columns_that_are_large_in_the_same_rows_are_set_apart():
    """Four rows; each has its four large weights in one group of columns: apart, 1:4 keeps all of them."""
    magnitudes = torch.eye(4).repeat_interleave(4, 0)
    assert kept_by(magnitudes, list(range(16)), NM(1, 4)) == 4
    assert kept_by(magnitudes, better_order(magnitudes, NM(1, 4)).tolist(), NM(1, 4)) == 16


def test_a_single_group_has_one_order():
    assert better_order(torch.rand(4, 3), NM(2, 4)).tolist() == [0, 1, 2, 3]


def test_channels_are_ordered_for_the_sparsest_of_one_size():
    asked = PruneConfig("1:4", permute=True)
    assert order_for(asked, [NM(2, 4), NM(1, 4), None]) == NM(1, 4)
    for several in ([Unstructured(0.5)], [NM(2, 4), NM(4, 8)], [NM(2, 4), Unstructured(0.5)]):
        with pytest.raises(ConfigError, match="cannot be ordered"):
            order_for(asked, several)
    with pytest.raises(ConfigError, match="from a file"):
        order_for(asked.updated(mask="masks.safetensors"), [NM(1, 4)])


def test_unasked_channels_are_ordered_where_less_than_half_is_kept():
    default = PruneConfig("1:4")
    assert order_for(default, [NM(1, 4)]) == NM(1, 4)
    assert order_for(default.updated(permute=False), [NM(1, 4)]) is None
    assert order_for(default.updated(mask="masks.safetensors"), [NM(1, 4)]) is None
    for others in (
        [NM(2, 4)],
        [NM(1, 4), NM(2, 4)],
        [NM(1, 4), None],
        [Unstructured(0.9)],
        [NM(1, 4), Unstructured(0.9)],
        [NM(1, 4), NM(1, 8)],
    ):
        assert order_for(default, others) is None
