"""Figure 1: accuracy over K, at equal images and at equal time.

    python examples/paper/figure1.py --models MODELS --data DATA [--k 0 1 3 5 10 20 40] [--images 128]

1:4, magnitude masks, the plain cascade (each layer one step on every batch). First every K has the same images. Then
every K has the processor time that the largest took: as many more images as it has time for, and more passes where the
images give out. Less than an hour for each model.
"""

from common import ONE_PASS, arguments, number, pruned, table


AVAILABLE = 5000


def main() -> None:
    more = [
        ("--pattern", {"default": "1:4"}),
        ("--k", {"type": int, "nargs": "+", "default": [0, 1, 3, 5, 10, 20, 40]}),
        ("--batch-size", {"type": int, "default": 64}),
    ]
    given = arguments(__doc__, 128, more)
    plain = ONE_PASS | {"batch_size": given.batch_size}
    for name in given.only:
        equal = {k: pruned(given, name, given.pattern, k=k, **plain) for k in given.k}
        # Past the last operation, a larger K is the same K.
        largest = max(given.k)
        budget = equal[largest]["cascade_cpu_seconds"]
        rows = []
        for k in given.k:
            run = equal[k]
            more_images = given.images * max(1.0, budget / run["cascade_cpu_seconds"])
            samples = min(AVAILABLE, round(more_images))
            passes = max(1, round(more_images / samples))
            timed = run
            if k != largest:
                timed = pruned(given, name, given.pattern, k=k, **plain | {"samples": samples, "passes": passes})
            rows.append(
                (k, number(run["pruned"]), number(run["cascade_cpu_seconds"], 0), number(timed["pruned"]),
                 number(timed["cascade_cpu_seconds"], 0), f"{timed['samples']} × {passes if k != largest else 1}")
            )  # fmt: skip
        table(
            f"Figure 1: {name}, {given.pattern}, dense {number(run['dense'])}, mask alone {number(run['masked'])}",
            ["K", f"{given.images} images", "processor s", "equal time", "processor s", "images × passes"],
            rows,
            "the paper has a curve, rising with K, for ResNet-20 (1:4) and ResNet-50, at equal images; here "
            f"Gauss-Newton products with the Gram preconditioner, dense targets, {given.images} images in batches of "
            f"{given.batch_size}.",
        )


if __name__ == "__main__":
    main()
