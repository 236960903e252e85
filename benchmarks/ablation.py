"""The solver's choices on single layers, each left out or replaced in turn: held-out loss at equal processor time.

Same layer, 2:4 mask, images and targets for all, and the plain mean of Eq. 3; losses are over the masked weights'.

    python benchmarks/ablation.py MODEL --data FOLDER --layers 0 9 22 [--images 256] [--seconds 5 20]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
from solver import BATCH_SIZE, OURS, Setting
from torch import Tensor

from snows_hf.adapters import frozen
from snows_hf.method.cg import cg
from snows_hf.method.newton import Expansion, Step, newton_step, step_along
from snows_hf.method.objective import KStepObjective, Segment
from snows_hf.method.preconditioner import RowPreconditioner
from snows_hf.method.streams import masked_operations
from snows_hf.settings import PruneConfig, SolverConfig, settings_for


Stepper = Callable[[KStepObjective, Tensor, SolverConfig], Step | None]


def stepper(change: Callable[[Expansion], Expansion]) -> Stepper:
    """Newton steps whose expansions are changed before they are solved."""

    class Changed:
        def __init__(self, batch: KStepObjective) -> None:
            self.value, self.batch = batch.value, batch

        def expand(self, w: Tensor) -> Expansion:
            return change(self.batch.expand(w))

    return lambda batch, w, config: newton_step(Changed(batch), w, config)


def by_diagonal(local: Expansion) -> Expansion:
    """The diagonal of the Gram blocks in place of the blocks: that of L Lᵀ."""
    assert isinstance(local.preconditioner, RowPreconditioner)
    blocks = local.preconditioner.blocks
    diagonal = torch.cat([block.factor.square().sum(-1).flatten(1)[block.valid] for block in blocks])
    return replace(local, preconditioner=lambda r: r / diagonal)


def by_hutchinson(probes: int) -> Callable[[Expansion], Expansion]:
    """|mean of v ⊙ Hv| over Rademacher v, to the power ¾ (Martens, 2010, section 4.7, who has the Fisher diagonal)."""

    def change(local: Expansion) -> Expansion:
        total = torch.zeros_like(local.gradient)
        for _ in range(probes):
            v = torch.randint(2, total.shape).to(total) * 2 - 1
            total += v * local.product(v)
        diagonal = (total / probes).abs()
        diagonal = (diagonal + 1e-2 * diagonal.mean()) ** 0.75
        return replace(local, preconditioner=lambda r: r / diagonal)

    return change


class WarmStart:
    """Conjugate gradients that begin at 0.95 × the last direction (Martens, 2010, section 4.5)."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, batch: KStepObjective, w: Tensor, config: SolverConfig) -> Step:
        local = batch.expand(w)
        start = torch.zeros_like(w) if self.last is None else 0.95 * self.last
        g = local.gradient + local.product(start) + config.damping * start  # what is left to solve for
        given = {"damping": config.damping, "rtol": config.cg_rtol, "max_iter": config.cg_max_iter - 1}
        found = cg(local.product, g, preconditioner=local.preconditioner, **given)
        self.last = start + found.delta
        return step_along(replace(found, delta=self.last), batch, w, local, config)


class AdaptiveDamping:
    """λ by the ratio of gained to promised decrease: × 2/3 above ¾, × 3/2 below ¼ (Martens, 2010, section 4.1)."""

    def __init__(self) -> None:
        self.damping: float | None = None

    def __call__(self, batch: KStepObjective, w: Tensor, config: SolverConfig) -> Step:
        λ = self.damping if self.damping is not None else config.damping
        batch.damping = λ
        local = batch.expand(w)
        given = {"damping": λ, "rtol": config.cg_rtol, "max_iter": config.cg_max_iter}
        found = cg(local.product, local.gradient, preconditioner=local.preconditioner, **given)
        promised = -float(found.delta @ (local.gradient + 0.5 * local.product(found.delta)))
        ratio = (local.value - batch.value(w + found.delta)) / promised
        self.damping = λ * (2 / 3 if ratio > 0.75 else 3 / 2 if ratio < 0.25 else 1)
        return step_along(found, batch, w, local, config)


def trace(
    setting: Setting,
    index: int,
    limit: float,
    step: Stepper = newton_step,
    batch_size: int = BATCH_SIZE,
    least_squares: bool = False,
    curvature: str = "gauss-newton",
    preconditioner: str = "gram",
    autocast: bool = False,
    **changes: float,
) -> list[tuple[float, float]]:
    """Processor seconds and the lowest held-out loss by then over that of the mask, after every step."""
    torch.manual_seed(0)
    *batches, judge = setting.objectives(index, batch_size)
    for batch in batches:
        batch.solver = replace(batch.solver, curvature=curvature, preconditioner=preconditioner)
        batch.autocast = autocast
    w = judge.active.within(setting.chain)
    config = replace(settings_for("standard", setting.chain.family, "2:4").solver, **(OURS | changes))
    start, found = judge.value(w), [(0.0, 1.0)]
    began = time.process_time()
    if least_squares:
        short = Segment.cut(setting.chain, index, 0)
        for batch in batches:
            targets = batch.targets[:1]
            shorter = KStepObjective(
                short, batch.active, batch.state, PruneConfig("2:4", solver=batch.solver), targets
            )
            taken = newton_step(shorter, w, config)
            w = taken.w if taken is not None else w
        found.append((time.process_time() - began, min(1.0, judge.value(w) / start)))
    for batch in cycle(batches):
        taken = step(batch, w, config)
        if taken is None or found[-1][0] > limit:
            break
        w = taken.w
        found.append((time.process_time() - began, min(found[-1][1], judge.value(w) / start)))
    return found


VARIANTS: dict[str, Callable[[Setting, int, float], list[tuple[float, float]]]] = {
    "ours": lambda *given: trace(*given),
    "no preconditioner": lambda *given: trace(*given, preconditioner="none"),
    "the Gram blocks' diagonal": lambda *given: trace(*given, stepper(by_diagonal)),
    "Hutchinson's diagonal, 5 probes": lambda *given: trace(*given, stepper(by_hutchinson(5)), preconditioner="none"),
    "the Hessian in place of Gauss-Newton": lambda *given: trace(*given, curvature="hessian"),
    "from masked least squares (K = 0)": lambda *given: trace(*given, least_squares=True),
    "warm start": lambda *given: trace(*given, WarmStart()),
    "adaptive damping": lambda *given: trace(*given, AdaptiveDamping()),
    "5 products a step": lambda *given: trace(*given, cg_max_iter=5),
    "bfloat16 by autocast": lambda *given: trace(*given, autocast=True),
    "batches of 128": lambda *given: trace(*given, batch_size=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="places among the groups")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5, 20])
    arguments = parser.parse_args()
    setting = Setting.of(arguments.model, arguments.data, arguments.images, 0, arguments.pattern)
    places = masked_operations(setting.chain, setting.masks)
    names = [setting.chain.operations[places[layer]].name for layer in arguments.layers]
    times = ", ".join(f"{seconds:g} s" for seconds in arguments.seconds)
    print(f"{Path(arguments.model).name}, K = {setting.k}, {arguments.images} images, after {times}")
    print(f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    with frozen(setting.chain.model):
        for name, variant in VARIANTS.items():
            cells = []
            for layer in arguments.layers:
                found = variant(setting, places[layer], max(arguments.seconds))
                losses = (min(loss for at, loss in found if at <= seconds) for seconds in arguments.seconds)
                cells.append(" / ".join(f"{loss:.4f}" for loss in losses))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
