"""Table 8's shape: accuracy and time of pruning to 70 % unstructured sparsity.

    python examples/paper/table8.py --models MODELS --data DATA [--images 1000]

Less than an hour.
"""

from common import arguments, number, pruned, table


def main() -> None:
    given = arguments(__doc__, 1000, [("--sparsity", {"default": "0.7"})])
    rows = []
    for name in given.only:
        run = pruned(given, name, given.sparsity)
        theirs = ("90.0", "0.56", "84.1", "2.23") if name == "resnet20" else ("",) * 4
        rows.append((name, run["samples"], number(run["dense"]), number(run["pruned"]),
                     number(run["cascade_cpu_seconds"] / 60), number(run["seconds"] / 60), *theirs))  # fmt: skip
    table(
        f"Table 8: {given.sparsity} unstructured",
        ["model", "images", "dense", "pruned", "cascade, processor min", "all, wall min", "paper: SNOWS", "min",
         "CHITA", "min"],
        rows,
        "a CPU in place of a GPU, measuring accuracy three times included in the wall time; a ViT in place of "
        "MobileNet and ResNet-50; the dense ResNet-20 has 91.73 in place of 92.56; CHITA's figures are the paper's.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
