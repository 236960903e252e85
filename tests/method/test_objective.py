"""The K-step objective (Eq. 3) and its derivatives, against dense derivatives of an independent implementation.

The reference never sees the adapters: it runs the whole model on images, with the masked weights put in, and reads the
outputs of Eq. 3 with hooks on the model's own modules.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from snows_hf.adapters import Chain, Group, Operation, build_chain, frozen
from snows_hf.method.newton import newton
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.patterns import Masks
from snows_hf.settings import SolverConfig


IMAGES = tiny.images(3)
BEYOND = 1000


def vit_sites(model: nn.Module) -> list[tuple[str, str]]:
    """Where a transformers ViT shows the outputs that count: (module, whether its input or its output)."""
    sites = [("vit.embeddings", "output")]
    for i in range(len(model.vit.layers)):
        block = f"vit.layers.{i}"
        sites += [
            (f"{block}.attention.o_proj", "input"),
            (f"{block}.layernorm_after", "input"),
            (f"{block}.mlp.fc1", "output"),
            (f"{block}.mlp.fc2", "input"),
            (block, "output"),
        ]
    return [*sites, ("classifier", "output")]


def timm_vit_sites(model: nn.Module) -> list[tuple[str, str]]:
    sites = [("norm_pre", "output")]
    for i in range(len(model.blocks)):
        block = f"blocks.{i}"
        sites += [
            (f"{block}.attn.proj", "input"),
            (f"{block}.norm2", "input"),
            (f"{block}.mlp.fc1", "output"),
            (f"{block}.mlp.fc2", "input"),
            (block, "output"),
        ]
    return [*sites, ("head", "output")]


def cifar_sites(model: nn.Module) -> list[tuple[str, str]]:
    sites = [("conv1", "output"), ("act1", "output")]
    for layer in ("layer1", "layer2", "layer3"):
        sites += [(f"{layer}.0.{part}", "output") for part in ("conv1", "act1", "conv2", "act2")]
    return [*sites, ("linear", "output")]


@dataclass(frozen=True)
class Case:
    """A group of a tiny network, with its masks, and K."""

    model: Callable[[], nn.Module]
    sites: Callable[[nn.Module], list[tuple[str, str]]]
    group: str
    parameters: tuple[str, ...]
    pattern: tuple[int, int]
    k: int
    weighting: str = "mean"
    emphasis: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.model.__name__}-{self.group}-K{self.k}-{self.weighting}-{self.emphasis}"


QKV = tuple(f"vit.layers.0.attention.{part}_proj.weight" for part in "qkv")


def _case(
    model: str,
    group: str,
    pattern: tuple[int, int],
    k: int,
    parameters: tuple[str, ...] = (),
    weighting: str = "mean",
    emphasis: float = 0.0,
) -> Case:
    make, sites = {
        "vit": (tiny.transformers_vit, vit_sites),
        "timm": (tiny.timm_vit, timm_vit_sites),
        "cifar": (tiny.cifar_resnet, cifar_sites),
    }[model]
    return Case(make, sites, group, parameters or (f"{group}.weight",), pattern, k, weighting, emphasis)


CASES = [
    *(_case("vit", "vit.layers.0.attention.qkv", (2, 4), k, QKV) for k in (0, 1, 3, BEYOND)),
    _case("vit", "vit.layers.0.attention.o_proj", (1, 4), 2),
    _case("vit", "vit.layers.0.mlp.fc1", (2, 4), 1),
    _case("vit", "vit.layers.1.mlp.fc2", (1, 4), 0),
    _case("vit", "vit.layers.1.mlp.fc2", (1, 4), BEYOND),
    *(_case("timm", "blocks.0.attn.qkv", (1, 4), k) for k in (0, 4, BEYOND)),
    _case("cifar", "layer1.0.conv1", (1, 16), 0),
    _case("cifar", "layer1.0.conv1", (1, 16), 3),
    _case("cifar", "layer2.0.conv2", (1, 32), 5),
    _case("cifar", "layer2.0.conv1", (1, 16), BEYOND),
    _case("vit", "vit.layers.0.attention.qkv", (2, 4), 3, QKV, "relative"),
    _case("cifar", "layer1.0.conv1", (1, 16), 3, (), "relative", 2.5),
]


@dataclass(frozen=True)
class Built:
    """A case ready to run: ours, and the reference's outputs and targets as functions of w (m,)."""

    chain: Chain
    segment: Segment
    active: ActiveWeights
    w: Tensor
    state: tuple[Tensor, ...]
    targets: list[Tensor]
    relative: bool
    emphasis: float
    reference_outputs: Callable[[Tensor], list[Tensor]]
    reference_targets: list[Tensor]

    def objective(self, curvature: str, preconditioner: str = "none", damping: float = 0.0) -> KStepObjective:
        weighting = "relative" if self.relative else "mean"
        settings = {"curvature": curvature, "preconditioner": preconditioner, "damping": damping}
        config = tiny.config(weighting=weighting, emphasis=self.emphasis, **settings)
        segment = self.segment
        if self.emphasis:  # which solves of the whole network alone have
            segment = replace(segment, group=replace(segment.group, kind="joint"))
        return KStepObjective(segment, self.active, self.state, config, self.targets)

    def divisor(self, place: int, y: Tensor) -> float:
        """Of the squared error of an operation: its entries, times their variance where relative; less if late."""
        variance = float(((y - y.mean()) ** 2).sum() / (y.numel() - 1)) if self.relative else 1.0
        return y.numel() * variance * (len(self.reference_targets) / (place + 1)) ** self.emphasis

    def reference_loss(self, w: Tensor) -> Tensor:
        """Eq. 3 with the mean over the entries of each operation."""
        total = torch.zeros((), dtype=torch.float64)
        for place, (y, o) in enumerate(zip(self.reference_targets, self.reference_outputs(w), strict=True)):
            total = total + ((y - o) ** 2).sum() / self.divisor(place, y)
        return total

    def joined(self, outputs: list[Tensor]) -> Tensor:
        """All outputs in one (images, entries), scaled so that Eq. 3 is a sum of squared differences."""
        scales = [self.divisor(place, y) ** 0.5 for place, y in enumerate(self.reference_targets)]
        return torch.cat([o.flatten(1) / scale for o, scale in zip(outputs, scales, strict=True)], dim=1)


