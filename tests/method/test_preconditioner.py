"""The Gram-matrix preconditioner against dense matrices."""

from itertools import pairwise

import pytest
import tiny
import torch
from torch import Tensor, nn

from snows_hf.adapters import Chain, Group, Operation, build_chain, frozen
from snows_hf.method.cascade import prune_chain
from snows_hf.method.cg import CGStatus, cg
from snows_hf.method.factors import (
    WIDE,
    IteratedRows,
    RowBlocks,
    SharedRows,
    Shift,
    WithBiases,
    factor_bytes,
    floor_of,
    shared_entries,
)
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.method.preconditioner import MIN_IMAGES, SAMPLES, factorised, gram, outer, sampled
from snows_hf.runtime.distributed import Share


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear on tokens": (nn.Linear(4, 3), (2, 5, 4)),
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "pointwise": (nn.Conv2d(4, 3, 1), (2, 4, 3, 3)),
    "strided, dilated": (nn.Conv2d(2, 3, (2, 3), stride=2, padding=(1, 2), dilation=(1, 2)), (2, 2, 6, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 4, 4)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, (1, 3), padding="same", dilation=(1, 2)), (2, 2, 5, 6)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect", stride=2), (2, 2, 5, 6)),
    "circular, grouped": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", groups=2), (2, 4, 4, 5)),
    "more images than one part": (nn.Conv2d(2, 2, 2), (70, 2, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gram_is_the_hessian_of_each_output_channel(name):
    """½ Σ zᵣ² has the Hessian Σ x xᵀ in the weights of row r, over images and positions."""
    module, shape = LAYERS[name]
    module = module.double()
    x = randn(*shape)

    def outputs(weight: Tensor) -> Tensor:
        z = torch.func.functional_call(module, {"weight": weight}, (x,))
        return z.movedim(1, -1) if z.dim() == 4 else z

    rows = len(module.weight)
    J = torch.func.jacrev(outputs)(module.weight.detach()).flatten(0, -module.weight.dim() - 2)
    G = gram(module, x)
    for r in range(rows):
        J_r = J[:, r, r].flatten(1)
        torch.testing.assert_close(G[r // (rows // len(G))], J_r.T @ J_r, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_a_constant_is_an_input_more(name):
    module, shape = LAYERS[name]
    module, x = module.double(), randn(*shape)
    G, plain = gram(module, x, constant=True), gram(module, x)
    positions = module(x).numel() // len(module.weight)
    ones = torch.full_like(module.weight, 1.0)
    sums = torch.func.functional_call(module, {"weight": ones, "bias": torch.zeros(len(ones)).double()}, (x,))
    torch.testing.assert_close(G[:, :-1, :-1], plain)
    torch.testing.assert_close(G, G.mT)
    assert bool((G[:, -1, -1] == positions).all())
    total = sums.movedim(1, -1) if sums.dim() == 4 else sums
    first = total.flatten(0, -2).sum(0).unflatten(0, (len(G), -1))[:, 0]  # a row of each group
    torch.testing.assert_close(G[:, -1, :-1].sum(1), first)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 128, 40), (2, 300, 7)])
def test_a_gram_matrix_in_strips_is_one_product(shape):
    X = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(outer(X), X @ X.mT)


def test_layers_it_cannot_unfold_have_no_gram():
    assert gram(nn.ConvTranspose2d(2, 2, 3), torch.zeros(1, 2, 4, 4)) is None


@pytest.mark.parametrize("processes", [1, 2, 3, 50])
@pytest.mark.parametrize(("total", "wanted"), [(256, 32), (256, 256), (100, 72), (200, 33), (40, 144), (1, 32)])
def test_images_for_gram_matrices_are_the_same_for_any_number_of_processes(total, wanted, processes):
    """Evenly spread over the batch, no fewer than are wanted if there are as many, and scaled to all of them."""
    mask = torch.ones(5, max(1, wanted * 4 // SAMPLES), dtype=torch.bool)
    taken = []
    for place in range(processes):
        start, stop = total * place // processes, total * (place + 1) // processes
        z = torch.zeros(max(stop - start, 1), 5, 2, 2)  # four positions
        images, scale = sampled(mask, z, Share(total, start, stop))
        taken += list(range(start, stop))[images]
    steps = {b - a for a, b in pairwise(taken)}
    assert taken[0] == 0 and len(steps) <= 1
    assert min(total, wanted) <= len(taken) <= 2 * max(wanted, MIN_IMAGES) and scale == total / len(taken)


def masks_of(kind: str, shape: tuple[int, int]) -> Tensor:
    if kind == "dense":
        return torch.ones(shape, dtype=torch.bool)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    if kind == "with an empty row":
        mask[1] = False
    return mask


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "uneven rows", "with an empty row"])
def test_row_blocks_solve_the_block_diagonal_system(kind, groups):
    rows, width, damping = 6, 8, 0.1
    X = randn(groups, 30, width)
    g, b = X.mT @ X, randn(rows, seed=1).abs() + 0.1
    mask = masks_of(kind, (rows, width))
    full = torch.block_diag(*(b[r] * g[r // (rows // groups)] for r in range(rows)))
    kept = mask.flatten()
    system = full[kept][:, kept] + damping * torch.eye(int(kept.sum()), dtype=torch.float64)
    r = randn(int(kept.sum()), seed=2)
    expected = torch.linalg.solve(system, r)
    got = RowBlocks(mask, g, b, damping).solve(r)
    assert float((got - expected).norm()) < 0.05 * float(expected.norm())  # its diagonal is a little larger


@pytest.mark.parametrize("entries", [2**28, 60])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_rows_that_processes_share_out_give_what_one_gives(processes, entries):
    """Also where there are more processes than rows; grouped inputs, uneven and empty rows."""
    rows, mask = 6, masks_of("with an empty row", (6, 8))
    X = randn(2, 30, 8)
    given = mask, X.mT @ X, randn(rows, seed=1).abs() + 0.1, 0.1, entries
    vector = randn(int(mask.sum()), seed=2)
    parts = [slice(rows * i // processes, rows * (i + 1) // processes) for i in range(processes)]
    shared = [RowBlocks(*given, part) for part in parts]
    whole = RowBlocks(*given)
    assert sum(block.factor.numel() for block in shared) == whole.factor.numel()
    for of in (RowBlocks.solve, RowBlocks.saliency):
        total = torch.zeros_like(vector)
        for block in shared:
            total[block.span] += of(block, vector[block.span])
        torch.testing.assert_close(total, of(whole, vector), rtol=1e-12, atol=0)


def structured(rows: int, width: int, groups: int) -> Tensor:
    """Rows of a group keep the same columns, those of one group fewer than those of another; one row keeps nothing."""
    generator = torch.Generator().manual_seed(5)
    columns = torch.rand(groups, 1, width, generator=generator) < torch.linspace(0.7, 0.4, groups)[:, None, None]
    mask = columns.repeat(1, rows // groups, 1).flatten(0, 1)
    mask[1] = False
    return mask


def some_shift(X: Tensor, b: Tensor, floor: float) -> Shift:
    """Of biases that have a part of the sensitivities, and columns of any sign."""
    column, through = randn(len(b), seed=3), b * torch.linspace(0, 1, len(b), dtype=b.dtype)
    return Shift(X.sum(1), through * column, through * column.square() * X.shape[1] + floor)


@pytest.mark.parametrize("kind", ["dense", "uneven rows", "with an empty row", "shared", "nothing"])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_with_biases_solve_the_whole_system(kind, groups, monkeypatch):
    """Whichever way rows are factorised, and by how many processes; saliencies are of the diagonal of the whole
    inverse."""
    rows, width, damping = 6, 8, 0.1
    X, b = randn(groups, 30, width) + 1, randn(rows, seed=1).abs() + 0.1
    g = X.mT @ X
    mask = structured(rows, width, groups) if kind == "shared" else masks_of(kind, (rows, width))
    mask = mask & (kind != "nothing")
    floor, count = floor_of(g, b, damping), int(mask.sum())
    shift = some_shift(X, b, floor)
    system = torch.zeros(rows, width + 1, rows, width + 1, dtype=torch.float64)
    for r in range(rows):
        owner = r // (rows // groups)
        system[r, :width, r, :width] = b[r] * g[owner] + floor * torch.eye(width, dtype=torch.float64)
        system[r, -1, r, :-1] = system[r, :-1, r, -1] = shift.cross[r] * shift.s[owner]
        system[r, -1, r, -1] = shift.pivot[r]
    places = torch.arange(rows * (width + 1)).view(rows, -1)
    kept = torch.cat([places[:, :-1][mask], places[:, -1]])
    inverse = torch.linalg.inv(system.flatten(2).flatten(0, 1)[kept][:, kept])
    r = randn(len(kept), seed=2)
    monkeypatch.setattr("snows_hf.method.factors.ITERATIONS", 2 * width)  # as many as come to the end
    kinds = [RowBlocks, IteratedRows, *([SharedRows] if shared_entries(mask, groups) else [])]
    assert (SharedRows in kinds) == (kind in ("shared", "dense", "nothing"))
    expected = r.square()[:count] / (2 * inverse.diagonal()[:count])
    for cls in kinds:
        solved, saliency = torch.zeros_like(r), torch.zeros_like(r)
        for part in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6)):
            rows_of = WithBiases(cls(mask, g, b, damping, part=part, shift=shift), shift)
            places = torch.arange(len(r))
            places = torch.cat([places[:count][rows_of.rows.span], places[count:][part]])
            solved[places], saliency[places] = rows_of.solve(r[places]), rows_of.saliency(r[places])
        torch.testing.assert_close(solved, inverse @ r)
        torch.testing.assert_close(saliency[:count], expected)


def test_what_rows_share_is_counted_once():
    mask = structured(6, 8, 2)
    width = int(mask.sum(1).max())
    assert factor_bytes({"w": mask}, groups={"w": 2}, sharing=3) == 4 * (2 * width**2 + 6 * width)
    assert factor_bytes({"w": mask}, groups={"w": 6}) == factor_bytes({"w": mask}) == 4 * 6 * width**2
    assert factor_bytes({"w": mask}, sharing=3) == 4 * 2 * width**2
    assert factor_bytes({"w": mask}, 30, {"w": 2}) == factor_bytes({"w": mask}, 30)  # too many for one


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("with_biases", [False, True])
def test_one_factorisation_for_rows_that_share_a_mask_is_that_of_each(with_biases, groups, processes):
    rows, width, damping = 6, 8, 0.1
    mask, X, b = structured(rows, width, groups), randn(groups, 30, width), randn(rows, seed=1).abs() + 0.1
    g = X.mT @ X
    shift = some_shift(X, b, damping) if with_biases else None
    assert shared_entries(mask, groups) == groups * int(mask.sum(1).max()) ** 2 + rows * int(mask.sum(1).max())
    assert shared_entries(masks_of("uneven rows", (rows, width)), groups) is None
    assert shared_entries(mask, rows) is None  # a row that is alone shares nothing
    vector = randn(int(mask.sum()), seed=2)
    parts = [slice(rows * i // processes, rows * (i + 1) // processes) for i in range(processes)]
    each = RowBlocks(mask, g, b, damping, shift=shift)
    for of in ("solve", "saliency"):
        total = torch.zeros_like(vector)
        for part in parts:
            own = SharedRows(mask, g, b, damping, part, shift)
            total[own.span] += getattr(own, of)(vector[own.span])
        # The blocks' λ is rounded to float32.
        torch.testing.assert_close(total, getattr(each, of)(vector), rtol=1e-7, atol=1e-9)


def test_rows_of_wide_layers_are_solved_without_factors():
    """Most of the way in the system's norm, at inputs as correlated as those of a network."""
    rows, damping = 12, 1e-4
    mask = masks_of("uneven rows", (rows, WIDE))
    X = randn(1, 4 * WIDE, WIDE) @ (randn(WIDE, WIDE, seed=5) / WIDE**0.5) + randn(1, 4 * WIDE, 1, seed=6)
    g, b = X.mT @ X / (4 * WIDE), randn(rows, seed=1).abs() + 0.1
    r = randn(int(mask.sum()), seed=2)
    exact, found = RowBlocks(mask, g, b, damping), factorised(mask, g, b, damping, 2**28)
    assert type(found) is IteratedRows
    error, best = found.solve(r) - exact.solve(r), exact.solve(r)
    padded = [torch.zeros_like(mask, dtype=r.dtype).masked_scatter(mask, v) for v in (error, best)]
    lost, whole = ((v * found._product(v)).sum() for v in padded)
    assert float(lost) < 0.2 * float(whole)
    torch.testing.assert_close(found.saliency(r), exact.saliency(r))
    assert factor_bytes({"w": mask}, groups={"w": 1}) < factor_bytes({"w": mask}) / 2


def test_rows_in_blocks_with_biases_stay_positive_definite():
    """However much of the constant each block has in it."""
    mask, X = torch.ones(3, 12, dtype=torch.bool), 0.1 * randn(1, 40, 12) + 1
    b, g = torch.ones(3, dtype=torch.float64), X.mT @ X
    shift = Shift(X.sum(1), b, b * 40 + 1e-3)
    whole = WithBiases(RowBlocks(mask, g, b, 1e-3, entries=100, shift=shift), shift)
    assert whole.rows.factor.shape[1] > 1
    inverse = torch.stack([whole.solve(e) for e in torch.eye(39, dtype=torch.float64)])
    torch.testing.assert_close(inverse, inverse.T)
    assert float(torch.linalg.eigvalsh(inverse).min()) > 0


def following(conv: nn.Module, after: nn.Module | None = None, apart: bool = False) -> Chain:
    """A layer whose bias is its own, or that of a batch norm after it, in its operation or in the next."""
    model = tiny.randomised(nn.Sequential(conv, after or nn.Identity()), 0).requires_grad_(False)
    bias = "1.bias" if after else "0.bias"
    group = Group("0", ("0.weight",), "layer", (("0.weight", bias),))
    parts = (model[:1], model[1:]) if apart else (model,)
    operations = [Operation(str(i), lambda s, part=part: (part(s[0]),)) for i, part in enumerate(parts)]
    operations[0] = Operation("0", operations[0].run, group)
    return Chain(model, operations, "test")


CHAINS = {
    "linear": (lambda: following(nn.Linear(5, 4)), (20, 5)),
    "linear on tokens": (lambda: following(nn.Linear(5, 4)), (8, 3, 5)),
    "convolution": (lambda: following(nn.Conv2d(3, 4, 3, padding=1)), (6, 3, 5, 5)),
    "grouped": (lambda: following(nn.Conv2d(4, 6, 3, groups=2)), (6, 4, 5, 5)),
    "batch norm": (lambda: following(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (6, 3, 5, 5)),
    "grouped, batch norm": (lambda: following(nn.Conv2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)), (6, 4, 4, 4)),
    "batch norm past K": (lambda: following(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), True), (6, 3, 4, 4)),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_k_0_is_the_hessian_with_biases_too(name, shared):
    """All that M has beyond it is the same on the whole diagonal: λ, and a little more."""
    make, shape = CHAINS[name]
    chain, damping = make(), 1e-3
    weight = chain.weight("0.weight")
    mask = masks_of("with an empty row", (len(weight), weight[0].numel()))
    mask = structured(*mask.shape, getattr(chain.model[0], "groups", 1)) if shared else mask
    segment = Segment.cut(chain, 0, 0)
    active = ActiveWeights.of(segment.group, {"0.weight": mask.view_as(weight)}, torch.device("cpu"), biases=True)
    assert [*active.biases] == ["0.weight"] and active.size == int(mask.sum()) + len(weight)
    settings = tiny.config(preconditioner="gram", damping=damping)
    with frozen(chain.model):
        objective = KStepObjective(segment, active, (randn(*shape),), settings)
        local = objective.expand(active.within(chain) + 0.1)
        units = torch.eye(active.size, dtype=torch.float64)
        H = torch.stack([local.product(unit) for unit in units])
        more = torch.linalg.inv(torch.stack([local.preconditioner(unit) for unit in units])) - H
    torch.testing.assert_close(more, float(more[0, 0]) * units, rtol=1e-6, atol=1e-9)  # λ may be rounded to float32
    assert damping < more[0, 0] < 3 * damping
    assert bool(H[-1].any()) == (name != "batch norm past K")


def test_what_a_loss_reads_before_a_batch_norm_does_not_count_for_its_bias():
    """Both outputs do for the weights, the second alone for the bias; sensitivities are estimated."""
    chain = following(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), apart=True)
    segment, weight = Segment.cut(chain, 0, 1), chain.weight("0.weight")
    masks = {"0.weight": torch.ones_like(weight, dtype=torch.bool)}
    active = ActiveWeights.of(segment.group, masks, torch.device("cpu"), biases=True)
    settings = tiny.config(preconditioner="gram", damping=1e-6)
    with frozen(chain.model):
        local = KStepObjective(segment, active, (randn(30, 3, 12, 12),), settings).expand(active.within(chain))
        units = torch.eye(active.size, dtype=torch.float64)
        H = torch.stack([local.product(unit) for unit in units])
        M = torch.linalg.inv(torch.stack([local.preconditioner(unit) for unit in units]))
    assert float((M - H).norm()) < 0.05 * float(H.norm())
    torch.testing.assert_close(M[-4:, -4:], H[-4:, -4:], rtol=0.01, atol=1e-12)


def k_0(network: nn.Module, name: str, n: int, m: int, damping: float) -> KStepObjective:
    chain = build_chain(network.requires_grad_(False))
    index, group = next((i, g) for i, g in chain.groups() if g.name == name)
    state: tuple[Tensor, ...] = (tiny.images(20),)
    for operation in chain.operations[:index]:
        state = operation.run(state)
    segment, active = Segment.cut(chain, index, 0), ActiveWeights(tiny.nm_masks(network, group.parameters, n, m))
    return KStepObjective(segment, active, state, tiny.config(preconditioner="gram", damping=damping))


@pytest.mark.parametrize(
    ("network", "name", "n", "m"),
    [
        (tiny.transformers_vit, "vit.layers.0.mlp.fc1", 2, 4),
        (tiny.timm_vit, "blocks.1.mlp.fc1", 1, 4),
        (tiny.cifar_resnet, "layer1.0.conv1", 1, 8),
        (tiny.timm_resnet, "layer2.0.conv1", 2, 4),
    ],
)
def test_k_0_is_solved_in_a_few_products(network, name, n, m):
    damping = 1e-4
    objective = k_0(network(), name, n, m, damping)
    w = objective.active.gather({p: objective.segment.chain.weight(p) for p in objective.active.masks})
    local = objective.expand(w)
    solve = {"damping": damping, "rtol": 1e-3, "max_iter": 500}
    result = cg(local.product, local.gradient, preconditioner=local.preconditioner, **solve)
    plain = cg(local.product, local.gradient, **solve)
    assert result.status is CGStatus.CONVERGED
    assert result.iterations <= 3
    assert result.iterations < plain.iterations


@pytest.mark.parametrize("preconditioner", ["none", "gram"])
@pytest.mark.parametrize("emptied", [1, 3])
def test_masks_that_keep_nothing_leave_zeros_and_no_error(emptied, preconditioner):
    """A mask file may empty one of Q, K and V, or the whole group."""
    model = tiny.transformers_vit()
    group = next(g for _, g in build_chain(model).groups())
    masks = tiny.nm_masks(model, group.parameters, 2, 4)
    for name in group.parameters[:emptied]:
        masks[name] = torch.zeros_like(masks[name])
    settings = tiny.config(preconditioner=preconditioner)
    (report,) = prune_chain(build_chain(model), tiny.images(12), masks, settings)
    for name in group.parameters[:emptied]:
        assert not model.get_parameter(name).any()
    assert report.loss_pruned <= report.loss_start
