"""Table 4 (Figure 3), the CIFAR-10 part: unstructured sparsity, magnitude masks, SNOWS.

    python examples/paper/table4.py --models MODELS --data DATA [--sparsity 0.5 0.6 0.7 0.8 0.9]

One run of the main job for each sparsity, with this package's defaults. Less than an hour for each model.
"""

from common import arguments, number, pruned, table


# Accuracies of ResNet-20 from Table 4 (baseline of the last column 92.56): magnitude, CHITA, FALCON, SNOWS.
PAPER = {
    "0.5": (88.44, 90.60, 90.87, 92.28),
    "0.6": (85.24, 89.22, 89.67, 91.90),
    "0.7": (78.79, 84.12, 84.42, 90.87),
    "0.8": (54.01, 57.90, 65.17, 87.82),
    "0.9": (11.79, 15.60, 19.14, 64.80),
}
BASELINE = 92.56


def main() -> None:
    given = arguments(__doc__, 256, [("--sparsity", {"nargs": "+", "default": list(PAPER)})])
    for name in given.only:
        rows, dense = [], 0.0
        for sparsity in given.sparsity:
            run = pruned(given, name, sparsity)
            dense = run["dense"]
            row = (sparsity, number(run["masked"]), f"{number(run['pruned'])} ({number(run['pruned'] - dense)})")
            if name == "resnet20":
                theirs = PAPER.get(sparsity, (None,) * 4)
                snows = f"{number(theirs[3])} ({number(theirs[3] - BASELINE)})" if theirs[3] else ""
                row = (*row, *(number(value) for value in theirs[:3]), snows)
            rows.append(row)
        columns = ["sparsity", "magnitude", "SNOWS (change)"]
        if name == "resnet20":
            columns += ["paper: magnitude", "CHITA", "FALCON", "SNOWS (change)"]
        table(
            f"Table 4: {name}, {given.images} images, dense {number(dense)}",
            columns,
            rows,
            f"{given.images} images in place of 1,000; the dense ResNet-20 has 91.73 in place of 92.56; no layer "
            "loses more than 90 % of its weights (or half of the way to all); stem and classifier stay dense.",
        )


if __name__ == "__main__":
    main()