def build(case: Case) -> Built:
    model = case.model().requires_grad_(False)
    masks = tiny.nm_masks(model, case.parameters, *case.pattern)
    # Bool indexing has no batching rule, so the reference scatters with a matrix: column j holds weight j's place.
    places = {name: torch.eye(mask.numel(), dtype=torch.float64)[:, mask.flatten()] for name, mask in masks.items()}
    sites = case.sites(model)

    chain = build_chain(model)
    index = next(i for i, group in chain.groups() if group.name == case.group)
    wanted = sites[index : index + case.k + 1]

    def reference_outputs(w: Tensor | None) -> list[Tensor]:
        weights = {}
        if w is not None:
            parts = w.split([place.shape[1] for place in places.values()])
            for (name, place), part in zip(places.items(), parts, strict=True):
                weights[name] = (place @ part).reshape(masks[name].shape)
        seen: dict[tuple[str, str], Tensor] = {}
        handles = []
        for name, what in wanted:
            module = model.get_submodule(name)
            if what == "input":

                def before(_: nn.Module, inputs: tuple[Tensor, ...], key: tuple[str, str] = (name, what)) -> None:
                    seen[key] = inputs[0]

                handles.append(module.register_forward_pre_hook(before))
            else:

                def after(_: nn.Module, __: object, output: Tensor, key: tuple[str, str] = (name, what)) -> None:
                    seen[key] = output[0] if isinstance(output, tuple) else output

                handles.append(module.register_forward_hook(after))
        try:
            # Fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                torch.func.functional_call(model, weights, (IMAGES,))
        finally:
            for handle in handles:
                handle.remove()
        return [seen[key] for key in wanted]

    state: tuple[Tensor, ...] = (IMAGES,)
    for operation in chain.operations[:index]:
        state = operation.run(state)
    segment = Segment.cut(chain, index, case.k)
    active = ActiveWeights(masks)
    w = active.gather({name: model.get_parameter(name) for name in masks})
    w = w + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype)
    return Built(
        chain=chain,
        segment=segment,
        active=active,
        w=w,
        state=state,
        targets=segment.outputs(state),
        relative=case.weighting == "relative",
        emphasis=case.emphasis,
        reference_outputs=reference_outputs,
        reference_targets=reference_outputs(None),
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id)
def built(request: pytest.FixtureRequest) -> Built:
    return build(request.param)


