"""The Gram-matrix preconditioner against dense matrices."""

from itertools import pairwise

import pytest
import tiny
import torch
from torch import Tensor, nn

from snows_hf.adapters import build_chain
from snows_hf.method.cascade import prune_chain
from snows_hf.method.cg import CGStatus, cg
from snows_hf.method.factors import RowBlocks
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.method.preconditioner import MIN_IMAGES, SAMPLES, gram, sampled
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
