"""What the traced chain promises, for every family and variant of the cases.

The oracle is the model itself: hooks on its own submodules record what they compute when the model runs.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from cases import BY_NAME, Case, variants
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from snows_hf.adapters import Chain, State, build_chain, frozen, logits_of, outputs_of
from snows_hf.adapters.check import check_chain
from snows_hf.adapters.cut import HEAD, STEM, UNREAD
from snows_hf.adapters.flops import count_flops
from snows_hf.adapters.offload import offloaded
from snows_hf.masks.collapse import find_collapse
from snows_hf.method.objective import Segment


STEMS = (
    *("conv1", "conv1.0", "conv_stem", "patch_embed.proj", "stem.0", "resnet.embedder.embedder.convolution"),
    *("vision_model.embeddings.patch_embedding", "convnext.embeddings.patch_embeddings"),
    "convnextv2.embeddings.patch_embeddings",
    *(f"{name}.embeddings.patch_embeddings.projection" for name in ("vit", "deit", "dinov2", "beit", "swin")),
    "dinov2_with_registers.embeddings.patch_embeddings.projection",
)
HEADS = (
    *("fc", "linear", "head", "head.fc", "head_dist", "classifier", "classifier.1", "cls_classifier"),
    "distillation_classifier",
)
UNREAD_LAYERS = {
    "timm-vit-map": {"attn_pool.q"},  # it reads what is learnt, and is the same for all images
    "timm-vit-siglip": {"attn_pool.q"},
    # Of features that the classifier does not read.
    "transformers-siglip": {f"vision_model.head.{n}" for n in ("attention.out_proj", "mlp.fc1", "mlp.fc2")},
}
"""Layers that no group may hold: the first, the last, and those that no image comes through."""


class Built(NamedTuple):
    """A case in float64: its model and chain, the state before each operation, and each operation's output."""

    case: Case
    model: nn.Module
    chain: Chain
    images: Tensor
    states: list[State]
    outputs: list[Tensor]


@cache
def build(case: Case) -> Built:
    model, images = case.model(torch.float64), case.images(2, torch.float64)
    chain = build_chain(model, images[:1])
    states: list[State] = [(images,)]
    with torch.no_grad(), frozen(model):
        for operation in chain.operations:
            states.append(operation.run(states[-1]))
    return Built(case, model, chain, images, states[:-1], [state[0] for state in states[1:]])


@pytest.fixture(params=variants())
def built(request: pytest.FixtureRequest) -> Built:
    return build(BY_NAME[request.param])