def relative(got: Tensor, expected: Tensor) -> float:
    assert float(expected.norm()) > 0
    return float((got - expected).norm() / expected.norm())


def probes(m: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(m, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_targets_and_outputs_are_those_of_the_model(built):
    assert len(built.targets) == len(built.reference_targets)
    for ours, reference in zip(built.targets, built.reference_targets, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    ours = built.segment.outputs(built.state, built.active.scatter(built.w))
    for output, reference in zip(ours, built.reference_outputs(built.w), strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_value_and_gradient_equal_autograd_of_eq_3(built, curvature):
    w = built.w.clone().requires_grad_()
    loss = built.reference_loss(w)
    (gradient,) = torch.autograd.grad(loss, w)
    objective = built.objective(curvature)
    expansion = objective.expand(built.w)
    assert expansion.value == pytest.approx(float(loss.detach()), rel=1e-12)
    assert objective.value(built.w) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert expansion.gradient.shape == (built.active.size,)
    assert not expansion.gradient.requires_grad
    assert relative(expansion.gradient, gradient) < 1e-10


def test_hessian_product_equals_the_dense_hessian(built):
    H = torch.func.hessian(built.reference_loss)(built.w)
    expansion = built.objective("hessian").expand(built.w)
    for p in probes(len(built.w)):
        assert relative(expansion.product(p), H @ p) < 1e-8
    assert not expansion.product(p).requires_grad


def test_gauss_newton_product_equals_dense_jacobians(built):
    J = torch.func.jacfwd(lambda w: built.joined(built.reference_outputs(w)))(built.w).flatten(0, 1)
    G = 2 * J.T @ J
    expansion = built.objective("gauss-newton").expand(built.w)
    for p in probes(len(built.w)):
        assert relative(expansion.product(p), G @ p) < 1e-8
        assert float(p @ expansion.product(p)) >= 0


class FlatSegment(nn.Module):
    """A segment as curvlinops wants networks: one flat parameter, one prediction (images, entries)."""

    def __init__(self, built: Built) -> None:
        super().__init__()
        self.w, self.built = nn.Parameter(built.w.clone()), built

    def forward(self, images: Tensor) -> Tensor:
        return self.built.joined(self.built.reference_outputs(self.w))


@pytest.mark.parametrize(
    ("curvature", "operator"), [("hessian", HessianLinearOperator), ("gauss-newton", GGNLinearOperator)]
)
def test_products_equal_those_of_curvlinops(built, curvature, operator):
    network = FlatSegment(built)
    data = [(IMAGES, built.joined(built.reference_targets))]
    curvlinop = operator(network, nn.MSELoss(reduction="sum"), [network.w], data, check_deterministic=False)
    expansion = built.objective(curvature).expand(built.w)
    for p in probes(len(built.w), 2):
        assert relative(expansion.product(p), curvlinop @ p) < 1e-8


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_products_are_symmetric_linear_and_repeatable(built, curvature):
    product = built.objective(curvature).expand(built.w).product
    p, q, *_ = probes(len(built.w))
    assert float(p @ product(q)) == pytest.approx(float(q @ product(p)), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(product(2 * p - q), 2 * product(p) - product(q), rtol=1e-9, atol=1e-12)
    assert torch.equal(product(p), product(p))


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_preconditioner_is_symmetric_positive_definite_and_leaves_the_derivatives_alone(built, curvature):
    plain = built.objective(curvature).expand(built.w)
    expansion = built.objective(curvature, "gram", damping=1e-3).expand(built.w)
    assert plain.preconditioner is None
    assert expansion.value == plain.value
    p, q, *_ = probes(len(built.w))
    torch.testing.assert_close(expansion.gradient, plain.gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expansion.product(p), plain.product(p), rtol=1e-12, atol=1e-12)
    solve = expansion.preconditioner
    assert solve(p).shape == p.shape
    assert float(p @ solve(q)) == pytest.approx(float(q @ solve(p)), rel=1e-8, abs=1e-10)
    assert float(p @ solve(p)) > 0
    torch.testing.assert_close(solve(2 * p - q), 2 * solve(p) - solve(q), rtol=1e-8, atol=1e-10)


def test_nothing_of_the_model_changes(built):
    before = {name: tensor.clone() for name, tensor in built.chain.model.state_dict().items()}
    expansion = built.objective("hessian").expand(built.w)
    expansion.product(expansion.gradient)
    for name, tensor in built.chain.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in built.chain.model.parameters())


@pytest.mark.parametrize(
    ("model", "group", "k_max"),
    [
        (tiny.transformers_vit, "vit.layers.0.attention.qkv", 10),
        (tiny.transformers_vit, "vit.layers.1.mlp.fc2", 1),
        (tiny.cifar_resnet, "layer1.0.conv1", 12),
        (tiny.cifar_resnet, "layer3.0.conv2", 2),
    ],
)
@pytest.mark.parametrize("k", [0, 1, 2, 5, 10, 12, BEYOND])
def test_segment_holds_min_k_and_k_max_further_operations(model, group, k_max, k):
    chain = build_chain(model())
    index = next(i for i, g in chain.groups() if g.name == group)
    segment = Segment.cut(chain, index, k)
    assert segment.stop - segment.start - 1 == min(k, k_max)
    assert segment.group.name == group


def random_masks(seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (2, 3, 2, 2), "c": (5, 1)}
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


@pytest.mark.parametrize("seed", range(3))
def test_gather_and_scatter_are_inverse(seed):
    masks = random_masks(seed)
    weights = {name: torch.randn(mask.shape, dtype=torch.float64) for name, mask in masks.items()}
    active = ActiveWeights(masks)
    w = active.gather(weights)
    assert w.shape == (active.size,) == (sum(int(mask.sum()) for mask in masks.values()),)
    full = active.scatter(w)
    assert list(full) == list(weights)
    for name, mask in masks.items():
        assert torch.equal(full[name], weights[name] * mask)
    assert torch.equal(active.gather(full), w)


def test_scatter_is_the_adjoint_of_gather():
    active = ActiveWeights(random_masks(0))
    w = torch.randn(active.size, dtype=torch.float64, requires_grad=True)
    weights = {name: torch.randn(mask.shape, dtype=torch.float64) for name, mask in active.masks.items()}
    inner = sum((full * weights[name]).sum() for name, full in active.scatter(w).items())
    (adjoint,) = torch.autograd.grad(inner, w)
    torch.testing.assert_close(adjoint, active.gather(weights))


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("bias", [False, True])
def test_k_0_on_a_linear_layer_is_masked_least_squares(bias, curvature):
    """One undamped Newton step from anywhere: each row is the regression of its dense output on its kept columns."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    layer = nn.Linear(12, 7, bias=bias).double()
    operation = Operation("linear", lambda s: (layer(s[0]),), Group("linear", ("weight",), "linear"))
    layer.requires_grad_(False)
    chain = Chain(layer, [operation], "test")
    masks = tiny.nm_masks(layer, ("weight",), 2, 4)
    masks["weight"][0, 1:] = False  # rows need not keep equally many
    active = ActiveWeights(masks)
    segment = Segment.cut(chain, 0, 0)
    objective = KStepObjective(segment, active, (X,), tiny.config(curvature=curvature))
    settings = SolverConfig(
        curvature=curvature,
        damping=0.0,
        passes=1,
        patience=1,
        cg_rtol=1e-14,
        cg_atol=0.0,
        cg_max_iter=500,
        cg_stall=0.0,
    )
    result = newton([objective], objective, active.gather({"weight": layer.weight}), settings)

    solved = active.scatter(result.w)["weight"]
    for row, dense, kept in zip(solved, layer.weight, masks["weight"], strict=True):
        expected = torch.linalg.lstsq(X[:, kept], X @ dense).solution
        torch.testing.assert_close(row[kept], expected, rtol=1e-9, atol=1e-9)
        assert not row[~kept].any()


@pytest.mark.parametrize("network", [tiny.transformers_vit, tiny.timm_vit, tiny.cifar_resnet, tiny.timm_resnet])
def test_under_autocast_the_expansion_is_that_of_float32_but_for_bfloat16s_rounding(network):
    """Half precision has 8 bits: the errors of a vector's entries average out over the whole of it."""
    model = network().float()
    chain, masks = build_chain(model), tiny.magnitude_masks(model)
    state, index = (
        (tiny.images(4).float(),),
        next(i for i, group in chain.groups() if set(group.parameters) & set(masks)),
    )
    with frozen(model):
        for operation in chain.operations[:index]:
            state = operation.run(state)
        segment = Segment.cut(chain, index, 3)
        active = ActiveWeights.of(segment.group, masks, torch.device("cpu"))
        w, targets = active.within(chain), segment.outputs(state)
        p = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        exact, rounded = (
            KStepObjective(segment, active, state, tiny.config(preconditioner="gram"), targets, autocast=on).expand(w)
            for on in (False, True)
        )
        assert rounded.gradient.dtype == torch.float32
        assert rounded.value == pytest.approx(exact.value, rel=0.03)
        for a, b in [(rounded.gradient, exact.gradient), (rounded.product(p), exact.product(p))]:
            assert 0 < float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_are_made_in_single(dtype: torch.dtype):
    """A sum of 300,000 squares near one is beyond float16, and bfloat16 would round it to three digits."""
    layer = nn.Linear(16, 16, bias=False).to(dtype)
    chain = Chain(
        layer, [Operation("layer", lambda state: (layer(state[0]),), Group("layer", ("weight",), "linear"))], "test"
    )
    x = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    active = ActiveWeights({"weight": torch.ones(16, 16, dtype=torch.bool)})
    objective = KStepObjective(Segment.cut(chain, 0, 0), active, (x,), tiny.config(weighting="relative"), [y + 1])
    value = objective.value(active.within(chain).detach())
    assert value == pytest.approx(float((y + 1 - y).float().square().mean() / (y + 1).float().var()), rel=1e-3)


@pytest.mark.parametrize("network", [tiny.transformers_vit, tiny.cifar_resnet])
@pytest.mark.parametrize(("size", "turn"), [(2, 0), (2, 2), (3, 1), (7, 0)])
def test_curvature_of_a_part_beside_value_and_gradient_of_all(network, size, turn):
    """Seven images: value and gradient are the batch's, and products those of each fourth, third or second image, in
    which operations weigh as in the batch."""
    model = network()
    chain, masks, images = build_chain(model), tiny.magnitude_masks(model), tiny.images(7)
    index = next(i for i, group in chain.groups() if set(group.parameters) & set(masks))
    state: tuple[Tensor, ...] = (images,)
    with frozen(model):
        for operation in chain.operations[:index]:
            state = operation.run(state)
        segment, settings = Segment.cut(chain, index, 3), tiny.config(preconditioner="gram", weighting="relative")
        active = ActiveWeights.of(segment.group, masks, torch.device("cpu"))
        w, targets = 1.1 * active.within(chain), segment.outputs(state)
        p = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
        whole = KStepObjective(segment, active, state, settings, targets)
        parted = KStepObjective(segment, active, state, settings.updated(curvature_size=size), targets, turn=turn)
        count = -(-7 // size)
        own = slice(turn % count, None, count)
        alone = KStepObjective(segment, active, tuple(t[own] for t in state), settings, [y[own] for y in targets])
        alone.weights = [c * 7 / len(images[own]) for c in whole.weights]
        expected, found, of_part = whole.expand(w), parted.expand(w), alone.expand(w)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.product(p), of_part.product(p), rtol=1e-9, atol=1e-12)


def test_the_preconditioner_of_a_part_knows_the_inputs_of_all():
    """At K = 0, where nothing is estimated, it is that of the whole batch."""
    layer = nn.Linear(12, 7).double().requires_grad_(False)
    operation = Operation("linear", lambda s: (layer(s[0]),), Group("linear", ("weight",), "linear"))
    segment = Segment.cut(Chain(layer, [operation], "test"), 0, 0)
    active = ActiveWeights(tiny.nm_masks(layer, ("weight",), 2, 4))
    x, w = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double(), torch.ones(42).double()
    sizes = [0, 10]
    whole, parted = (
        KStepObjective(segment, active, (x,), tiny.config(preconditioner="gram", curvature_size=size)).expand(w)
        for size in sizes
    )
    torch.testing.assert_close(parted.preconditioner(w), whole.preconditioner(w), rtol=1e-6, atol=0)
