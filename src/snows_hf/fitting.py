"""What fits into memory: the model, or one operation of it after the other, and batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .adapters import Chain, State, frozen, offloaded
from .allocation import Candidate
from .config import PruneConfig
from .describe import describe_hardware
from .distributed import from_main, local_processes, processes
from .errors import ConfigError
from .journal import Journal
from .masks import Evidence, Masks, choose_masks
from .masks.scores import needs_labels
from .memory import available, saved_bytes
from .objective import ActiveWeights, KStepObjective, Segment
from .preconditioner import factor_bytes
from .solver import Expansion
from .streams import masked_operations, whole_network


OVERHEAD = 1.25
"""What a product needs in memory, over what is kept for it: some passes through while it is computed."""

ROOM_FOR_WEIGHTS = 7
"""What a device needs for weights, over the model's own bytes: SparseGPT's masks take 6.5 times (docs/results.md)."""

SMALLEST_FACTORS = 2**16
"""Numbers in a parameter's factors below which smaller blocks no longer save much."""


def place(
    chain: Chain, images: Tensor, device: torch.device, offload: bool | None, on_stage: Callable[[str], None]
) -> Chain:
    """The chain with its model on ``device``; or one that computes there while the model stays on the CPU, where
    ``offload`` says so, or, for None, where a CUDA device has not ``ROOM_FOR_WEIGHTS`` times its bytes.

    Args:
        images: one or more, to see what each operation reads.
    """
    size = sum(tensor.nbytes for tensor in chain.model.state_dict().values())
    if offload is None and device.type == "cuda":
        offload = size * ROOM_FOR_WEIGHTS > torch.cuda.mem_get_info(device)[0]
    if not offload:
        chain.model.to(device)
        return chain
    on_stage(f"Weights of {size / 1e9:.2g} GB stay in main memory, and come to {device} operation by operation")
    return offloaded(chain, images, device)


def find_batches(
    journal: Journal,
    chain: Chain,
    images: Tensor,
    masks: Masks,
    config: PruneConfig,
    memory: float | None,
    left: int | None,
    on_stage: Callable[[str], None],
) -> PruneConfig:
    """Settings whose batches fit: those of an earlier run with the same budget, else of :func:`fit_batches`."""
    hardware = describe_hardware(chain.device)
    known = journal.get("batches")
    if known is not None:
        config = config.updated(batch_size=known.facts["size"], factor_entries=known.facts["factor_entries"])
        if known.facts["hardware"] != hardware:
            on_stage(
                f"The earlier run had {known.facts['hardware']}, this one has {hardware}: the last bits of "
                "the result may differ"
            )
    if known is None or known.facts["memory"] != memory:
        config = from_main(lambda: fit_batches(chain, images, masks, config, left, on_stage, processes()))
    entries = config.solver.factor_entries
    journal.put("batches", size=config.batch_size, factor_entries=entries, memory=memory, hardware=hardware)
    return config


def fit_sensitivity(
    evidence: Evidence, candidates: Sequence[Candidate], left: int | None, on_stage: Callable[[str], None]
) -> Evidence:
    """Evidence, with images, whose batches fit where layers are repaired one by one, under the candidate that keeps
    most.

    Raises:
        ConfigError: not even one image fits.
    """
    densest = min((c for c in candidates if c is not None), key=lambda candidate: candidate.sparsity)
    masks = choose_masks(dict(evidence.weights), densest, "magnitude")  # of any criterion's size
    images, config = evidence.images, evidence.config.updated(joint_steps=0)
    assert images is not None
    return replace(evidence, config=fit_batches(evidence.network, images[:2], masks, config, left, on_stage))


