"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce (streams.py)."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from ..adapters import Chain, Operation, frozen
from ..patterns import Masks, Pattern
from ..runtime.memory import Images, Shelf
from ..runtime.run import Run
from ..settings import PruneConfig
from .layers import Layers, Task
from .objective import Segment
from .records import LayerReport
from .streams import Streams, Teacher, holding, masked_operations, moved, split_images, whole_network


def prune_chain(
    chain: Chain,
    images: Tensor | Images,
    masks: Masks,
    config: PruneConfig,
    run: Run | None = None,
    start: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
    teacher: Teacher | None = None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on the device where segments are to run.
        images: preprocessed (n, 3, h, w), in an order that is already random. Activations rest on their shelf; those
            of a tensor's stay in memory.
        masks: parameter name → bool mask; parameters without one stay dense.
        run: is told when a layer starts, after each Newton step, and when a layer is done; its journal keeps every
            finished layer, and has those that an earlier run has finished.
        start: full weights that a criterion has updated for these masks. A layer starts from them in the first sweep
            where their held-out loss is below that of the dense weights masked; targets stay the dense network's.
            Those of parameters without a mask are there from the beginning, and stay.
        pattern: to which the masks, which keep more, thin out after the sweeps (gradual.py), in
            ``config.gradual_steps`` joint steps. None: they stay as they are.
        teacher: the dense network, where the chain's model is a smaller one that was cut out of it.

    Raises:
        MemoryLimitError: a single image is too much.

    Returns:
        One report per pruned group, in forward order; the groups once more for every further sweep, and one each for
        gradual steps and the joint solve.
    """
    batches = split_images(len(images), config.batch_size, config.held_out)
    shelf = images.shelf if isinstance(images, Images) else Shelf()
    # In the first sweep nothing of a segment is pruned yet: the model's own weights are the dense ones. Not so biases:
    # a batch norm may act after the layer that comes next (a shortcut's convolution).
    again = config.sweeps > 1 or config.joint_steps > 0
    moving = [name for name in moved(chain, masks, config.biases) if again or name not in masks]
    start = start or {}
    free = {name: weight for name, weight in start.items() if name not in masks}
    dense = {name: chain.tensor(name).detach().clone() for name in dict.fromkeys([*moving, *free])}
    chain.put(free)
    for name, mask in masks.items() if not config.sweeps else ():  # no sweep begins with these
        weight = chain.weight(name).detach()
        chain.put({name: start.get(name, weight).to(weight).where(mask.to(weight.device), 0)})
    gradual_steps = config.gradual_steps if pattern is not None else 0
    joint_steps = config.joint_steps - gradual_steps
    solves = config.sweeps * len(masked_operations(chain, masks))
    total = solves + (pattern is not None) + (joint_steps > 0)
    layers = Layers(chain, masks, dense, config, run or Run(), start, total, teacher)
    reports: list[LayerReport] = []
    with frozen(chain.model), frozen(teacher.chain.model) if teacher else nullcontext():
        for number in range(1, config.sweeps + 1):
            reports += sweep(layers, number, Streams.start(images, batches, shelf))
        if pattern is not None:
            segment = whole_network(chain, masks, "all layers, thinning out")
            task = Task(segment, max(config.sweeps, 1) + 1, solves, steps=gradual_steps, pattern=pattern)
            report, weights = layers.finish(task, Streams.start(images, batches, shelf))
            reports.append(report)
            layers = replace(layers, masks={name: weights[name] != 0 for name in masks})
        if joint_steps:
            # Algorithm 2 on the outputs of every operation of the network, from its images on.
            task = Task(whole_network(chain, masks), max(config.sweeps, 1) + 1, total - 1, gradual_steps, joint_steps)
            reports.append(layers.finish(task, Streams.start(images, batches, shelf))[0])
    return reports


def sweep(layers: Layers, number: int, streams: Streams) -> list[LayerReport]:
    """All layers once, in forward order; ``number`` counts from 1."""
    chain, reports = layers.chain, list[LayerReport]()
    todo = masked_operations(chain, layers.masks)
    theirs = {operation.name: operation for operation in layers.teacher.chain.operations} if layers.teacher else {}
    before: dict[str, Tensor] = {}  # of the layer that was solved last: what the dense stream still takes

    def advance(operation: Operation, streams: Streams) -> Streams:
        if layers.teacher is not None:
            streams.advance(theirs[operation.name], "dense", chain.device)
        elif layers.config.targets != "cascaded":
            with holding(chain, {**layers.dense, **before}):
                streams.advance(operation, "dense", chain.device)
        streams.advance(operation, "pruned", chain.device)
        before.clear()
        return streams

    for index, operation, _ in chain.walk(streams, advance, stop=max(todo, default=-1) + 1):
        if operation.group is not None and index in todo:
            names = [name for name in operation.group.parameters if name in layers.masks and name not in layers.dense]
            before.update((name, chain.weight(name).detach().clone()) for name in names)
            segment, place = Segment.cut(chain, index, layers.config.k), (number - 1) * len(todo) + len(reports)
            reports.append(layers.finish(Task(segment, number, place), streams)[0])
    return reports
