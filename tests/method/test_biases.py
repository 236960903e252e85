"""Biases that move with the weights of their layers."""

from pathlib import Path

import pytest
import tiny
import torch
from cases import timm_resnet, timm_vit
from timm.models.beit import Beit
from torch import nn

from snows_hf.adapters import build_chain
from snows_hf.method.cascade import prune_chain
from snows_hf.method.objective import ActiveWeights
from snows_hf.method.streams import moved, whole_network
from snows_hf.patterns import NM
from snows_hf.runtime.journal import Journal
from snows_hf.runtime.run import Progress, Run


NETWORKS = [tiny.transformers_vit, pytest.param(tiny.timm_vit, marks=pytest.mark.slow), tiny.timm_resnet]
SETTINGS = {"biases": True, "preconditioner": "gram", "batch_size": 45}


def test_a_layer_shifts_by_its_own_bias_or_by_that_of_the_batch_norm_after_it():
    linear = tiny.chain_of(tiny.transformers_vit()).biases
    assert all(bias == weight.removesuffix("weight") + "bias" for weight, bias in linear.items())
    assert sum("attention" in name for name in linear) == 8 and len(linear) == 12
    convolutions = tiny.chain_of(tiny.timm_resnet()).biases
    assert convolutions["layer2.0.conv2.weight"] == "layer2.0.bn2.bias"
    assert convolutions["layer2.0.downsample.0.weight"] == "layer2.0.downsample.1.bias"
    assert len(convolutions) == 12


def tied() -> nn.Module:
    """Two batch norms of one bias."""
    model = timm_resnet()
    model.layer1[0].bn2.bias = model.layer1[0].bn1.bias
    return model


@pytest.mark.parametrize(
    ("make", "size", "without"),
    [
        (lambda: timm_vit(Beit, qkv_bias=True, use_rel_pos_bias=True), 16, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (lambda: timm_resnet(norm_layer="groupnorm1"), 32, None),
        (tied, 32, ["layer1.0.conv1", "layer1.0.conv2"]),
    ],
    ids=["computed", "group norms", "tied"],
)
def test_what_is_computed_shared_or_something_else_is_no_bias(make, size, without):
    chain = build_chain(make().eval(), torch.zeros(1, 3, size, size))
    weights = [name for _, group in chain.groups() for name in group.parameters]
    found = {name.removesuffix(".weight") for name in weights if name not in chain.biases}
    assert found == ({*without} if without else {name.removesuffix(".weight") for name in weights})


def test_biases_are_active_where_their_weights_have_masks():
    model = tiny.timm_vit()
    chain, masks = tiny.chain_of(model), tiny.magnitude_masks(model)
    name = next(iter(masks))
    segment = whole_network(chain, {name: masks[name]})
    without, active = (
        ActiveWeights.of(segment.group, {name: masks[name]}, torch.device("cpu"), biases) for biases in (False, True)
    )
    bias = chain.biases[name]
    assert [*without.masks] == [*active.weights] == [name] and [*active.masks] == [name, bias]
    assert active.size == without.size + len(model.get_parameter(bias))
    w = active.within(chain)
    assert torch.equal(active.scatter(w)[bias], model.get_parameter(bias))
    assert torch.equal(active.gather(active.scatter(w)), w)
    assert moved(chain, masks, False) == [*masks] and moved(chain, {name: masks[name]}, True) == [name, bias]


@pytest.mark.parametrize("network", NETWORKS)
def test_biases_move_and_the_loss_is_lower(network):
    """Nothing else moves; reports count weights alone."""
    dense = network()
    settings = SETTINGS | {"joint_steps": 3}
    plain, run = (tiny.prune(dense, 100, **settings | {"biases": biases}) for biases in (False, True))
    improved = [name for report in run.reports if report.status == "improved" for name in report.parameters]
    moving = {*run.masks, *moved(tiny.chain_of(dense), dict.fromkeys(improved), True)}
    assert len(moving) >= 1.5 * len(run.masks)
    for name, tensor in run.pruned.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]) == (name not in moving), name
    for name, mask in run.masks.items():
        assert torch.equal(run.pruned.get_parameter(name) != 0, mask)
    for ours, theirs in zip(run.reports, plain.reports, strict=True):
        assert (ours.name, ours.shape, ours.parameters) == (theirs.name, theirs.shape, theirs.parameters)
        assert ours.sparsity == theirs.sparsity
        assert ours.loss_pruned <= ours.loss_start
    assert run.reports[-1].loss_pruned <= plain.reports[-1].loss_pruned


@pytest.mark.parametrize("targets", ["dense", pytest.param("cascaded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", [tiny.timm_resnet, tiny.transformers_vit])
def test_targets_are_those_of_the_dense_biases(network, targets):
    """A copy of the dense weights, which only later solves need, changes nothing: where a shortcut's convolution is
    solved, the bias of a batch norm after it has moved already."""
    dense, settings = network(), SETTINGS | {"targets": targets}
    once, again = (tiny.prune(dense, 60, **settings | {"joint_steps": steps}).reports for steps in (0, 1))
    for first, second in zip(once, again[:-1], strict=True):
        assert {**first.to_dict(), "seconds": 0} == {**second.to_dict(), "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("gradual", [0.0, 0.5])
def test_a_run_that_is_broken_off_gives_the_same_bits(gradual, tmp_path: Path):
    class StopError(Exception):
        pass

    def prune(run: Run) -> nn.Module:
        model = tiny.timm_resnet()
        masks = tiny.magnitude_masks(model)
        config = tiny.config(**SETTINGS | {"gradual": gradual, "joint_steps": 4, "layer_steps": 1})
        prune_chain(build_chain(model), tiny.images(60), masks, config, run, pattern=NM(1, 4) if gradual else None)
        return model

    def interrupt(progress: Progress) -> None:
        nonlocal left
        left -= bool(progress.detail)
        if left == 0:
            raise StopError

    whole, dense = prune(Run()).state_dict(), tiny.timm_resnet().state_dict()
    for steps in (5, 9):  # in the middle of the layers, and of the joint steps
        left = steps
        with pytest.raises(StopError):
            prune(Run(journal=Journal(tmp_path), on_progress=interrupt))
    again = prune(Run(journal=Journal(tmp_path))).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    pattern = NM(1, 4) if gradual else NM(2, 4)
    assert all(pattern.holds(whole[name]) for name in tiny.magnitude_masks(tiny.timm_resnet()))
    assert all(not torch.equal(whole[name], dense[name]) for name in build_chain(tiny.timm_resnet()).biases.values())
