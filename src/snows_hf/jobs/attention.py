"""Attention maps of a dense model, its mask alone and what SNOWS makes of it, side by side (the paper's Figure 4)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Chain, build_chain, frozen
from ..adapters.attention import recorded_attention
from ..adapters.base import chain_for
from ..adapters.check import check_chain
from ..data.images import ImageSource, Preprocess, calibration_images, open_images
from ..data.names import Name, distinct_names
from ..errors import AdapterError, ConfigError
from ..hub.load import Checkpoint
from ..reports.describe import describe_data
from ..runtime.files import write_whole
from ..runtime.run import Progress, Run
from .request import check_attention
from .subject import listed, load_told


BATCH = 8
"""Images whose attention is held at once: ViT-B/16 at 224 pixels needs 22 MB for one."""

CLASS_TOKENS = ("cls_token", "class_embedding")
"""How the name of a class token ends, which is the first token in every supported model that has one."""

KINDS = {"last": "last layer", "rollout": "rollout"}
MEASURES = ("correlation", "cosine")


MAPS = "Attention maps are for Vision Transformers with attention over all tokens."


class AttentionMaps(NamedTuple):
    """How much attention goes to each patch: of the last layer, and rolled out over all; both (n, rows, columns)."""

    last: Tensor
    rollout: Tensor


def attention(
    models: Name | Sequence[Name],
    data: Name,
    *,
    output: str | Path,
    split: str = "test",
    images: int = 4,
    samples: int = 64,
    seed: int = 0,
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Draws the attention maps of Vision Transformers on the same images, and compares them with the first model's.

    Args:
        models: Hub ids or folders; the others are compared with the first.
        data: images, of this ``split``.
        output: PNG file to write, which must not exist.
        images: number of images to draw.
        samples: images over which the similarity is averaged; those that are drawn are the first of them.
        seed: decides which images.
        others: as for :func:`snows_hf.prune`.

    Returns:
        ``models``, a list with ``last`` and ``rollout``, each the mean ``correlation`` (Pearson's) and ``cosine`` of
        the model's maps with the first model's (None for the first); ``images``, ``samples``, ``patches``, ``data``,
        ``output``.

    Raises:
        SnowsError: bad settings, a model without such attention, models whose maps differ in size, or an output that
            cannot be written.
    """
    names, output = listed(models), Path(output)
    check_attention(images, samples, seed, output)
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    loaded = ((name, load_told(run, name)) for name in names)
    found = compare_maps(run, loaded, open_images(data, split), output, images, samples, seed)
    return found | {"data": describe_data(data, split), "seed": seed, "output": str(output)}


