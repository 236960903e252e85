"""What every adapter promises, for every supported family and variant.

The oracle is the model itself: hooks on its own submodules record what they compute when the model runs.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from snows_hf.adapters import Chain, State, base, build_chain, frozen
from snows_hf.adapters.check import check_chain
from snows_hf.adapters.flops import count_flops
from snows_hf.adapters.offload import offloaded
from snows_hf.adapters.outputs import logits_of
from snows_hf.masks.collapse import find_collapse
from snows_hf.method.objective import Segment


DENSE = (
    *("conv1.", "conv_stem.", "maxpool.", "resnet.embedder.", "patch_embed.", "vit.embeddings.", "deit.embeddings."),
    *("dinov2.embeddings.", "dinov2_with_registers.embeddings.", "beit.embeddings.", "swin.embeddings.", "stem."),
    *("vision_model.embeddings.", "vision_model.head.", "convnext.embeddings.", "convnextv2.embeddings."),
    *("fc.", "linear.", "head.", "head_dist.", "attn_pool.", "classifier.", "cls_classifier."),
    "distillation_classifier.",
)
"""Stems, embeddings and heads: how the names of weights begin that no group may hold."""


class Built(NamedTuple):
    """A case in float64: its model and chain, the state before each operation, and each operation's output."""

    model: nn.Module
    chain: Chain
    images: Tensor
    states: list[State]
    outputs: list[Tensor]


@cache
def build(case: Case) -> Built:
    model, images = case.model(torch.float64), case.images(2, torch.float64)
    chain = build_chain(model)
    states: list[State] = [(images,)]
    with torch.no_grad(), frozen(model):
        for operation in chain.operations:
            states.append(operation.run(states[-1]))
    return Built(model, chain, images, states[:-1], [state[0] for state in states[1:]])


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest) -> Built:
    return build(request.param)


def parameters(chain: Chain) -> list[str]:
    return [name for _, group in chain.groups() for name in group.parameters]


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """First input and output of every submodule by name, and the logits, of one run of the untouched model."""
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module) -> list:
        # Cloned at once: in-place activations and additions overwrite what the hook sees.
        def before(_: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                entered[name] = args[0].clone()

        def after(_: nn.Module, args: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                left[name] = output.clone()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    handles = [handle for name, module in model.named_modules() for handle in hook(name, module)]
    try:
        logits = logits_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return entered, left, logits


def where(chain: Chain, index: int) -> tuple[str, str]:
    """Submodule whose input or output, in the model, the output of operation ``index`` must equal."""
    modules = dict(chain.model.named_modules())
    names = [operation.name for operation in chain.operations]
    subject, _, event = names[index].partition(" > ")
    parent = subject.rpartition(".")[0]
    vit = chain.family == "vit"
    if names[index] == "patch_embed":  # timm: position embeddings, dropout and pre-norm included
        return ("blocks.0" if "blocks.0" in modules else "layers.0"), "in"
    if event == "attention":
        projections = (f"{parent}.{name}" for name in ("proj", "o_proj", "out_proj"))
        return next(name for name in projections if name in modules), "in"
    if event == "residual" and vit and subject.endswith("proj"):
        block = parent.rpartition(".")[0]
        norms = (f"{block}.{norm}" for norm in ("norm2", "layernorm_after", "layer_norm2"))
        return next(name for name in norms if name in modules), "in"
    if event == "residual" and vit:
        # ConvNeXt of transformers has no module for the MLP.
        return (parent if subject.endswith("pwconv2") else parent.rpartition(".")[0]), "out"
    if event == "activation" and vit:
        return next(f"{parent}.{act}" for act in ("act", "activation_fn") if f"{parent}.{act}" in modules), "out"
    if event == "activation":
        if subject == "conv_head":
            return "bn2", "out"
        if index + 2 < len(names):
            return names[index + 1], "in"
        return parent, "out"
    return subject, "out"


def test_logits_are_the_models(built: Built) -> None:
    with torch.no_grad():
        expected = logits_of(built.model, built.images)
        torch.testing.assert_close(built.chain.logits(built.images), expected, rtol=0, atol=1e-10)
    check_chain(built.chain, built.images)


def test_every_output_is_what_the_model_computes(built: Built) -> None:
    entered, left, logits = record(built.model, built.images)
    for index, got in enumerate(built.outputs[:-1]):
        name, side = where(built.chain, index)
        expected = (entered if side == "in" else left)[name]
        message = f"{built.chain.operations[index].name} is not the {side}put of {name}"
        if "swin" in type(built.model).__name__.lower():  # windows, rows and columns may be one dimension in the model
            assert (len(got), got.shape[-1]) == (len(built.images), expected.shape[-1]), message
            expected = expected.reshape(got.shape)
        assert got.shape == expected.shape, message
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10, msg=message)
    torch.testing.assert_close(built.outputs[-1], logits, rtol=0, atol=1e-10)


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


def test_groups_hold_the_weights_of_all_blocks_and_no_others(built: Built) -> None:
    parameters = dict(built.model.named_parameters())
    grouped = [name for _, group in built.chain.groups() for name in group.parameters]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert all(name in parameters and parameters[name].ndim in (2, 4) for name in grouped)
    modules = dict(built.model.named_modules())
    prunable = {
        name
        for name in parameters
        if name.endswith(".weight")
        and isinstance(modules[name.removesuffix(".weight")], nn.Linear | nn.Conv2d)
        and not name.startswith(DENSE)
        and ".se." not in name  # gates of squeeze-excitation
    }
    assert set(grouped) == prunable


def test_names_are_unique_and_stable(built: Built) -> None:
    names = [operation.name for operation in built.chain.operations]
    groups = [group.name for _, group in built.chain.groups()]
    assert len(set(names)) == len(names)
    assert len(set(groups)) == len(groups)
    assert [operation.name for operation in build_chain(built.model).operations] == names


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
    model = next(case for case in CASES if case.name == "timm-resnet-squeeze-excitation").model().train()
    pooled = next(case for case in CASES if case.name == "timm-vit-map").model()
    model.layer1.eval()
    model.fc.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    in_place = [getattr(module, "inplace", None) for module in model.modules()]
    fused = [getattr(module, "fused_attn", None) for module in pooled.modules()]
    with pytest.raises(RuntimeError, match="inside"), frozen(model), frozen(pooled):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(getattr(module, "inplace", False) for module in model.modules())
        assert not any(getattr(module, "fused_attn", False) for module in pooled.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert [getattr(module, "inplace", None) for module in model.modules()] == in_place
    assert True in in_place
    assert [getattr(module, "fused_attn", None) for module in pooled.modules()] == fused
    assert True in fused


def test_every_registered_class_has_a_case() -> None:
    covered = {cls for case in CASES for cls in type(build(case).model).__mro__}
    # Other tests register networks of their own.
    ours = {cls for cls, (builder, _) in base._BUILDERS.items() if builder.__module__.startswith("snows_hf.")}
    assert ours <= covered


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
