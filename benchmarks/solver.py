"""The paper's plain algorithm against ours, layer by layer, in one run: time and products to one and the same loss.

Both get the same layer of the dense network, mask, calibration images, targets and K, and the plain mean of Eq. 3.
First the plain algorithm runs until it stops, or its time limit; then ours, and the table gives the time at which ours
first had a held-out loss as low as that at which the plain one stopped. Seconds are the processor's.

    python benchmarks/solver.py MODEL --data FOLDER [--pattern 2:4] [--images 512] [--layers 1 8 16] [--limit 600]
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from paper_plain import CNN, VIT, Loss, plain_newton
from torch import Tensor

from snows_hf.adapters import Chain, build_chain, frozen
from snows_hf.data.images import calibration_images, open_images
from snows_hf.hub.load import load
from snows_hf.masks.choose import choose_masks
from snows_hf.method.newton import NewtonState, newton
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.method.streams import masked_operations, split_images
from snows_hf.patterns import Masks, parse_pattern
from snows_hf.settings import PruneConfig, settings_for


OURS = {"passes": 5, "cg_max_iter": 20, "min_gain": 0.0}
"""A layer that is on its own: no joint solve comes after it, and no stop on small gains, as the question is when ours
gets there, not where it would stop."""

BATCH_SIZE = 64


def as_loss(objective: KStepObjective) -> Loss:
    def loss(w: Tensor) -> Tensor:
        outputs = objective.segment.outputs(objective.state, objective.active.scatter(w))
        return sum((o - y).square().mean() for o, y in zip(outputs, objective.targets, strict=True))

    return loss


@dataclass(frozen=True)
class Setting:
    """What both algorithms get."""

    chain: Chain
    images: Tensor
    masks: Masks
    k: int

    @classmethod
    def of(cls, model: str, data: str, images: int, seed: int, pattern: str, k: int | None = None) -> "Setting":
        """Chain, calibration images and magnitude masks of a checkpoint; K of Table 7 where none is given."""
        checkpoint = load(model)
        chain = build_chain(checkpoint.model.float())
        x = calibration_images(open_images(data, "train"), images, seed, checkpoint.preprocess)
        weights = {p: chain.weight(p).detach() for _, group in chain.groups() for p in group.parameters}
        masks = choose_masks(weights, parse_pattern(pattern), "magnitude")
        k = settings_for("paper", chain.family, pattern).k if k is None else k
        return cls(chain, x.contiguous(memory_format=torch.channels_last), masks, k)

    def objectives(self, index: int, batch_size: int) -> list[KStepObjective]:
        """Batches, and last the held-out images, for the layer at operation ``index``."""
        segment = Segment.cut(self.chain, index, self.k)
        active = ActiveWeights({name: self.masks[name] for name in segment.group.parameters})
        made = []
        for part in split_images(len(self.images), batch_size, 0.1):
            state = (self.images[part],)
            with torch.no_grad():
                for operation in self.chain.operations[:index]:
                    state = operation.run(state)
            made.append(KStepObjective(segment, active, state, PruneConfig("2:4")))
        return made


def compare(setting: Setting, index: int, limit: float) -> list[str]:
    """One row of the table: the layer at operation ``index``."""
    chain = setting.chain
    *batches, judge = setting.objectives(index, 128)
    w = judge.active.within(chain)
    table_7 = VIT if chain.family == "vit" else CNN
    plain = plain_newton([as_loss(batch) for batch in batches], w, table_7, limit)
    goal = judge.value(plain.w)

    solver = replace(settings_for("standard", chain.family, "2:4").solver, **OURS)
    *batches, judge = setting.objectives(index, BATCH_SIZE)
    trace: list[tuple[float, float]] = []
    started = time.process_time()

    def note(state: NewtonState) -> None:
        trace.append((time.process_time() - started, state.result.loss_end))

    ours = newton(batches, judge, w, solver, note)
    reached = next((seconds for seconds, loss in trace if loss <= goal), None)
    return [
        *(chain.operations[index].name, f"{ours.loss_start:.4g}"),
        *(f"{goal:.4g}", str(plain.products), f"{'> ' if plain.cut_off else ''}{plain.seconds:.1f}"),
        *(f"{ours.loss_end:.4g}", str(ours.cg_iterations), f"{trace[-1][0]:.1f}"),
        *("not reached" if reached is None else f"{reached:.1f}", f"{plain.seconds / reached:.0f}" if reached else ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", help="places among the groups; all of them where not given")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one layer of the plain algorithm")
    arguments = parser.parse_args()
    setting = Setting.of(arguments.model, arguments.data, arguments.images, 0, arguments.pattern)
    places = masked_operations(setting.chain, setting.masks)
    name, threads = Path(arguments.model).name, torch.get_num_threads()
    print(f"{name}, {arguments.pattern}, K = {setting.k}, {len(setting.images)} images, {threads} threads")
    columns = ["layer", "masked loss", "plain: loss", "products", "seconds", "ours: loss", "products", "seconds"]
    columns += ["seconds to plain's loss", "ratio"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with frozen(setting.chain.model):
        for place in arguments.layers or range(len(places)):
            print(f"| {' | '.join(compare(setting, places[place], arguments.limit))} |", flush=True)


if __name__ == "__main__":
    main()
