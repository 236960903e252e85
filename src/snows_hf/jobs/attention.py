"""Attention maps of a dense model, its mask alone and what SNOWS makes of it, side by side (the paper's Figure 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Chain, build_chain, frozen
from ..adapters.attention import recorded_attention
from ..adapters.check import check_chain
from ..data.images import Preprocess, calibration_images, open_images
from ..data.names import Name, distinct_names
from ..errors import AdapterError, ConfigError
from ..hub.load import load
from ..reports.describe import describe_data
from ..runtime.files import write_whole
from ..runtime.run import Progress, Run
from .request import check_attention


BATCH = 8
"""Images whose attention is held at once: ViT-B/16 at 224 pixels needs 22 MB for one."""

CLASS_TOKENS = ("cls_token", "class_embedding")
"""How the name of a class token ends, which is the first token in every supported model that has one."""

KINDS = {"last": "last layer", "rollout": "rollout"}


@dataclass(frozen=True)
class AttentionMaps:
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
        data: images: Hub data set, image folder or folder of parquet.
        output: PNG file to write, which must not exist.
        split: of ``data``.
        images: number of images to draw.
        samples: images over which the similarity is averaged; those that are drawn are the first of them.
        seed: decides which images.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_stage: called with a line of text when a new stage begins.
        on_progress: called with a :class:`~snows_hf.runtime.run.Progress` as a stage goes on.

    Returns:
        ``models``, a list with ``last`` and ``rollout``, each the mean ``correlation`` (Pearson's) and ``cosine`` of
        the model's maps with the first model's (None for the first); ``images``, ``samples``, ``patches``, ``data``,
        ``output``.

    Raises:
        SnowsError: bad settings, a model without such attention, models whose maps differ in size, or an output that
            cannot be written.
    """
    names = [fspath(model) for model in ([models] if isinstance(models, str | PathLike) else models)]
    if not names:
        raise ConfigError("No model to look into.", "Name at least one Hub id or folder.")
    output = Path(output)
    check_attention(images, samples, seed, output)
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    source = open_images(data, split)

    found: list[AttentionMaps] = []
    shown = torch.empty(0)
    for name in names:
        run.say(f"Loading {name}")
        checkpoint = load(name)
        chain = build_chain(checkpoint.model.to(run.device, torch.float32))
        pixels = calibration_images(source, max(samples, images), seed, checkpoint.preprocess)
        run.say(f"Computing its attention on {len(pixels)} images of {data} ({split})")
        batches = run.track(pixels.split(BATCH), "Batches of attention maps", -(-len(pixels) // BATCH))
        parts = [attention_maps(chain, batch.to(run.device)) for batch in batches]
        maps = AttentionMaps(torch.cat([p.last for p in parts]).cpu(), torch.cat([p.rollout for p in parts]).cpu())
        found.append(maps)
        if maps.last.shape != found[0].last.shape:
            raise ConfigError(
                f"{name} has maps of {describe_grid(maps)} patches, and {names[0]} of {describe_grid(found[0])}.",
                "Compare models of the same patch and image size.",
            )
        if name == names[0]:
            shown = displayable(pixels[:images], checkpoint.preprocess)
    alike = {kind: [similarity(getattr(m, kind), getattr(found[0], kind)) for m in found] for kind in KINDS}
    run.say(f"Drawing {output}")
    draw(shown, distinct_names(names), found, {kind: [s[0] for s in alike[kind]] for kind in KINDS}, output)
    return {
        "models": [
            {"model": name}
            | {
                kind: {
                    "correlation": float(alike[kind][i][0].mean()) if i else None,
                    "cosine": float(alike[kind][i][1].mean()) if i else None,
                }
                for kind in KINDS
            }
            for i, name in enumerate(names)
        ],
        "images": len(shown),
        "samples": len(found[0].last),
        "patches": list(found[0].last.shape[1:]),
        "data": describe_data(data, split),
        "seed": seed,
        "output": str(output),
    }


def describe_grid(maps: AttentionMaps) -> str:
    return "{}x{}".format(*maps.last.shape[1:])


@torch.no_grad()
def attention_maps(chain: Chain, images: Tensor) -> AttentionMaps:
    """Where a Vision Transformer looks: attention from the class token to the patches, the mean over heads; where
    there is no class token, the mean over all patches. Registers neither look nor are looked at.

    ``rollout`` is Abnar and Zuidema's (2020): the product over the layers of ½(A + I), A being the mean over heads.

    Args:
        chain: of the model.
        images: preprocessed, (n, 3, height, width).

    Raises:
        AdapterError: a model without attention, with attention within windows, or that its chain does not reproduce.
    """
    check_chain(chain, images[:2])
    with frozen(chain.model), recorded_attention() as record:
        chain.logits(images)
    what = type(chain.model).__name__
    if not record:
        raise AdapterError(f"{what} has no attention to draw.", "Attention maps are for Vision Transformers.")
    layers = [weights.mean(-3) for weights in record]  # (n, tokens, tokens)
    if layers[0].ndim != 3:
        raise AdapterError(
            f"{what} attends within windows, so that no token sees the whole image.",
            "Attention maps are for Vision Transformers with attention over all tokens.",
        )
    rows, columns = patch_grid(chain.model, images, layers[0].shape[-1])
    identity = torch.eye(layers[0].shape[-1]).to(layers[0])
    rolled = identity
    for weights in layers:
        rolled = (weights + identity) / 2 @ rolled
    extra = layers[0].shape[-1] - rows * columns
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
    images: Tensor, names: Sequence[str], maps: Sequence[AttentionMaps], alike: dict[str, list[Tensor]], output: Path
) -> None:
    """Writes the PNG: a row for each image; all models' maps of one kind share a scale.

    Args:
        images: colours (n, height, width, 3).
        names: of the models.
        maps: of each model, of n images or more.
        alike: correlations with the first model's map, by kind and model, each (n or more,).
        output: the file.

    Raises:
        SaveError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    ratios = [1.0]
    for _ in KINDS:
        ratios += [0.1, *[1.0] * len(names)]  # a gap, and the models
    figure = Figure(figsize=(1.7 * sum(ratios), 1.95 * len(images) + 0.6), layout="constrained")
    axes = figure.subplots(len(images), len(ratios), squeeze=False, width_ratios=ratios)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image.numpy())
        for k, (kind, title) in enumerate(KINDS.items()):
            gap = 1 + k * (1 + len(names))
            axes[row, gap].set_axis_off()
            own = [getattr(m, kind)[row] for m in maps]
            for i, (name, values) in enumerate(zip(names, own, strict=True)):
                axis = axes[row, gap + 1 + i]
                axis.imshow(values.numpy(), vmin=0, vmax=max(float(v.max()) for v in own), cmap="viridis")
                if row == 0:
                    axis.set_title(f"{title}\n{name}", fontsize=8)
                if i:
                    axis.set_xlabel(f"r = {float(alike[kind][i][row]):.3f}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    write_whole(output, lambda path: figure.savefig(path, dpi=150, format="png"))
