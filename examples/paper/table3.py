"""Table 3: time and peak memory of a whole prune over K.

    python examples/paper/table3.py --models MODELS --data DATA [--k 0 1 3 5 10 20 30 40] [--images 512]

Each K is a process of its own, whose peak of main memory the system reports; 1:4, magnitude masks, one pass over the
images, one step on every batch of 128. Less than half an hour.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import yaml
from common import AS_IN_THE_PAPER, ONE_PASS, arguments, logged, model_folder, number, table


# Minutes and GB of GPU memory of ResNet-20 in Table 3.
PAPER = {0: (0.7, 2.2), 1: (0.8, 2.5), 3: (1.6, 2.8), 5: (2.3, 3.3), 10: (4.8, 3.3), 20: (8.1, 4.3), 30: (11.2, 4.9),
         40: (11.8, 5.1)}  # fmt: skip


def measured(given: Namespace, name: str, k: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text(yaml.safe_dump(ONE_PASS | AS_IN_THE_PAPER | {"k": k, "batch_size": 128}))
        command = [sys.executable, "-m", "snows_hf", "prune", model_folder(given, name), "--quiet", "--pattern", "1:4"]
        command += ["--data", str(given.data / "cifar10"), "--samples", str(given.images), "--seed", str(given.seed)]
        command += ["--config", str(settings), "--output", str(Path(folder) / "pruned")]
        for layer in given.layers:
            command += ["--layers", layer]
        threads = {"OMP_NUM_THREADS": str(given.threads)} if given.threads else {}
        started = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | threads)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"K = {k}: the prune ended with status {status}")
        return {
            "wall": time.perf_counter() - started,
            "processor": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss * 1024 / 1e9,
        }


def main() -> None:
    given = arguments(__doc__, 512, [("--k", {"type": int, "nargs": "+", "default": list(PAPER)})])
    for name in given.only:
        rows = []
        for k in given.k:
            key = {"table": "3", "model": name, "k": k, "images": given.images, "layers": given.layers}
            run = logged(given, key, partial(measured, given, name, k))
            theirs = PAPER.get(k, ("", "")) if name == "resnet20" else ("", "")
            rows.append(
                (k, *(number(run[part] / 60, 1) for part in ("processor", "wall")), number(run["peak"]), *theirs)
            )
        table(
            f"Table 3: {name}, {given.images} images",
            ["K", "processor min", "wall min", "peak (GB)", "paper: min", "paper: peak (GB)"],
            rows,
            "a CPU and main memory (libraries and start included: the row of K = 0 is mostly these) in place of a GPU "
            f"and its memory; {given.images} images, one pass, in place of 3,000 and up to three; Gauss-Newton "
            "products, "
            "five a step, in place of up to 1,000 Hessian products.",
        )


if __name__ == "__main__":
    main()
