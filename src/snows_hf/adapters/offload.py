"""Models larger than the device that computes: their weights rest in main memory, and those that an operation reads
are on the device while it runs, and for as long as a graph that it is part of needs them.

accelerate's hooks do the like for a module that is called; an operation may read a weight of a module without that.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..runtime.run import Run
from .base import Chain, Operation, State


class Reads(TorchFunctionMode):
    """Every tensor that torch's functions are given within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))


class Runner(nn.Module):
    """What a functional call replaces the tensors of a model in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[State], State], state: State) -> State:
        return run(state)


@dataclass(frozen=True)
class Offloaded:
    """An operation's ``run`` with the tensors of these names, in ``runner``, on a device; so is what it gives."""

    run: Callable[[State], State]
    runner: Runner
    names: tuple[str, ...]
    device: torch.device

    def __call__(self, state: State) -> State:
        # As they are now: within an outer functional call, that one's.
        own = {name: attrgetter(name)(self.runner).to(self.device) for name in self.names}
        return torch.func.functional_call(self.runner, own, (self.run, send_to_device(state, self.device)))


class Whole(nn.Module):
    """A chain as the model that it is, with its outputs by name."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.chain.results_of(images)


@torch.no_grad()
def offloaded(chain: Chain, images: Tensor, device: torch.device) -> Chain:
    """The chain of a model that stays where it is, on the CPU, computing on ``device``; images (n, 3, height, width)
    run through it once, to see what each operation reads."""
    runner, training = Runner(chain.model), chain.model.training
    names: dict[int, list[str]] = {}
    for kind in (runner.named_parameters, runner.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    state: State = (images.to(chain.weight(chain.groups()[0][1].parameters[0])),)
    operations: list[Operation] = []

    def note(operation: Operation, state: State) -> State:
        with Reads() as reads:
            state = operation.run(state)
        read = dict.fromkeys(name for tensor in reads.tensors for name in names.get(id(tensor), ()))
        operations.append(replace(operation, run=Offloaded(operation.run, runner, tuple(read), device)))
        return state

    chain.model.eval()
    deque(chain.walk(state, note), maxlen=0)  # for what is noted
    chain.model.train(training)
    return Chain(chain.model, operations, chain.family, device, chain.results, chain.dense, chain.image, chain.graph)


ROOM_FOR_WEIGHTS = 7
"""What a device needs for weights, over the model's own bytes: SparseGPT's masks take 6.5 times (docs/results.md)."""


def place(run: Run, chain: Chain, images: Tensor, offload: bool | None) -> Chain:
    """The chain with its model on the run's device; or one that computes there while the model stays on the CPU, where
    ``offload`` says so, or, for None, where a CUDA device has not ``ROOM_FOR_WEIGHTS`` times its bytes. One image
    shows what each operation reads."""
    size = sum(tensor.nbytes for tensor in chain.model.state_dict().values())
    if offload is None and run.device.type == "cuda":
        offload = size * ROOM_FOR_WEIGHTS > torch.cuda.mem_get_info(run.device)[0]
    if not offload:
        chain.model.to(run.device)
        return chain
    run.say(f"Weights of {size / 1e9:.2g} GB stay in main memory, and come to {run.device} operation by operation")
    return offloaded(chain, images, run.device)
