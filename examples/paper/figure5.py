"""Figure 5: linear probes to CIFAR-100 on the features of the dense model, of its mask alone, and of SNOWS.

    python examples/paper/figure5.py --models MODELS --data DATA [--pattern 2:4 1:4] [--images 256]

Models are pruned on CIFAR-10, and kept in --work. Less than an hour for each model.
"""

import sys
from pathlib import Path

from common import arguments, logged, model_folder, number, pruned, table

from snows_hf import probe


def main() -> None:
    more = [
        ("--pattern", {"nargs": "+", "default": ["2:4", "1:4"]}),
        ("--train-images", {"type": int, "help": "of the probe; default: all"}),
        ("--work", {"type": Path, "default": Path("paper-figure5"), "help": "folder for the models"}),
    ]
    given = arguments(__doc__, 256, more)
    for name in given.only:
        rows = []
        for pattern in given.pattern:
            folders = []
            for update in (False, True):
                stem = f"{name}-{pattern.replace(':', 'to')}-{given.images}-{given.seed}"
                folders.append(given.work / f"{stem}-{'snows' if update else 'mask'}")
                pruned(given, name, pattern, output=folders[-1], update=update)
            key = {
                "figure": "5",
                "model": name,
                "pattern": pattern,
                "images": given.images,
                "train": given.train_images,
            }

            def run(folders: list[Path] = folders, name: str = name) -> dict[str, object]:
                models = [model_folder(given, name), *map(str, folders)]
                found = probe(
                    models,
                    str(given.data / "cifar100"),
                    samples=given.train_images,
                    on_stage=lambda stage: print(f"  {stage}", file=sys.stderr),
                )
                kept = ("top1", "interval", "difference", "difference_interval")
                return {"models": [{part: row[part] for part in kept} for row in found["models"]]}

            dense, mask, snows = logged(given, key, run)["models"]
            cells = [
                f"{number(row['difference'])} ({number(row['difference_interval'][0])} … "
                f"{number(row['difference_interval'][1])})"
                for row in (mask, snows)
            ]
            share = snows["difference"] / mask["difference"] if mask["difference"] else 0.0
            rows.append((pattern, number(dense["top1"]), *cells, f"{100 * share:.0f} %"))
        table(
            f"Figure 5: {name}, probe to CIFAR-100",
            ["pattern", "dense", "mask alone − dense (95 %)", "SNOWS − dense (95 %)", "left of the loss"],
            rows,
            "the paper has bars for ViT-B/16 of ImageNet (2:4), its classifier fine-tuned on CIFAR-10 and "
            "CIFAR-100; here "
            "CIFAR-10 networks, a logistic regression, 5,000 training and 2,000 test images.",
        )


if __name__ == "__main__":
    main()
