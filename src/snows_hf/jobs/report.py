"""What pruning did, as a page for people (report.html) and as data (report.json); several results side by side."""

import base64
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..adapters import build_chain
from ..data.images import ImageSource, calibration_images, open_images
from ..data.names import Name, local_folder, short_name
from ..errors import AdapterError, ConfigError, LoadError, SaveError, one_line
from ..hub.load import Checkpoint, load
from ..hub.packed import pack_tensor
from ..hub.save import REPORT_FILE, read_report, retrainings
from ..masks.permutation import order_like
from ..reports.describe import describe_data
from ..reports.page import class_changes, pareto_of, render, summary_of, view_of
from ..runtime.files import check_file, write_json, write_whole
from ..runtime.run import Run
from .attention import check_attends, compare_maps
from .request import check_report


HTML_FILE, JSON_FILE = "report.html", "report.json"


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
        dense: Hub id or folder of the dense model, of this ``revision``, for its attention maps and those of its
            weights under the mask.
        data: images for attention maps, of this ``split``; None draws none.
        images: number of images to draw.
        others: as for :func:`snows_hf.prune`.

    Returns:
        The contents of report.json: the report of the prune, with ``size`` (bytes, dense and packed),
        ``flops.reduction``, ``inputs`` (of each layer: shares of zeros by input), ``class_changes`` and
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
        run = Run.begin(device, on_stage=on_stage)
        picture, found["attention"] = attention_picture(
            run, checkpoint, found.get("permuted"), dense, revision, data, split, images
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
    models: Sequence[Name], *, output: str | Path | None = None, on_stage: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Sets several results of ``prune`` side by side.

    Args:
        models: folders (or Hub ids) of what ``prune`` wrote.
        output: HTML file to write, which must not exist; None writes none.
        on_stage: as for :func:`snows_hf.prune`.

    Returns:
        ``models``: for each ``model``, ``name`` (``model`` where two would have the same), ``source``, ``pattern``,
        ``mask``, ``samples``, ``k``, ``sparsity``, ``dense``, ``masked`` and ``pruned`` (top-1 in per cent, None where
        not measured; weights that are ``retrained`` count as pruned), ``drop``, ``eval_data``, ``loss_left``
        (geometric mean over the layers of the share of ``loss_start`` that is left), ``products``, ``size``,
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
    names = [row["name"] for row in rows]
    for row in rows:
        row["name"] = row["model"] if names.count(row["name"]) > 1 else row["name"]
    if output is None:
        return {"models": rows, "output": None}
    page = render("compare.html", rows=rows, pareto=pareto_of(rows))
    write_whole(Path(output), lambda path: path.write_text(page, encoding="utf-8"))
    return {"models": rows, "output": str(output)}


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
        tensors = checkpoint.model.state_dict().values()
        parts = [part for tensor in tensors for part in (pack_tensor(tensor) or {"": tensor}).values()]
        here = local_folder(checkpoint.source) is not None
        found = {"task": None, "tower": None, "fidelity": None} | found  # earlier reports lack them
        return found | {
            "name": (found.get("name") if here else None) or short_name(checkpoint.source),
            "flops": found["flops"] | {"reduction": found["flops"]["dense"] / found["flops"]["pruned"]},
            "size": {
                "dense": found.get("dense_bytes", sum(each.nbytes for each in tensors)),
                "packed": sum(each.nbytes for each in parts),
            },
            "inputs": {
                str(layer["name"]): input_zeros([checkpoint.model.get_parameter(name) for name in layer["parameters"]])
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
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, jinja2.UndefinedError) as error:
        raise LoadError(
            f"{folder / REPORT_FILE} is not a report that this version of `snows-hf prune` writes of these weights: "
            f"{one_line(error)}",
            "Prune again.",
        ) from error


def input_zeros(weights: Sequence[Tensor], cells: int = 64) -> dict[str, Any]:
    """Shares of zeros of a group's inputs, each weight being (rows, inputs, …): ``count`` of inputs, ``unread``, those
    of which no weight is left, and ``shares``, from the least to the greatest, at equal steps where there are more
    inputs than ``cells``."""
    widths = dict.fromkeys(weight.shape[1] for weight in weights)
    zero = [(weight.detach() == 0).flatten(2) if weight.ndim > 2 else weight.detach() == 0 for weight in weights]
    of_width = [torch.cat([each for each in zero if each.shape[1] == width]) for width in widths]
    shares = torch.cat([each.double().transpose(0, 1).flatten(1).mean(1) for each in of_width]).sort().values
    steps = torch.linspace(0, 1, min(cells, len(shares)), dtype=shares.dtype)
    drawn = torch.quantile(shares, steps).tolist()
    return {"count": len(shares), "unread": int((shares == 1).sum()), "shares": [round(each, 4) for each in drawn]}


def attention_picture(
    run: Run,
    checkpoint: Checkpoint,
    permuted: dict[str, Any] | None,
    dense: Name | None,
    revision: str | None,
    data: Name,
    split: str,
    images: int,
) -> tuple[str | None, dict[str, Any] | None]:
    """Attention maps as the text of a data URI, and their similarities to the dense model's; None and None for a
    model that has no such maps, and without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        run.say("No attention maps: drawing needs matplotlib (pip install 'snows-hf[viz]')")
        return None, None
    try:
        check_attends(build_chain(checkpoint.model))
        source = open_images(data, split)
        dense_first = (
            references(run, load(dense, revision, run=run), checkpoint, permuted, source) if dense is not None else ()
        )
        models = chain(dense_first, [(short_name(checkpoint.source), checkpoint)])
        with tempfile.TemporaryDirectory(prefix="snows-hf-") as place:
            picture = Path(place) / "attention.png"
            found = compare_maps(run, models, source, picture, images)
            text = base64.b64encode(picture.read_bytes()).decode()
        return f"data:image/png;base64,{text}", found | {"data": describe_data(data, split), "seed": 0}
    except AdapterError as error:
        run.say(f"No attention maps: {error.message}")
        return None, None


@torch.no_grad()
def references(
    run: Run, dense: Checkpoint, pruned: Checkpoint, permuted: dict[str, Any] | None, source: ImageSource
) -> Iterator[tuple[str, Checkpoint]]:
    """The dense model, and its weights under the mask of the pruned one, its channels in the same order.

    Raises:
        ConfigError: the dense model has other weights than the pruned one.
    """
    shapes = {name: weight.shape for name, weight in dense.model.named_parameters()}
    for name, sparse in pruned.model.named_parameters():
        if shapes.get(name) != sparse.shape:
            raise ConfigError(
                f"The dense model {dense.source} has no weight {name} of shape {tuple(sparse.shape)}.",
                "Give the model that was pruned as --dense.",
            )
    yield "dense", dense
    if permuted:
        image = calibration_images(source, 1, 0, dense.preprocess).to(run.device)
        if not order_like(build_chain(dense.model), pruned.model.state_dict(), image, permuted):
            run.say("No attention maps of the masked dense weights: the order of the channels cannot be told any more")
            return
    for name, sparse in pruned.model.named_parameters():
        if sparse.ndim > 1:
            weight = dense.model.get_parameter(name)
            weight.masked_fill_(sparse.to(weight.device) == 0, 0)
    yield "dense weights, masked", dense
