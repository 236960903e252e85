"""What pruning did, as a page for people (report.html) and as data (report.json); several results side by side."""

import base64
import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn

from ..adapters import build_chain
from ..data.images import calibration_images, open_images
from ..data.names import Name, local_folder, short_name
from ..errors import AdapterError, ConfigError, LoadError, SaveError, one_line
from ..hub.load import Checkpoint, load
from ..hub.packed import pack_tensor
from ..hub.save import REPORT_FILE, read_report, retrainings, save_checkpoint
from ..masks.permutation import order_like
from ..runtime.files import check_file, write_json, write_whole
from .attention import attention
from .request import check_report


HTML_FILE, JSON_FILE = "report.html", "report.json"

STRIP = 64
"""Most cells of a layer's strip of sparsity; layers with more rows than that show means of neighbours."""

MATRIX = 20
"""Most classes that are drawn as a matrix of confusions; of more, only the largest changes are listed."""

LISTED = 20
"""Most changes that a list of classes, or of confusions, shows."""


def report(
    model: Name,
    *,
    output: str | Path | None = None,
    dense: Name | None = None,
    data: Name | None = None,
    split: str = "test",
    images: int = 4,
    revision: str | None = None,
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Writes report.html, one file that needs no other, and report.json about what ``prune`` made.

    Args:
        model: folder (or Hub id) of what ``prune`` wrote.
        output: folder for the two files, which replace earlier ones; None takes that of the model.
        dense: Hub id or folder of the dense model, for its attention maps and those of the mask alone.
        data: images for attention maps: Hub data set, image folder or folder of parquet; None draws none.
        split: of ``data``.
        images: number of images to draw.
        revision: of ``dense`` on the Hub.
        device: ``auto``, ``cpu`` or ``cuda``, for the attention maps.
        on_stage: called with a line of text when a new stage begins.

    Returns:
        The contents of report.json: the report of the prune, with ``size`` (bytes, dense and packed),
        ``flops.reduction``, ``rows`` (shares of zeros along the rows of each layer), ``class_changes`` and
        ``attention`` (both None where not measured); besides, ``html`` and ``json``, where they were written.

    Raises:
        SnowsError: no such model, no report in it, bad images, or an output that cannot be written.
    """
    check_report(model, output, images)
    on_stage(f"Loading {model}")
    checkpoint = load(model)
    found = described(checkpoint)
    folder = checkpoint.folder if output is None else Path(output)
    picture = None
    if data is not None:
        picture, found["attention"] = attention_picture(
            checkpoint, dense, revision, data, split, images, device, on_stage
        )
    with understood(checkpoint.folder):
        page = render("report.html", report=found, view=view_of(found), picture=picture)
    on_stage(f"Writing {folder / HTML_FILE}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"Output {folder} cannot be written: {one_line(error)}.") from error
    write_whole(folder / JSON_FILE, lambda path: write_json(path, found))
    write_whole(folder / HTML_FILE, lambda path: path.write_text(page, encoding="utf-8"))
    return found | {"html": str(folder / HTML_FILE), "json": str(folder / JSON_FILE)}


def compare(
    models: Sequence[Name],
    *,
    output: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Sets several results of ``prune`` side by side.

    Args:
        models: folders (or Hub ids) of what ``prune`` wrote.
        output: HTML file to write, which must not exist; None writes none.
        on_stage: called with a line of text when a new stage begins.

    Returns:
        ``models``: for each ``model``, ``name`` (``model`` where two would have the same), ``source``, ``pattern``,
        ``mask``, ``samples``, ``k``, ``sparsity``, ``dense``, ``masked`` and ``pruned`` (top-1 in per cent, None where
        not measured; weights that are ``retrained`` count as pruned), ``drop``, ``eval_data``, ``loss_left``
        (geometric mean over the layers of the share of the mask's K-step loss that is left), ``products``, ``size``,
        ``flops``, ``seconds``; and ``output``.

    Raises:
        SnowsError: no such model, no report in it, or an output that cannot be written.
    """
    if not models:
        raise ConfigError("Nothing to compare.", "Name at least one folder that `snows-hf prune` wrote.")
    if output is not None:
        check_file(Path(output), ".html")
    rows = []
    for model in models:
        on_stage(f"Loading {model}")
        checkpoint = load(model, trial=False)
        with understood(checkpoint.folder):
            rows.append({"model": str(model)} | summary_of(described(checkpoint)))
    count = Counter(row["name"] for row in rows)
    for row in rows:
        row["name"] = row["model"] if count[row["name"]] > 1 else row["name"]
    result: dict[str, Any] = {"models": rows, "output": str(output) if output is not None else None}
    if output is not None:
        page = render("compare.html", rows=rows)
        write_whole(Path(output), lambda path: path.write_text(page, encoding="utf-8"))
    return result


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The report of the prune that made a checkpoint, and what its weights say besides: see :func:`report`.

    Raises:
        LoadError: there is no report, or it does not belong to these weights.
    """
    found = read_report(checkpoint.folder)
    with understood(checkpoint.folder):
        final = found["pruned"]
        for made in retrainings(found):  # the weights that are in the folder, on the same images, or nothing
            final = made["after"] if made["eval_data"] == found["eval_data"] else None
        tensors = checkpoint.model.state_dict()
        here = local_folder(checkpoint.source) is not None
        return found | {
            "name": (found.get("name") if here else None) or short_name(checkpoint.source),
            "flops": found["flops"] | {"reduction": found["flops"]["dense"] / found["flops"]["pruned"]},
            "size": {
                "dense": sum(tensor.nbytes for tensor in tensors.values()),
                "packed": sum(
                    sum(part.nbytes for part in (pack_tensor(tensor) or {"": tensor}).values())
                    for tensor in tensors.values()
                ),
            },
            "rows": {
                str(layer["name"]): row_zeros([checkpoint.model.get_parameter(name) for name in layer["parameters"]])
                for layer in found["layers"]
            },
            "class_changes": class_changes(found["dense"], final, checkpoint.class_names),
            "attention": None,
        }


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Whatever a block stumbles over in a report that is not ours, or of other weights, is one error.

    Raises:
        LoadError: the report lacks a part, has one of another type, or names weights that the model has not.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, jinja2.UndefinedError) as error:
        raise LoadError(
            f"{folder / REPORT_FILE} is not a report that this version of `snows-hf prune` writes of these weights: "
            f"{one_line(error)}",
            "Prune again.",
        ) from error


def row_zeros(weights: Sequence[Tensor], cells: int = STRIP) -> list[float]:
    """Shares of zeros along the output rows of a group's weights, each (rows, …): one a row, or means of neighbours
    where there are more rows than ``cells``."""
    shares = torch.cat([(weight.detach() == 0).flatten(1).double().mean(1) for weight in weights])
    return [round(float(part.mean()), 4) for part in shares.tensor_split(min(cells, len(shares)))]


def class_changes(
    dense: Mapping[str, Any] | None, pruned: Mapping[str, Any] | None, names: Sequence[str] | None
) -> dict[str, Any] | None:
    """Which classes lost and gained between two evaluations on the same images, by :class:`Accuracy`'s confusions.

    Returns:
        ``classes``, each with ``name``, ``images``, and how many of them ``dense`` and ``pruned`` got right;
        ``confusions``, those whose count changed, with the classes' places ``true`` and ``predicted`` in ``classes``
        (other than each other), and the counts, largest change first. None where not measured.
    """
    if not dense or not pruned or not dense.get("confusion") or not pruned.get("confusion"):
        return None
    before, after = (
        {tuple(map(int, pair.split())): int(count) for pair, count in measured["confusion"].items()}
        for measured in (dense, pruned)
    )
    numbers = sorted({number for pair in before.keys() | after.keys() for number in pair})
    place = {number: i for i, number in enumerate(numbers)}
    classes = [
        {
            "name": names[number] if names and number < len(names) else f"class {number}",
            "images": sum(count for (true, _), count in before.items() if true == number),
            "dense": before.get((number, number), 0),
            "pruned": after.get((number, number), 0),
        }
        for number in numbers
    ]
    confusions = [
        {
            "true": place[true],
            "predicted": place[predicted],
            "dense": before.get((true, predicted), 0),
            "pruned": after.get((true, predicted), 0),
        }
        for true, predicted in sorted(before.keys() | after.keys())
        if true != predicted and before.get((true, predicted), 0) != after.get((true, predicted), 0)
    ]
    return {"classes": classes, "confusions": sorted(confusions, key=lambda c: -abs(c["pruned"] - c["dense"]))}


def attention_picture(
    checkpoint: Checkpoint,
    dense: Name | None,
    revision: str | None,
    data: Name,
    split: str,
    images: int,
    device: str,
    on_stage: Callable[[str], None],
) -> tuple[str | None, dict[str, Any] | None]:
    """Attention maps as the text of a data URI, and their similarities to the dense model's; None and None for a
    model that has no such maps, and without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        on_stage("No attention maps: drawing needs matplotlib (pip install 'snows-hf[viz]')")
        return None, None
    with tempfile.TemporaryDirectory(prefix="snows-hf-") as place:
        models = [checkpoint.source]
        if dense is not None:
            original = load(dense, revision)
            check_same_shapes(original, checkpoint.model)
            known = True
            if permuted := described(checkpoint).get("permuted"):
                image = calibration_images(open_images(data, split), 1, 0, original.preprocess)
                known = order_like(build_chain(original.model), checkpoint.model.state_dict(), image, permuted)
                if not known:
                    on_stage("No attention maps of the mask alone: the order of the channels cannot be told any more")
            models = [*reference_models(Path(place), original, checkpoint.model if known else None), *models]
        picture = Path(place) / "attention.png"
        try:
            found = attention(
                models, data, output=picture, split=split, images=images, device=device, on_stage=on_stage
            )
        except AdapterError as error:
            on_stage(f"No attention maps: {error.message}")
            return None, None
        found.pop("output")
        for row in found["models"]:
            row["model"] = short_name(row["model"])
        return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}", found


