"""``snows-hf eval``, ``sensitivity``, ``probe`` and ``attention``"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.names import distinct_names, model_folder, short_name
from ..errors import ConfigError
from ..jobs.request import (
    DEFAULT_DATA,
    DEFAULT_PATTERNS,
    check_attention,
    check_plot,
    check_probe,
    check_prompts,
    check_sensitivity,
)
from ..settings import PruneConfig
from .command import Call, with_options
from .options import (
    DataSplit,
    Device,
    Drawn,
    EvalSplit,
    Images,
    Model,
    Models,
    Revision,
    Seed,
    checked,
    images_option,
)
from .sink import Sink, by, shown


@with_options()
def evaluate(
    call: Call,
    model: Model,
    data: Images,
    split: DataSplit = "test",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="For models of images and text, what is said of an image, {} being the name of a class. Repeatable: "
            "embeddings are averaged.",
            show_default="a photo of a {}.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Instead, compare outputs with this dense model's, of any kind and without labels.",
            callback=checked(model_folder),
        ),
    ] = None,
    confusions: Annotated[
        bool, typer.Option("--confusions", help="Count them in the object of --json, by true and predicted class.")
    ] = False,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Measure a checkpoint's top-1 and top-5 accuracy, dense or pruned: by its classifier, by the names of the classes
    (models of images and text), or by nearest neighbours (features)."""
    check_prompts(prompt or ())
    if prompt and reference is not None:
        raise ConfigError("--prompt is for accuracies, and --reference measures none.")

    from ..jobs.evaluate import evaluate as job, fidelity

    if reference is not None:
        compared = call.run(fidelity).to_dict()
        title = f"{model} against {reference}, on {compared['images']} images of {data} ({split})"
        call.sink.fidelity({short_name(model): compared}, title)
        call.sink.json(compared)
        return
    found = call.run(job, prompts=tuple(prompt or ())).to_dict()
    call.sink.text(
        f"{model}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % on {found['images']} images of {data} "
        f"({split}){by(found)}"
    )
    if not confusions:
        found.pop("confusion")
    call.sink.json(found)


@with_options(PruneConfig, "mask", "repair_steps", "layers", "seed")
def sensitivity(
    call: Call,
    model: Model,
    patterns: Annotated[str, typer.Option(help="With commas: 1:4,2:4,4:8, or 0.5,0.8.")] = DEFAULT_PATTERNS,
    data: Images = DEFAULT_DATA,
    data_split: DataSplit = "train",
    samples: Annotated[
        int | None, typer.Option(help="Images; a quarter repairs, the others judge.", show_default="256")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table to this file (.png, .svg, .pdf).")] = None,
    device: Device = "auto",
    revision: Revision = None,
    **settings: Any,
) -> None:
    """Measure what each layer costs the network under each pattern, all other layers dense."""
    if samples is not None:
        settings["samples"] = samples
    check_sensitivity(patterns, "standard", settings)
    if plot is not None:
        check_plot(plot)

    from ..jobs.sensitivity import plot_sensitivity, sensitivity as job

    result = call.run(job, **settings)
    call.sink.table(
        {"layer": "{name}", "weights": "{weights:,}"} | {shown(p): partial(cell, p) for p in result["patterns"]},
        result["layers"],
        "Error of the logits over their variance, one layer sparse and all others dense",
    )
    if plot is not None:
        plot_sensitivity(result, plot)
        call.sink.text(f"Plot saved to {plot}")
    call.sink.json(result)


def cell(pattern: str, layer: dict[str, Any]) -> str:
    """A loss for people: nothing where the pattern does not fit."""
    losses = [found["loss"] for found in layer["candidates"] if found["pattern"] == pattern]
    return "".join("not finite" if loss is None else f"{loss:.2g}" for loss in losses)


@with_options()
def probe(
    call: Call,
    models: Models,
    data: Annotated[
        str,
        images_option("Labelled images of the classes to transfer to: Hub data set, image folder or parquet."),
    ],
    train_split: Annotated[str, typer.Option(help="Split of --data that the probe is fitted on.")] = "train",
    eval_data: Annotated[
        str | None, images_option("Labelled images to measure on.", show_default="those of --data")
    ] = None,
    test_split: EvalSplit = "test",
    samples: Annotated[int | None, typer.Option(help="Training images to draw. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, and of the split that chooses the regularisation.")] = 0,
    device: Device = "auto",
) -> None:
    """Fit a linear classifier on the frozen features of each model: what they transfer to other classes."""
    check_probe(data, train_split, eval_data, test_split, samples, seed)

    from ..jobs.probe import probe as job

    result = call.run(job)
    show_probes(call.sink, result)
    call.sink.json(result)


def show_probes(sink: Sink, result: dict[str, Any]) -> None:
    """The table for people; differences are to the first model, on the same images."""
    names = distinct_names([row["model"] for row in result["models"]])
    rows = [row | {"name": name} for name, row in zip(names, result["models"], strict=True)]
    columns = {"": "{name}", "top-1 (%)": "{top1:.2f}", "95 %": "{interval[0]:.2f} … {interval[1]:.2f}"}
    if len(rows) > 1:
        interval = "{difference_interval[0]:+.2f} … {difference_interval[1]:+.2f}"
        columns |= {"difference": "{difference:+.2f}", "its 95 %": interval}
    data, images = result["data"]["name"], f"{result['train_images']} training and {result['test_images']} test images"
    sink.table(columns, rows, f"Linear probe on {data}: {result['classes']} classes, {images}")


@with_options()
def attention(
    call: Call,
    models: Models,
    data: Images,
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    split: DataSplit = "test",
    images: Drawn = 4,
    samples: Annotated[int, typer.Option(help="Images to measure similarity on.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw the attention maps of Vision Transformers side by side: dense, mask alone, pruned."""
    check_attention(images, samples, seed, output)

    from ..jobs.attention import attention as job

    result = call.run(job)
    show_likeness(call.sink, result)
    call.sink.json(result)


def show_likeness(sink: Sink, result: dict[str, Any]) -> None:
    """Similarity to the first model's maps for people, and where the picture is."""
    from ..jobs.attention import KINDS

    first, *others = distinct_names([row["model"] for row in result["models"]])
    if others:
        figures = {
            f"{title}: {what}": f"{{{kind}[{what}]:.3f}}"
            for kind, title in KINDS.items()
            for what in ("correlation", "cosine")
        }
        rows = [row | {"name": name} for name, row in zip(others, result["models"][1:], strict=True)]
        title = f"Attention maps against those of {first}, means over {result['samples']} images"
        sink.table({"": "{name}"} | figures, rows, title)
    sink.text(f"Saved to {result['output']}")
