"""Figure 10: how many iterations conjugate gradients should have.

    python examples/paper/figure10.py --models MODELS --data DATA [--places 0 | -1] [--seconds 20]

One layer of the dense network at a time, from the masked weights (2:4, magnitude), by Algorithm 2 with at most 5 to
500 products for each system, each for the same processor time; held-out losses relative to the start. The paper's
solver (Hessian products, no preconditioner) and ours (Gauss-Newton products, Gram preconditioner). Twenty minutes.
"""

from dataclasses import replace
from functools import partial

from common import each_layer, layer_arguments, number, table, timed_newton
from solver import Setting

from snows_hf.settings import settings_for


CAPS = (5, 10, 50, 100, 500)
SOLVERS = {"paper": ("none", "hessian"), "ours": ("gram", "gauss-newton")}


def measured(setting: Setting, index: int, which: str, cap: int, limit: float) -> dict[str, float]:
    config = settings_for("paper" if which == "paper" else "standard", setting.chain.family, "2:4")
    solver = replace(config.solver, cg_max_iter=cap)
    clock = timed_newton(setting, index, solver, limit, config.batch_size, *SOLVERS[which])
    start = clock.trace[0][1]
    return {"start": start, "eighth": clock.best(1 / 8), "half": clock.best(1 / 2), "end": clock.best()}


def main() -> None:
    given = layer_arguments(__doc__, 20.0)
    for name in given.only:
        rows = []
        for setting, index, layer, find in each_layer(given, name, "10"):
            for which in SOLVERS:
                cells = []
                for cap in CAPS:
                    run = partial(measured, setting, index, which, cap, given.seconds)
                    found = find({"solver": which, "cap": cap}, run)
                    left = [found[at] / found["start"] for at in ("eighth", "half", "end")]
                    cells.append(" / ".join(number(share, 4) for share in left))
                rows.append((layer, which, *cells))
        table(
            f"Figure 10: {name}, K = {given.k}, {given.images} images; loss after 1/8, 1/2, all of {given.seconds:g} "
            "s",
            ["layer", "solver", *(f"CG {cap}" for cap in CAPS)],
            rows,
            "the paper shows curves by step (low caps gain less per step, and as much or more per second), for "
            "ResNet-20 and ResNet-50; here by processor time, on the dense network's layers.",
        )


if __name__ == "__main__":
    main()
