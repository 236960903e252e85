"""What fits into memory: the model, or one operation of it after the other, and batches."""

import torch
from torch import Tensor

from ..adapters import Chain, State, frozen
from ..errors import ConfigError
from ..patterns import Masks
from ..runtime.device import describe_hardware
from ..runtime.distributed import from_main, local_processes, processes
from ..runtime.memory import available, saved_bytes
from ..runtime.run import Run
from ..settings import PruneConfig
from .factors import factor_bytes
from .objective import ActiveWeights, KStepObjective, Segment
from .streams import masked_operations, whole_network


OVERHEAD = 1.25
"""What a product needs in memory, over what is kept for it: some passes through while it is computed."""

SMALLEST_FACTORS = 2**16
"""Numbers in a parameter's factors below which smaller blocks no longer save much."""


def find_batches(run: Run, chain: Chain, images: Tensor, masks: Masks, config: PruneConfig) -> PruneConfig:
    """Settings whose batches fit: those of an earlier run with the same budget, else of :func:`fit_batches`."""
    hardware = describe_hardware(chain.device)
    known = run.journal.get("batches")
    if known is not None:
        config = config.updated(batch_size=known.facts["size"], factor_entries=known.facts["factor_entries"])
        if known.facts["hardware"] != hardware:
            run.say(
                f"The earlier run had {known.facts['hardware']}, this one has {hardware}: the last bits of "
                "the result may differ"
            )
    if known is None or known.facts["memory"] != run.memory:
        config = from_main(lambda: fit_batches(run, chain, images, masks, config, processes()))
    size, entries = config.batch_size, config.solver.factor_entries
    run.journal.put("batches", size=size, factor_entries=entries, memory=run.memory, hardware=hardware)
    return config


def fit_batches(
    run: Run, chain: Chain, images: Tensor, masks: Masks, config: PruneConfig, sharing: int = 1
) -> PruneConfig:
    """Settings whose batches, each shared out to ``sharing`` processes, fit: on the CPU into half of what the run has
    left (without a budget: of what is free), on CUDA into what the device has free. The preconditioner's factors, of
    which each process has its rows', may have half of that; where they would need more, their blocks are made smaller
    first.

    Raises:
        ConfigError: not even one image fits.
    """
    if chain.device.type == "cuda":
        free = int(0.8 * torch.cuda.mem_get_info(chain.device)[0])
    else:
        free = (available() // local_processes() if run.left is None else run.left) // 2
    graph, targets = bytes_per_image(chain, images, masks, config)
    if config.solver.preconditioner == "gram":
        groups = [{n: masks[n] for n in group.parameters if n in masks} for _, group in chain.groups()]
        groups = [masks] if config.joint_steps else groups
        entries = config.solver.factor_entries
        # Rows whose masks thin out do not keep the same columns for long.
        split = None if config.gradual_steps else {name: groups_of(chain, name) for name in masks}

        def factors() -> int:
            return max(factor_bytes(group, entries, split, sharing) for group in groups)

        while factors() > free // 2 and entries > SMALLEST_FACTORS:
            entries //= 2
        if entries < config.solver.factor_entries:
            run.say(f"Preconditioner in blocks of {factors() / 1e9:.2g} GB in all, to fit into memory")
            config = config.updated(factor_entries=entries)
        free -= factors()
    each = OVERHEAD * max(graph + targets, 1)
    fitting = sharing * int(free / each)
    if fitting < 1:
        raise ConfigError(
            f"One image needs {each / 1e9:.2f} GB at K = {config.k}, and {free / 1e9:.2f} GB are there for it.",
            "Give more --memory, or a smaller --k.",
        )
    part = config.curvature_size or config.batch_size
    if fitting >= part:  # of the others in a batch only targets are there all the time
        fitting = part + sharing * int((free - part / sharing * each) / (OVERHEAD * max(targets, 1)))
    if fitting >= config.batch_size:
        return config
    run.say(f"Batches of {fitting} images in place of {config.batch_size}, to fit into memory")
    return config.updated(batch_size=fitting)


def groups_of(chain: Chain, weight: str) -> int:
    """Groups of the convolution that a weight belongs to; 1 of other layers."""
    return getattr(chain.model.get_submodule(weight.rpartition(".")[0]), "groups", 1)


def bytes_per_image(chain: Chain, images: Tensor, masks: Masks, config: PruneConfig) -> tuple[int, int]:
    """Most that a product of any layer's objective needs in memory per image: what its graphs keep, with every
    output's residual, tangent and cotangent; and what the targets need. ``images`` holds two."""
    start: State = (images.to(chain.device),)
    plain = config.updated(preconditioner="none", gradual=0.0, curvature_size=0)

    def kept(segment: Segment, state: State) -> tuple[int, list[Tensor]]:
        active = ActiveWeights.of(segment.group, masks, chain.device, config.biases)
        objective = KStepObjective(segment, active, state, plain)
        return saved_bytes(lambda: objective.expand(active.within(chain))), list(objective.targets)

    def per_image(segment: Segment, state: State) -> tuple[int, int]:
        (two, outputs), (one, _) = kept(segment, state), kept(segment, tuple(tensor[:1] for tensor in state))
        targets = sum(output[0].nbytes for output in outputs)
        return two - one + 3 * targets, targets

    todo = masked_operations(chain, masks)
    with frozen(chain.model):
        if config.joint_steps:  # its graph holds all others
            return per_image(whole_network(chain, masks), start)
        needs = [
            per_image(Segment.cut(chain, index, config.k), state)
            for index, _, state in chain.walk(start, stop=todo[-1] + 1)
            if index in todo
        ]
        return max(graph for graph, _ in needs), max(targets for _, targets in needs)
