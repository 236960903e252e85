"""Table 5, the CIFAR-10 part: unstructured sparsity, SNOWS, then retraining with the zeros held.

    python examples/paper/table5.py --models MODELS --data DATA [--sparsity 0.7 0.8 0.9] [--minutes 5]

Retraining is bounded by --epochs and --minutes each; a run that was cut off goes on after its last whole epoch. The
pruned and retrained models are kept in --work. Less than an hour for each model.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from common import arguments, logged, model_folder, number, pruned, table

from snows_hf import finetune


# Table 5: SNOWS before and after retraining; the dense model has 92.56.
PAPER = {
    "0.5": (92.28, 92.32),
    "0.6": (91.90, 92.13),
    "0.7": (90.87, 91.85),
    "0.8": (87.82, 91.06),
    "0.9": (64.80, 87.69),
}


def retrained(given: Namespace, name: str, before: Path, after: Path) -> dict[str, object]:
    data = str(given.data / "cifar10")
    report = finetune(
        str(before),
        data,
        output=after,
        eval_data=data,
        teacher=model_folder(given, name),
        epochs=given.epochs,
        minutes=given.minutes,
        samples=given.train_images,
        on_stage=lambda stage: print(f"  {stage}", file=sys.stderr),
    ).report["finetune"]
    kept = {part: report[part] for part in ("epochs", "images", "seconds", "mask_unchanged")}
    return {"trained": kept, "before": report["before"]["top1"], "after": report["after"]["top1"]}


def main() -> None:
    more = [
        ("--sparsity", {"nargs": "+", "default": ["0.7", "0.8", "0.9"]}),
        ("--epochs", {"type": int, "default": 90}),
        ("--minutes", {"type": float, "default": 5.0, "help": "of retraining, for each model"}),
        ("--train-images", {"type": int, "help": "default: all"}),
        ("--work", {"type": Path, "default": Path("paper-table5"), "help": "folder for the models"}),
    ]
    given = arguments(__doc__, 256, more)
    for name in given.only:
        rows, dense = [], 0.0
        for sparsity in given.sparsity:
            stem = f"{name}-{sparsity}-{given.images}-{given.seed}"
            before, after = given.work / stem, given.work / f"{stem}-retrained-{given.epochs}-{given.minutes:g}"
            made = pruned(given, name, sparsity, output=before)
            key = {"table": "5", "model": name, "sparsity": sparsity, "images": given.images, "epochs": given.epochs,
                   "minutes": given.minutes, "train": given.train_images}  # fmt: skip

            found = logged(given, key, partial(retrained, given, name, before, after))
            dense = made["dense"]
            theirs = PAPER.get(sparsity, ("", "")) if name == "resnet20" else ("", "")
            trained = found["trained"]
            tops = [number(top1) for top1 in (made["masked"], found["before"], found["after"])]
            rows.append((sparsity, *tops, trained["epochs"], "yes" if trained["mask_unchanged"] else "NO", *theirs))
        table(
            f"Table 5: {name}, dense {number(dense)}",
            [
                "sparsity",
                "mask alone",
                "SNOWS",
                "retrained",
                "epochs",
                "mask unchanged",
                "paper: SNOWS",
                "paper: retrained",
            ],
            rows,
            "5,000 training images in place of 50,000; as many of 90 epochs as the minutes allow; the dense model "
            "as teacher "
            f"(distillation), which the paper has not; {given.images} calibration images in place of 1,000; the dense "
            "ResNet-20 has 91.73 in place of 92.56.",
        )


if __name__ == "__main__":
    main()