def check_same_shapes(dense: Checkpoint, pruned: nn.Module) -> None:
    """
    Raises:
        ConfigError: the dense model has other weights than the pruned one.
    """
    weights = dict(dense.model.named_parameters())
    for name, sparse in pruned.named_parameters():
        if name not in weights or weights[name].shape != sparse.shape:
            raise ConfigError(
                f"The dense model {dense.source} has no weight {name} of shape {tuple(sparse.shape)}.",
                "Give the model that was pruned as --dense.",
            )


@torch.no_grad()
def reference_models(place: Path, dense: Checkpoint, pruned: nn.Module | None) -> list[str]:
    """Folders in ``place`` of the dense model, and of its weights under the mask of ``pruned`` where it is given."""
    folders = [place / "dense", *([place / "mask alone"] if pruned is not None else [])]
    for folder in folders:
        folder.mkdir()
    save_checkpoint(dense, folders[0], {}, {})
    if pruned is not None:
        weights = dict(dense.model.named_parameters())
        for name, sparse in pruned.named_parameters():
            if sparse.ndim > 1:
                weights[name].masked_fill_(sparse == 0, 0)
        save_checkpoint(dense, folders[1], {}, {})
    return [str(folder) for folder in folders]


def summary_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """One result's row of a comparison: see :func:`compare`."""
    solved = [layer for layer in found["layers"] if layer.get("loss_masked") and layer.get("loss_pruned")]
    ratios = [math.log(layer["loss_pruned"] / layer["loss_masked"]) for layer in solved]
    retrained = retrainings(found)
    measured = retrained[-1] if retrained else found
    final = measured["after" if retrained else "pruned"]
    dense, masked = ((found[key] or {}).get("top1") for key in ("dense", "masked"))
    top1 = final["top1"] if final else None
    return {
        "name": found["name"],
        "source": found["source"],
        "pattern": found["pattern"],
        "mask": found["settings"]["mask"],
        "update": found["update"],
        "retrained": bool(retrained),
        "samples": found["samples"],
        "k": found["settings"]["k"],
        "sparsity": found["sparsity"],
        "dense": dense,
        "masked": masked,
        "pruned": top1,
        "drop": dense - top1
        if dense is not None and top1 is not None and measured["eval_data"] == found["eval_data"]
        else None,
        "eval_data": measured["eval_data"],
        "loss_left": math.exp(sum(ratios) / len(ratios)) if ratios else None,
        "products": sum(layer.get("cg_iterations", 0) for layer in all_layers(found)),
        "size": found["size"],
        "flops": found["flops"],
        "seconds": found["seconds"],
    }


