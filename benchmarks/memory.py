"""Peak memory of whole prunes over depth and number of images, each in a process of its own.

A ViT of random weights and width 192 on random 32×32 images: 12 and 24 layers, 1,000 and 5,000 images, K = 3, few
steps of one product each, and masks by SparseGPT, whose Gram matrices count; all else as by default.

    python benchmarks/memory.py [--memory 2.0] [--layers 12 24] [--images 1000 5000]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor


SIZE = {"image_size": 32, "patch_size": 4, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}


def checkpoint(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    path = folder / f"vit-{layers}"
    config = ViTConfig(**SIZE, num_hidden_layers=layers, num_labels=10)
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def images(folder: Path, n: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    data = Dataset.from_dict({"image": list(pixels)}, features=Features({"image": Image()}))
    data.to_parquet(folder / "images" / "train.parquet")
    return folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=2.0, help="GB")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000])
    arguments = parser.parse_args()
    print("| layers | images | --memory (GB) | peak (GB) | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = images(root, max(arguments.images))
        settings = "mask: sparsegpt", "cg_max_iter: 1", "k: 3", "passes: 1", "patience: 1", "min_gain: 0.9"
        (root / "settings.yaml").write_text("\n".join(settings))
        for layers in arguments.layers:
            model = checkpoint(root, layers)
            for n in arguments.images:
                command = [sys.executable, "-m", "snows_hf", "prune", model, "--quiet", "--pattern", "2:4"]
                command += ["--data", data, "--samples", n, "--memory", arguments.memory]
                command += ["--config", root / "settings.yaml", "--output", root / f"pruned-{layers}-{n}"]
                started = time.perf_counter()
                process = subprocess.Popen([str(part) for part in command])
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    sys.exit(f"{layers} layers, {n} images: the prune ended with status {status}")
                seconds, peak = time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9
                print(f"| {layers} | {n} | {arguments.memory} | {peak:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
