"""The same prune by 1, 2 and 4 processes on this machine's cores, one thread each: weights, seconds, bytes sent.

The relative difference is the largest over the tensors of the result, against one process. A product's bytes are those
of the vector that is summed over the processes for it; a ring sends each of them 2(N - 1)/N times from every process.

    python benchmarks/processes.py [--model DIR --data DIR] [--processes 1 2 4] [--settings FILE.yaml] [--samples 512]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file


EMBEDDED = Path(str(files("snows_hf") / "embedded"))


def work(arguments: argparse.Namespace) -> None:
    """What each of the processes does: the prune, with every sum counted."""
    from snows_hf import prune
    from snows_hf.cli.options import read_settings
    from snows_hf.runtime.distributed import rank
    from snows_hf.settings import PruneConfig

    torch.set_num_threads(1)
    sums: list[int] = []
    products: list[int] = []
    add = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any) -> Any:
        sums.append(tensor.nbytes)
        if tensor.dim() == 1:  # gradients, products; sensitivities are shorter
            products.append(tensor.nbytes)
        return add(tensor, *rest)

    torch.distributed.all_reduce = counted
    output = Path(arguments.worker)
    settings = read_settings(arguments.settings, PruneConfig("2:4")) | {"samples": arguments.samples}
    where = {"data": str(arguments.data), "output": output, "device": "cpu", "dtype": arguments.dtype}
    result = prune(str(arguments.model), "2:4", **where, **settings)
    layers = result.report["layers"] + result.report["later_sweeps"]
    if rank() == 0:
        counts = {
            "solving": sum(layer["seconds"] for layer in layers),
            "products": sum(layer["cg_iterations"] for layer in layers),
            "product": max(products, default=0),
            "sums": len(sums),
            "total": sum(sums),
        }
        output.with_suffix(".json").write_text(json.dumps(counts))


def launch(processes: int, output: Path, given: list[str]) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, *given, "--worker", str(output)], env=environment, check=True)
    return time.perf_counter() - started


def difference(folder: Path, other: Path) -> float:
    """Largest ‖a − b‖/‖a‖ over the tensors of two checkpoints."""
    first, second = (load_file(path / "model.safetensors") for path in (folder, other))
    pairs = [(a.double(), second[name].double()) for name, a in first.items()]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED / "vit_digits")
    parser.add_argument("--data", type=Path, default=EMBEDDED / "digits")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    print(f"{arguments.model.name}, 2:4, {arguments.samples} images, {arguments.dtype}, {os.cpu_count()} cores")
    columns = ["processes", "seconds", "solving (s)", "speed-up", "products", "longest product (kB)", "sums"]
    columns += ["all sums (MB)", "difference"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        first: dict[str, Any] = {}
        for n in arguments.processes:
            output = Path(folder) / f"pruned-{n}"
            seconds = launch(n, output, sys.argv[1:])
            counts = json.loads(output.with_suffix(".json").read_text())
            first = first or counts | {"output": output}
            cells = [str(n), f"{seconds:.0f}", f"{counts['solving']:.1f}"]
            cells += [f"{first['solving'] / counts['solving']:.2f}", str(counts["products"])]
            cells += [f"{counts['product'] / 1e3:.1f}", str(counts["sums"]), f"{counts['total'] / 1e6:.1f}"]
            print(f"| {' | '.join(cells)} | {difference(first['output'], output):.1e} |", flush=True)


if __name__ == "__main__":
    main()
