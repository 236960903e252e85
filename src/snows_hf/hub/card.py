"""Model cards, from the templates beside this file (model_cards/template.md links to that of a pruned model)."""

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.names import local_folder
from .load import Checkpoint, leads_out
from .save import maker_of, retrainings


PLACEHOLDER = "THIS_FOLDER"
"""Stands in the card's snippets for where the checkpoint is; a push puts the repository's id in its place."""

LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_LINK = re.compile(r"https?://[\w.~:/?#@%+=,;-]+|LICENSE[\w.-]*")

LONGEST = 200
"""Characters of one name or text of somebody else's, in a card."""

BAR = 20
"""Characters of a full bar in the table of layers."""


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
    fields: dict[str, Any] = dict(licence)
    data = ModelCardData(
        model_name=report["name"],
        base_model=report["source"] if is_hub_id and maker != "train" else None,
        library_name=checkpoint.library,
        pipeline_tag="image-classification",
        tags=["snows-hf", *(["sparse", "pruned", *kinds] if pattern else [])],
        datasets=sorted({each["name"] for each in used if each and "/" in each["name"]}) or None,
        eval_results=results_of(accuracy, measured["eval_data"]),
        **fields,
    )
    environment = jinja2.Environment(loader=jinja2.PackageLoader("snows_hf", "hub"))
    text = environment.get_template("card_template.md" if maker == "prune" else "training_card_template.md").render(
        card_data=data.to_yaml(),
        report=report,
        retrainings=retrained,
        architecture=plain(str(checkpoint.config.get("architecture", report["source"]))),
        licence=licence,
        layers=[layer | {"bar": bar_of(layer)} for layer in report["layers"] if "loss_start" in layer],
        library=checkpoint.library,
        here=PLACEHOLDER,
    )
    ModelCard(text).save(folder / "README.md")


def results_of(accuracy: dict[str, Any] | None, data: dict[str, Any]) -> list[EvalResult] | None:
    """What the Hub shows of an accuracy on ``data``; None where it was not measured."""
    if not accuracy:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["name"],
            dataset_name=data["name"],
            dataset_split=data["split"],
            dataset_revision=data["revision"],
            metric_type="accuracy",
            metric_name=metric,
            metric_value=round(accuracy[key], 4),
        )
        for metric, key in (("top-1 accuracy (%)", "top1"), ("top-5 accuracy (%)", "top5"))
    ]


def licence_of(folder: Path) -> dict[str, str]:
    """What the base model's card says of its licence, by the card's own keys, as plain text; empty where it says
    nothing. Of links only addresses on the web and names of LICENSE files are taken over."""
    path = folder / "README.md"
    try:
        own = path.is_file() and not leads_out(path, folder)
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if own else {}
    except (OSError, ValueError, yaml.YAMLError):  # someone else's file, and only its licence is wanted
        return {}
    said = {key: str(data[key]) for key in LICENCE_KEYS if data.get(key)}
    link = said.pop("license_link", "")
    licence = {key: plain(text) for key, text in said.items() if plain(text)}
    return licence | ({"license_link": link} if LICENCE_LINK.fullmatch(link) else {})


def plain(value: Any) -> Any:
    """A report, or any part of it, whose texts are one line each and hold nothing that Markdown, HTML or YAML would
    read as more than text: what others wrote (names of models, data, layers; a report that is retrained) stays that,
    wherever a card puts it."""
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
    return text.strip(" -+=.:")[:LONGEST]


def bar_of(layer: dict[str, Any]) -> str:
    """The share of the error at the start that is left, as a bar."""
    before, after = layer["loss_start"], layer["loss_pruned"]
    if not before or after is None:
        return ""
    return "█" * max(1, round(BAR * min(1.0, after / before)))