def parameters(chain: Chain) -> list[str]:
    return [name for _, group in chain.groups() for name in group.parameters]


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All that goes into the model's own submodules and comes out of them in one run of the untouched model, in the
    order of its calls."""
    seen: list[Tensor] = []

    def note(passed: object) -> None:
        # Cloned at once: in-place activations and additions overwrite what the hook sees.
        seen.extend(leaf.clone() for leaf in tree_leaves(passed) if isinstance(leaf, Tensor))

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda _, args: note(args)))
        handles.append(module.register_forward_hook(lambda _, args, output: note(output)))
    try:
        outputs_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def of_each_image(value: Tensor, count: int) -> Tensor:
    """The numbers of each image, (n, …), in order of size: the same in whatever layout they are."""
    return value.reshape(count, -1).sort(1).values


def test_logits_are_the_models(built: Built) -> None:
    with torch.no_grad():
        expected = logits_of(built.model, built.images)
        torch.testing.assert_close(built.chain.logits(built.images), expected, rtol=0, atol=1e-10)
    check_chain(built.chain, built.images)


def test_every_output_is_what_the_model_computes(built: Built) -> None:
    """Each is what goes into one of the model's own submodules or comes out of it, in the order of its calls. There
    are no exceptions."""
    count = len(built.images)
    calls = iter(record(built.model, built.images))
    for operation, output in zip(built.chain.operations, built.outputs, strict=True):
        got = of_each_image(output, count)
        same = (
            call.numel() == got.numel() and torch.allclose(of_each_image(call.to(got), count), got, rtol=0, atol=1e-10)
            for call in calls
        )
        assert any(same), f"{operation.name} is not computed by the model after the operation before it"


def test_states_have_the_images_first(built: Built) -> None:
    for state in built.states:
        assert all(tensor.shape[0] == len(built.images) for tensor in state)


def test_segments_are_slices_of_the_full_run(built: Built) -> None:
    with torch.no_grad(), frozen(built.model):
        for index, group in built.chain.groups():
            own = {name: built.chain.weight(name).clone() for name in group.parameters}
            for k in (0, 1, 3, 1000):
                segment = Segment.cut(built.chain, index, k)
                expected = built.outputs[index : index + k + 1]
                for weights in (None, own):
                    got = segment.outputs(built.states[index], weights)
                    assert len(got) == len(expected)
                    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), group.name


def test_other_weights_change_the_outputs_and_leave_the_model_alone(built: Built) -> None:
    with torch.no_grad(), frozen(built.model):
        for index, group in built.chain.groups():
            before = {name: built.chain.weight(name).clone() for name in group.parameters}
            segment = Segment.cut(built.chain, index, 0)
            for name in group.parameters:
                (got,) = segment.outputs(built.states[index], {name: before[name] + 1.0})
                assert not torch.allclose(got, built.outputs[index]), name
            assert all(torch.equal(built.chain.weight(name), weight) for name, weight in before.items())


def test_groups_and_dense_layers_are_all_layers(built: Built) -> None:
    layers = {name for name, module in built.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    grouped = parameters(built.chain)
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert {name.removesuffix(".weight") for name in grouped} == layers - set(built.chain.dense)
    reasons = {reason: set[str]() for reason in (STEM, HEAD, UNREAD)}
    for name, reason in built.chain.dense.items():
        reasons[reason].add(name)
    assert len(reasons[STEM]) == 1 and reasons[STEM] <= set(STEMS)
    assert reasons[HEAD] == {name for name in HEADS if name in layers}
    assert reasons[UNREAD] == UNREAD_LAYERS.get(built.case.name, set())


def test_names_are_unique(built: Built) -> None:
    names = [operation.name for operation in built.chain.operations]
    groups = [group.name for _, group in built.chain.groups()]
    assert len(set(names)) == len(names)
    assert len(set(groups)) == len(groups)


@pytest.mark.parametrize("name", variants(["transformers-vit", "timm-swin", "timm-resnet-deep-stem"]))
def test_a_chain_that_is_made_again_is_the_same(name: str, own_traces: None) -> None:
    case = BY_NAME[name]
    first, second = (build_chain(case.model(), case.images(1)) for _ in range(2))
    assert [(o.name, o.group, o.layers) for o in first.operations] == [
        (o.name, o.group, o.layers) for o in second.operations
    ]


def test_every_operation_has_second_derivatives(built: Built) -> None:
    """One exact Hessian product through each operation, with respect to its weights or else to its input."""
    generator = torch.Generator().manual_seed(2)
    with frozen(built.model):
        for index, operation in enumerate(built.chain.operations):
            state = built.states[index]
            if operation.group is None:
                inputs = {"input": state[0].clone()}
            else:
                inputs = {name: built.chain.weight(name).detach().clone() for name in operation.group.parameters}
            variables = [tensor.requires_grad_() for tensor in inputs.values()]
            if operation.group is None:
                (output,) = built.chain.outputs((variables[0], *state[1:]), index, index + 1, {})
            else:
                (output,) = built.chain.outputs(state, index, index + 1, inputs)
            gradients = torch.autograd.grad(output.square().mean(), variables, create_graph=True)
            direction = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in variables]
            products = torch.autograd.grad(gradients, variables, direction)
            assert all(torch.isfinite(product).all() for product in products), operation.name
            assert any(product.abs().max() > 0 for product in products), operation.name


def test_chain_runs_with_gradients_and_the_models_own_settings(built: Built) -> None:
    """Outside ``frozen`` too: the parameters keep their gradients, and in-place activations corrupt nothing."""
    built.model.zero_grad()
    built.chain.logits(built.images).square().mean().backward()
    for _, group in built.chain.groups():
        assert all(built.chain.weight(name).grad.abs().max() > 0 for name in group.parameters), group.name
    built.model.zero_grad()


def test_frozen_puts_everything_back() -> None:
    model = BY_NAME["timm-resnet-squeeze-excitation"].model().train()
    model.layer1.eval()
    model.fc.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_masks_that_keep_everything_cut_nothing(built: Built) -> None:
    masks = {n: torch.ones_like(built.chain.weight(n), dtype=torch.bool) for n in parameters(built.chain)}
    assert find_collapse(built.chain, masks, built.images[:1]) == ({}, True)


def test_operations_of_every_layer_are_counted(built: Built) -> None:
    """Also where the model uses a module's weight without calling it, and in all what the model itself costs."""
    counted = count_flops(built.chain, built.images[:1])
    for name in parameters(built.chain):
        weight = built.chain.weight(name)
        assert counted[name.removesuffix(".weight")] >= 2 * weight.numel()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), frozen(built.model), counter, sdpa_kernel(SDPBackend.MATH):
        built.model(built.images[:1])
    assert counted[""] == counter.get_total_flops()


def test_an_offloaded_operation_brings_all_that_it_reads(built: Built) -> None:
    """All other weights and buffers are no numbers while it runs."""
    chain = offloaded(built.chain, built.images, torch.device("cpu"))
    tensors = built.model.state_dict(keep_vars=True) | dict(built.model.named_buffers())
    sizes = []
    for operation, state, expected in zip(chain.operations, built.states, built.outputs, strict=True):
        own = {name.removeprefix("model.") for name in operation.run.names}
        own |= {name for name, tensor in tensors.items() if any(tensor is tensors[other] for other in own)}
        others = {name: tensor.data for name, tensor in tensors.items() if name not in own}
        for name, tensor in others.items():
            tensors[name].data = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0)
        with torch.no_grad(), frozen(built.model):
            got = operation.run(state)[0]
        for name, tensor in others.items():
            tensors[name].data = tensor
        assert torch.equal(got, expected), operation.name
        sizes.append(sum(tensors[name].numel() for name in own))
    assert max(sizes) < sum(tensor.numel() for tensor in tensors.values())


def test_an_offloaded_chain_is_differentiated_as_it_was(built: Built) -> None:
    """An outer functional call's weights stand, and gradients reach them."""
    chain = offloaded(built.chain, built.images, torch.device("cpu"))
    for index, group in built.chain.groups()[:2]:
        gradients = []
        for which in (built.chain, chain):
            weights = {n: (which.weight(n).detach() + 0.1).requires_grad_() for n in group.parameters}
            with frozen(built.model):
                outputs = which.outputs(built.states[index], index, index + 3, weights)
                loss = sum(output.square().mean() for output in outputs)
                gradients.append(torch.autograd.grad(loss, list(weights.values())))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), group.name