def compare_maps(
    run: Run,
    models: Iterable[tuple[str, Checkpoint]],
    source: ImageSource,
    output: Path,
    images: int,
    samples: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """What :func:`attention` draws and measures of models, by name; each is moved to the run's device, in float32."""
    found: list[AttentionMaps] = []
    alike: list[list[tuple[Tensor, Tensor]]] = []
    names: list[str] = []
    shown = torch.empty(0)
    for name, checkpoint in models:
        chain = build_chain(checkpoint.model)
        check_attends(chain)
        checkpoint.model.to(run.device, torch.float32)
        pixels = calibration_images(source, max(samples, images), seed, checkpoint.preprocess)
        chain = chain_for(chain, pixels)
        run.say(f"Computing its attention on {len(pixels)} images of {source.name} ({source.split})")
        batches = run.track(pixels.split(BATCH), "Batches of attention maps", -(-len(pixels) // BATCH))
        parts = [attention_maps(chain, batch.to(run.device)) for batch in batches]
        maps = AttentionMaps(*(torch.cat(kind).cpu() for kind in zip(*parts, strict=True)))
        if not found:
            shown = displayable(pixels[:images], checkpoint.preprocess)
        elif maps.last.shape != found[0].last.shape:
            ours, first = ("{}x{}".format(*each.last.shape[1:]) for each in (maps, found[0]))
            raise ConfigError(
                f"{name} has maps of {ours} patches, and {names[0]} of {first}.",
                "Compare models of the same patch and image size.",
            )
        names.append(name)
        found.append(maps)
        alike.append([similarity(own, reference) for own, reference in zip(maps, found[0], strict=True)])
    run.say(f"Drawing {output}")
    draw(shown, distinct_names(names), found, [[correlation for correlation, _ in kinds] for kinds in alike], output)
    rows: list[dict[str, Any]] = [
        {kind: {measure: float(values.mean()) for measure, values in zip(MEASURES, both, strict=True)}
         for kind, both in zip(KINDS, kinds, strict=True)}
        for kinds in alike
    ]  # fmt: skip
    rows[0] = {kind: dict.fromkeys(MEASURES) for kind in KINDS}
    return {
        "models": [{"model": name} | row for name, row in zip(names, rows, strict=True)],
        "images": len(shown),
        "samples": len(found[0].last),
        "patches": list(found[0].last.shape[1:]),
    }


def check_attends(chain: Chain) -> None:
    """Refuses a network that has no maps, without running it.

    Raises:
        AdapterError: no attention, or attention within windows.
    """
    what = type(chain.model).__name__
    if all(group.kind != "qkv" for _, group in chain.groups()):
        raise AdapterError(f"{what} has no attention to draw.", MAPS)
    if any(hasattr(module, "shift_size") for module in chain.model.modules()):  # Swin's, in both libraries
        raise AdapterError(f"{what} attends within windows, so that no token sees the whole image.", MAPS)


@torch.no_grad()
def attention_maps(chain: Chain, images: Tensor) -> AttentionMaps:
    """Where a Vision Transformer looks: attention from the class token to the patches, the mean over heads; where
    there is no class token, the mean over all patches. Registers neither look nor are looked at.

    ``rollout`` is Abnar and Zuidema's (2020): the product over the layers of ½(A + I), A being the mean over heads.

    Images are preprocessed, (n, 3, height, width).

    Raises:
        AdapterError: a model without attention, with attention within windows, or that its chain does not reproduce.
    """
    check_attends(chain)
    check_chain(chain, images[:2])
    with frozen(chain.model), recorded_attention() as record:
        chain.results_of(images)
    layers = [weights.mean(-3) for weights in record]  # (n, tokens, tokens)
    tokens = layers[0].shape[-1] if layers else 0
    if {weights.shape for weights in layers} != {(len(images), tokens, tokens)}:
        raise AdapterError(f"The layers of {type(chain.model).__name__} do not all attend over the same tokens.", MAPS)
    rows, columns = patch_grid(chain.model, images, tokens)
    rolled = identity = torch.eye(tokens).to(layers[0])
    for weights in layers:
        rolled = (weights + identity) / 2 @ rolled
    extra = tokens - rows * columns
    class_first = any(name.endswith(CLASS_TOKENS) for name, _ in chain.model.named_parameters())

    def to_map(weights: Tensor) -> Tensor:
        looking = weights[:, 0] if class_first else weights[:, extra:].mean(1)
        return looking[:, extra:].unflatten(1, (rows, columns))

    return AttentionMaps(to_map(layers[-1]), to_map(rolled))


def patch_grid(model: nn.Module, images: Tensor, tokens: int) -> tuple[int, int]:
    """Rows and columns of patches, by the convolution that makes them. Class token and registers come before them.

    Raises:
        AdapterError: no convolution, or fewer tokens than patches.
    """
    patch = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if patch is not None:
        rows, columns = (images.shape[2 + i] // patch.stride[i] for i in (0, 1))
        if rows * columns <= tokens:
            return rows, columns
    raise AdapterError(
        f"The {tokens} tokens of {type(model).__name__} are no patches of a {tuple(images.shape)} image."
    )


def similarity(maps: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson's correlation and the cosine of two maps (n, rows, columns), each (n,)."""
    a, b = maps.flatten(1).double(), reference.flatten(1).double()
    centred = F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-20)
    return centred, F.cosine_similarity(a, b, dim=1, eps=1e-20)


def displayable(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Preprocessed images (n, 3, height, width) as colours between 0 and 1, (n, height, width, 3).

    What preprocessing makes of black and of white undoes its normalisation, whichever library does it.
    """
    ends = [PIL.Image.new("RGB", (pixels.shape[3], pixels.shape[2]), colour) for colour in ("black", "white")]
    black, white = preprocess(ends).mean((-2, -1))[..., None, None]
    return ((pixels - black) / (white - black)).clamp(0, 1).movedim(1, -1)


def draw(
    images: Tensor,
    names: Sequence[str],
    maps: Sequence[AttentionMaps],
    correlations: Sequence[Sequence[Tensor]],
    output: Path,
) -> None:
    """Writes the PNG: a row for each of the ``images``, colours (n, height, width, 3); all models' maps of one kind
    share a scale. ``correlations`` are with the first model's maps, by model and kind, each (n or more,).

    Raises:
        SaveError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    ratios = [1.0, *[0.1, *[1.0] * len(names)] * len(KINDS)]  # the image; of each kind a gap, and the models
    figure = Figure(figsize=(1.7 * sum(ratios), 1.95 * len(images) + 0.6), layout="constrained")
    axes = figure.subplots(len(images), len(ratios), squeeze=False, width_ratios=ratios)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.numpy())
        for k, title in enumerate(KINDS.values()):
            gap = 1 + k * (1 + len(names))
            axes[row, gap].set_axis_off()
            own = [each[k][row] for each in maps]
            largest = max(float(values.max()) for values in own)
            for i, (name, values) in enumerate(zip(names, own, strict=True)):
                axis = axes[row, gap + 1 + i]
                axis.imshow(values.numpy(), vmin=0, vmax=largest, cmap="viridis")
                if row == 0:
                    axis.set_title(f"{title}\n{name}", fontsize=8)
                if i:
                    axis.set_xlabel(f"r = {float(correlations[i][k][row]):.3f}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    write_whole(output, lambda path: figure.savefig(path, dpi=150, format="png"))
