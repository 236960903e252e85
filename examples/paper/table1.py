"""Table 1, the CIFAR-10 columns: N:M masks by OBC, SparseGPT and magnitude, alone and under SNOWS.

    python examples/paper/table1.py --models MODELS --data DATA [--images 256]

One run of the main job for each mask and pattern, with this package's defaults. Less than an hour for each model;
--images 3000 is the paper's number, and takes some.
"""

from common import arguments, number, pruned, table


MASKS = {"OBC": "obc", "SparseGPT": "sparsegpt", "magnitude": "magnitude"}


def main() -> None:
    given = arguments(__doc__, 256, [("--pattern", {"nargs": "+", "default": ["1:4", "2:4"]})])
    for name in given.only:
        rows, dense = [], 0.0
        for title, mask in MASKS.items():
            runs = [pruned(given, name, pattern, mask=mask) for pattern in given.pattern]
            dense = runs[0]["dense"]
            rows.append((title, *(number(run["masked"]) for run in runs)))
            rows.append(("+ SNOWS", *(f"{number(run['pruned'])} ({number(run['pruned'] - dense)})" for run in runs)))
        theirs = {"1:4": "92.58 - 3.49 = 89.09", "2:4": "92.58 - 0.64 = 91.94"}
        if name == "resnet20":
            rows.append(("paper, best + SNOWS", *(theirs.get(pattern, "") for pattern in given.pattern)))
        table(
            f"Table 1: {name}, {given.images} images, dense {number(dense)}",
            ["mask", *given.pattern],
            rows,
            f"{given.images} images in place of 3,000; the dense ResNet-20 has 91.73 in place of 92.58; OBC and "
            "SparseGPT "
            "keep their own updates when alone; the defaults of this package in place of Table 7. The paper has no "
            "ViT on "
            "CIFAR-10. Its best drops are from Table 6.",
        )


if __name__ == "__main__":
    main()
