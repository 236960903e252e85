"""Model cards, from the templates beside this file."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.names import local_folder
from .folder import leads_out
from .load import Checkpoint
from .save import alone_of, maker_of, retrainings, takes_steps


PLACEHOLDER = "THIS_FOLDER"
"""Stands in the card's snippets for where the checkpoint is; a push puts the repository's id in its place."""


def write_card(checkpoint: Checkpoint, folder: Path, report: dict[str, Any]) -> None:
    """Writes README.md: how the weights were made, what that cost, how to load them; from the report, as in
    snows_config.json, whoever began it."""
    report, maker = plain(report), maker_of(report)
    retrained = retrainings(report)
    # Figures of the weights that are in the folder, or none.
    measured = retrained[-1] if retrained else report
    accuracy = measured["after" if retrained else "accuracy" if maker == "train" else "pruned"]
    # What is retrained is a folder, and its report names the dense model.
    is_hub_id = "/" in report["source"] if retrained else local_folder(checkpoint.source) is None
    licence = licence_of(checkpoint.folder)
    used = [made.get(key) for made in (report, *retrained) for key in ("calibration_data", "data", "eval_data")]
    pattern = report.get("pattern")
    kinds = ["pruning-at-initialization"] if maker == "train" else re.findall("^[0-9]+:[0-9]+$", pattern or "")
    data = ModelCardData(
        model_name=report["name"],
        base_model=report["source"] if is_hub_id and maker != "train" else None,
        library_name=None if checkpoint.custom else checkpoint.library,  # by which the Hub says how to load it
        pipeline_tag=checkpoint.task,
        tags=["snows-hf", *(["sparse", "pruned", *kinds] if pattern else [])],
        datasets=sorted({each["name"] for each in used if each and "/" in each["name"]}) or None,
        eval_results=results_of(checkpoint.task, accuracy, measured["eval_data"]),
        **licence,
    )
    templates = jinja2.Environment(loader=jinja2.PackageLoader("snows_hf", "hub"))
    text = templates.get_template("card_template.md" if maker == "prune" else "training_card_template.md").render(
        card_data=data.to_yaml(),
        report=report,
        retrainings=retrained,
        architecture=plain(str(checkpoint.config.get("architecture", report["source"]))),
        licence=licence,
        layers=[layer | {"bar": bar_of(layer)} for layer in report["layers"] if "loss_start" in layer],
        library=checkpoint.library,
        custom=checkpoint.custom,
        auto="AutoModelForImageClassification" if checkpoint.is_classifier else type(checkpoint.model).__name__,
        options="".join(f", {name}={value}" for name, value in checkpoint.options.items()),
        processor="AutoProcessor" if checkpoint.has_tokenizer else "AutoImageProcessor",
        is_classifier=checkpoint.is_classifier,
        here=PLACEHOLDER,
        alone=alone_of(report) if maker == "prune" else "",
        steps=maker == "prune" and takes_steps(report),
    )
    ModelCard(text).save(folder / "README.md")


def results_of(task: str, accuracy: dict[str, Any] | None, data: dict[str, Any]) -> list[EvalResult] | None:
    """What the Hub shows of an accuracy on ``data``; None where it was not measured."""
    if not accuracy:
        return None
    name, split, revision = data["name"], data["split"], data["revision"]
    method = accuracy.get("method") or "classifier"
    how = "" if method == "classifier" else f"{method} "
    place = {"dataset_type": name, "dataset_name": name, "dataset_split": split, "dataset_revision": revision}
    return [
        EvalResult(task, metric_type="accuracy", metric_name=metric, metric_value=value, **place)
        for metric, value in (
            (f"{how}top-1 accuracy (%)", round(accuracy["top1"], 4)),
            (f"{how}top-5 accuracy (%)", round(accuracy["top5"], 4)),
        )
    ]


def licence_of(folder: Path) -> dict[str, Any]:
    """What the base model's card says of its licence, by the card's own keys, as plain text; empty where it says
    nothing. Of links only addresses on the web and names of LICENSE files are taken over."""
    path = folder / "README.md"
    try:
        own = path.is_file() and not leads_out(path, folder)
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if own else {}
    except (OSError, ValueError, yaml.YAMLError):  # someone else's file, and only its licence is wanted
        return {}
    said = {key: plain(str(data.get(key) or "")) for key in ("license", "license_name")}
    link = str(data.get("license_link"))
    if re.fullmatch(r"https?://[\w.~:/?#@%+=,;-]+|LICENSE[\w.-]*", link):
        said["license_link"] = link
    return {key: text for key, text in said.items() if text}


def plain(value: Any) -> Any:
    """A report, or any part of it, whose texts are one line each, of at most 200 characters, and hold nothing that
    Markdown, HTML or YAML would read as more than text: what others wrote (names of models, data, layers; a report
    that is retrained) stays that, wherever a card puts it."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"[^\w.,:;/+=@%()'×·…–-]+", " ", value)
    # GitHub's Markdown makes links of bare addresses, too.
    text = re.sub(r"(?<=\w)@(?=\w)", " @ ", text.replace("://", ":/"))
    text = re.sub(r"\bwww\.", "www ", text, flags=re.IGNORECASE)
    return text.strip(" -+=.:")[:200]


def bar_of(layer: dict[str, Any]) -> str:
    """The share of the error at the start that is left, as a bar of at most 20 characters."""
    before, after = layer["loss_start"], layer["loss_pruned"]
    return "" if not before or after is None else "█" * max(1, round(20 * min(1.0, after / before)))