def all_layers(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reports of the layers in the first sweep, in later ones, and of the joint solve."""
    return [*found["layers"], *found.get("later_sweeps", [])]


# ---- what the templates draw


def view_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What report.html draws besides the report itself: bars, axes, lines, in per cent of the width."""
    alone = f"{found['settings']['mask']} alone" if found["criterion"].get("own_update") else "mask alone"
    steps = [("dense", "dense", "dense"), (alone, "masked", "masked")]
    if found["update"]:
        steps.append(("SNOWS", "pruned", "pruned"))
    solved = [layer for layer in all_layers(found) if "loss_masked" in layer]
    losses = [layer[key] for layer in solved for key in ("loss_masked", "loss_pruned")]
    axis = LogAxis([loss for loss in losses if loss])
    return {
        "accuracy": [(what, kind, found[key]) for what, key, kind in steps if found[key]],
        "summary": summary_of(found),
        "ticks": axis.ticks(),
        "solved": [
            layer
            | {
                "bars": [(kind, axis.place(layer[key])) for key, kind in (("loss_masked", "masked"),
                                                                          ("loss_pruned", "pruned"))],
                "line": polyline(layer["loss_masked"], layer.get("losses") or []),
            }
            for layer in solved
        ],
        "strips": [
            layer | {"cells": strip(rows)}
            for layer in found["layers"]
            for rows in [found["rows"][layer["name"]]]
        ],
        "classes": shown_classes(found["class_changes"]),
        "retrainings": retrainings(found),
    }  # fmt: skip


def strip(shares: Sequence[float]) -> list[tuple[float, float, float]]:
    """Cells of a strip as start and width in per cent, and share; equal neighbours are one cell, without a seam."""
    cells, start = [], 0
    for share, run in groupby(shares):
        length = len(list(run))
        cells.append((100 * start / len(shares), 100 * length / len(shares), share))
        start += length
    return cells


class LogAxis:
    """A logarithmic axis over whole decades that hold all ``values`` (positive)."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low = math.floor(math.log10(min(values))) if values else 0
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1) if values else 1

    def place(self, value: float | None) -> float | None:
        """In per cent of the axis; None for a value that it does not hold."""
        if not value or value < 0:
            return None
        return 100 * (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, int]]:
        """Places and powers of ten, six at most."""
        every = math.ceil((self.high - self.low) / 5)
        powers = range(self.low, self.high + 1, every)
        return [(100 * (power - self.low) / (self.high - self.low), power) for power in powers]


def polyline(start: float | None, losses: Sequence[float | None]) -> str | None:
    """Points of a line through a layer's held-out losses by step, on log scale, in a box of 100 × 20."""
    values = [math.log10(value) for value in (start, *losses) if value and value > 0]
    if len(values) < 2:
        return None
    low, spread = min(values), max(values) - min(values)
    return " ".join(
        f"{100 * i / (len(values) - 1):.1f},{19 - 18 * ((value - low) / spread if spread else 0):.1f}"
        for i, value in enumerate(values)
    )


def shown_classes(changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows by change, the matrix where there are few classes, else the largest confusions."""
    if changes is None:
        return None
    classes, confusions = changes["classes"], changes["confusions"]
    rows = sorted(classes, key=lambda c: (c["pruned"] - c["dense"]) / max(c["images"], 1))
    if len(rows) > LISTED:
        rows = [*rows[: LISTED // 2], *rows[-LISTED // 2 :]]
    shares = [100 * (row["pruned"] - row["dense"]) / max(row["images"], 1) for row in rows]
    widest = max(map(abs, shares)) or 1.0
    matrix = None
    if len(classes) <= MATRIX:
        cells = [[0] * len(classes) for _ in classes]
        for i, row in enumerate(classes):
            cells[i][i] = row["pruned"] - row["dense"]
        for c in confusions:
            cells[c["true"]][c["predicted"]] = c["pruned"] - c["dense"]
        strongest = max(1, *(abs(cell) for row in cells for cell in row))
        matrix = [[(cell, round(80 * abs(cell) / strongest)) for cell in row] for row in cells]
    return {
        "rows": [row | {"share": s, "bar": 50 * abs(s) / widest} for row, s in zip(rows, shares, strict=True)],
        "total": len(classes),
        "names": [row["name"] for row in classes],
        "matrix": matrix,
        "confusions": [
            c | {"true": classes[c["true"]]["name"], "predicted": classes[c["predicted"]]["name"]}
            for c in confusions[:LISTED]
        ],
    }


def render(template: str, **context: Any) -> str:
    """A page from a template in templates/. Whatever stands in reports is text: escaped, never markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("snows_hf.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