def fit_criterion(evidence: Evidence, left: int | None, on_stage: Callable[[str], None]) -> Evidence:
    """Evidence whose batches fit where a criterion needs labels: it expands the loss of the whole network.

    Raises:
        ConfigError: not even one image fits.
    """
    images = evidence.images
    if images is None or not needs_labels(evidence.config.mask):
        return evidence
    chain, config = evidence.network, evidence.config
    whole = config.updated(joint_steps=1, gradual=0.0, curvature="hessian", preconditioner="none")
    fitted = fit_batches(chain, images[:2], dict(evidence.everything.masks), whole, left, on_stage)
    return replace(evidence, config=config.updated(batch_size=fitted.batch_size))


def fit_batches(
    chain: Chain,
    images: Tensor,
    masks: Masks,
    config: PruneConfig,
    left: int | None,
    on_stage: Callable[[str], None],
    sharing: int = 1,
) -> PruneConfig:
    """Settings whose batches, each shared out to ``sharing`` processes, fit: on the CPU into half of ``left`` bytes
    (None: of what is free), on CUDA into what the device has free. The preconditioner's factors, of which each process
    has its rows', may have half of that; where they would need more, their blocks are made smaller first.

    Raises:
        ConfigError: not even one image fits.
    """
    if chain.device.type == "cuda":
        free = int(0.8 * torch.cuda.mem_get_info(chain.device)[0])
    else:
        free = (available() // local_processes() if left is None else left) // 2
    each = bytes_per_image(chain, images, masks, config)
    if config.solver.preconditioner == "gram":
        groups = [{n: masks[n] for n in group.parameters if n in masks} for _, group in chain.groups()]
        groups = [masks] if config.joint_steps else groups
        entries = config.solver.factor_entries

        def factors() -> int:
            return max(factor_bytes(group, entries) for group in groups) // sharing

        while factors() > free // 2 and entries > SMALLEST_FACTORS:
            entries //= 2
        if entries < config.solver.factor_entries:
            on_stage(f"Preconditioner in blocks of {factors() / 1e9:.2g} GB in all, to fit into memory")
            config = config.updated(factor_entries=entries)
        free -= factors()
    fitting = sharing * int(free / (OVERHEAD * max(each, 1)))
    if fitting >= config.batch_size:
        return config
    if fitting < 1:
        raise ConfigError(
            f"One image needs {OVERHEAD * each / 1e9:.2f} GB at K = {config.k}, and {free / 1e9:.2f} GB are there for "
            "it.",
            "Give more --memory, or a smaller --k.",
        )
    on_stage(f"Batches of {fitting} images in place of {config.batch_size}, to fit into memory")
    return config.updated(batch_size=fitting)


def bytes_per_image(chain: Chain, images: Tensor, masks: Masks, config: PruneConfig) -> int:
    """Most that a product of any layer's objective needs in memory per image of a batch: what its graphs keep, and of
    every output the target, residual, tangent and cotangent. ``images`` holds two."""
    start: State = (images.to(chain.device),)
    state, segments = start, []
    todo = masked_operations(chain, masks)
    with frozen(chain.model):
        if config.joint_steps:  # its graph holds all others
            segments, todo = [(whole_network(chain, masks), start)], []
        for index, operation in enumerate(chain.operations[: max(todo, default=-1) + 1]):
            if index in todo:
                segments.append((Segment.cut(chain, index, config.k), state))
            with torch.no_grad():
                state = operation.run(state)
        return max(
            saved_bytes(partial(_expand, segment, state, masks, config))
            - saved_bytes(partial(_expand, segment, tuple(tensor[:1] for tensor in state), masks, config))
            + 4 * sum(output[0].nbytes for output in _outputs(segment, state))
            for segment, state in segments
        )


@torch.no_grad()
def _outputs(segment: Segment, state: State) -> list[Tensor]:
    return segment.outputs(state)


def _expand(segment: Segment, state: State, masks: Masks, config: PruneConfig) -> Expansion:
    targets = _outputs(segment, state)
    active = ActiveWeights.of(segment.group, masks, segment.chain.device)
    w = active.within(segment.chain)
    return KStepObjective(segment, active, state, targets, config.solver.curvature).expand(w)
