"""Small networks in float64 with every kind of convolution, cut into operations, and evidence about them."""

import torch
from torch import Tensor, nn

from snows_hf.adapters import Chain, Group, Operation, build_chain, register
from snows_hf.masks.evidence import Evidence
from snows_hf.patterns import parse_pattern
from snows_hf.settings import PruneConfig


class Small(nn.Module):
    """Layers one after the other, a tanh after each but the last."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(read(layer, x))
        return read(self.layers[-1], x)


def read(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer on its input; a Linear after a convolution reads the mean over positions."""
    return layer(x.mean((2, 3)) if isinstance(layer, nn.Linear) and x.dim() == 4 else x)


@register(Small, family="small")
def small(model: Small) -> list[Operation]:
    operations = []
    for i, layer in enumerate(model.layers):
        last = i == len(model.layers) - 1

        def run(state: tuple[Tensor, ...], layer: nn.Module = layer, last: bool = last) -> tuple[Tensor, ...]:
            out = read(layer, state[0])
            return (out if last else torch.tanh(out),)

        operations.append(Operation(f"layers.{i}", run, Group(f"layers.{i}", (f"layers.{i}.weight",), "layer")))
    return operations


def linears(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)).double().eval()


def convolutions(seed: int = 0) -> Small:
    """Padding, stride, dilation, groups, a rectangular kernel, padding that is not zeros."""
    torch.manual_seed(seed)
    return (
        Small(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 8, (2, 3), stride=2, padding=(0, 2), dilation=(1, 2), groups=2),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
            nn.Linear(4, 3),
        )
        .double()
        .eval()
    )


def images_for(model: Small, count: int = 12, seed: int = 0) -> Tensor:
    """Correlated inputs, none of them zero on average."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 4) if isinstance(model.layers[0], nn.Linear) else (count, 4, 6, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x + 0.5 * x.roll(1, 1) + 0.3


def evidence(model: Small, pattern: str, mask: str, count: int = 12, **changes: object) -> Evidence:
    """Everything a criterion can ask for."""
    chain: Chain = build_chain(model)
    weights = {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(1))
    config = PruneConfig(pattern, mask=mask, k=2, batch_size=5).updated(**changes)
    return Evidence(weights, parse_pattern(pattern), config, chain, images_for(model, count), labels)
