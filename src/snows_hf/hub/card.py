"""The model card of a pruned model, from card_template.md beside this file (model_cards/template.md links to it)."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .load import Checkpoint, local_folder


def write_card(checkpoint: Checkpoint, folder: Path, report: dict[str, Any]) -> None:
    """Writes README.md: what was pruned and how, what it cost, how to load it.

    Args:
        checkpoint: the pruned model.
        folder: where README.md goes.
        report: the prune's report, as in snows_config.json.
    """
    results = None
    if report["pruned"]:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=report["eval_data"]["name"],
                dataset_name=report["eval_data"]["name"],
                dataset_split=report["eval_data"]["split"],
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(report["pruned"][key], 4),
            )
            for metric, key in (("top-1 accuracy (%)", "top1"), ("top-5 accuracy (%)", "top5"))
        ]
    is_hub_id = local_folder(checkpoint.source) is None
    data = ModelCardData(
        model_name=report["name"],
        base_model=report["source"] if is_hub_id else None,
        library_name=checkpoint.library,
        pipeline_tag="image-classification",
        tags=["snows-hf", "sparse", "pruned", *([] if ":" not in report["pattern"] else [report["pattern"]])],
        eval_results=results,
    )
    template = files("snows_hf.hub").joinpath("card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        report=report,
        library=checkpoint.library,
        source=report["source"],
        architecture=checkpoint.config.get("architecture", ""),
    )
    card.save(folder / "README.md")
