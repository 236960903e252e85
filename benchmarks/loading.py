"""Times loading a packed 2:4 checkpoint against the dense file of the same weights, at the size of ViT-B/16.

    python benchmarks/loading.py [--dtype float16] [--repeats 7]

Both files are in the page cache. The two are loaded in turn, and medians compared, so that a busy machine slows both.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from snows_hf import build_chain, load, pack
from snows_hf.cli.sink import calm_libraries
from snows_hf.hub.packed import PACKED_FILE
from snows_hf.masks import NM


def sparse(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, those of its blocks 2:4."""
    chain = build_chain(model.to(dtype))
    with torch.no_grad():
        for _, group in chain.groups():
            for name in group.parameters:
                weight = chain.weight(name)
                weight.normal_(0, 0.02)
                weight.masked_fill_(~NM(2, 4).mask(weight.abs()), 0)
    return model


def in_turn(dense: Callable[[], object], packed: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for function, taken in zip((dense, packed), times, strict=True):
            started = time.perf_counter()
            function()
            if repeat:  # the first run fills the caches
                taken.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    calm_libraries()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    results = {"dtype": arguments.dtype, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        sparse(ViTForImageClassification(ViTConfig(num_labels=1000)), dtype).save_pretrained(folder / "transformers")
        ViTImageProcessor().save_pretrained(folder / "transformers")
        timm_model = sparse(timm.create_model("vit_base_patch16_224"), dtype)
        timm.models.save_for_hf(timm_model, str(folder / "timm"), safe_serialization=True)
        for name in ("transformers", "timm"):
            pack(folder / name, folder / f"{name}-packed")
        results["size_ratio"] = (folder / "timm-packed" / PACKED_FILE).stat().st_size / (
            folder / "timm" / "model.safetensors"
        ).stat().st_size
        readers = {
            "AutoModel.from_pretrained": ("transformers", AutoModelForImageClassification.from_pretrained),
            "snows_hf.load, transformers": ("transformers", lambda path: load(str(path))),
            "snows_hf.load, timm": ("timm", lambda path: load(str(path))),
        }
        for reader, (name, read) in readers.items():
            dense, packed = in_turn(
                lambda read=read, name=name: read(folder / name),
                lambda read=read, name=name: read(folder / f"{name}-packed"),
                arguments.repeats,
            )
            results[reader] = {"dense_s": dense, "packed_s": packed, "ratio": packed / dense}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
