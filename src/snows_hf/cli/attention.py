"""``snows-hf attention``"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.names import data_folder
from ..jobs.request import check_attention
from .options import DataSplit, Device, Json, Models, Quiet, Seed, checked
from .sink import Sink, open_sink
from .watch import Watch


def command(
    models: Models,
    data: Annotated[
        str, typer.Option(help="Images: Hub data set, image folder or parquet.", callback=checked(data_folder))
    ],
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    split: DataSplit = "test",
    images: Annotated[int, typer.Option(help="Images to draw.")] = 4,
    samples: Annotated[int, typer.Option(help="Images to measure similarity on.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the attention maps of Vision Transformers side by side: dense, mask alone, pruned."""
    check_attention(images, seed, output)

    from ..jobs.attention import attention

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        result = attention(
            models,
            data,
            output=output,
            split=split,
            images=images,
            samples=samples,
            seed=seed,
            device=device,
            **watch.told,
        )
    show(sink, result)
    sink.json(result)


def show(sink: Sink, result: dict[str, Any]) -> None:
    """Similarity to the first model's maps for people, and where the picture is."""
    from ..data.names import distinct_names
    from ..jobs.attention import KINDS

    first, *others = distinct_names([row["model"] for row in result["models"]])
    if others:
        sink.table(
            ["", *(f"{title}: {what}" for title in KINDS.values() for what in ("correlation", "cosine"))],
            [
                (name, *(f"{row[kind][what]:.3f}" for kind in KINDS for what in ("correlation", "cosine")))
                for name, row in zip(others, result["models"][1:], strict=True)
            ],
            title=f"Attention maps against those of {first}, means over {result['samples']} images",
        )
    sink.text(f"Saved to {result['output']}")
