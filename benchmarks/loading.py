"""Times loading a packed 2:4 checkpoint against the dense file of the same weights, at the size of ViT-B/16.

    python benchmarks/loading.py [--dtype float16] [--repeats 7] [--cold] [--predict]

The two are loaded in turn, so that a busy machine slows both. The files are in the page cache; with ``--cold`` they
are evicted before each load, and come from the disk. With ``--predict`` the time is up to the first prediction: a
dense file may only be mapped by its loader, and is read by the first who uses its weights. ``written_s`` is what it
takes to write the dense weights into fresh memory, which any expansion must.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from snows_hf import build_chain, from_pretrained, pack
from snows_hf.cli.sink import calm_libraries
from snows_hf.hub.packed import PACKED_FILE
from snows_hf.patterns import NM


def sparse(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with random weights, those of its blocks 2:4, and no others zero, as in what has been trained."""
    chain = build_chain(model.to(dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for _, group in chain.groups():
            for name in group.parameters:
                weight = chain.weight(name)
                weight.normal_(0, 0.02)
                weight.masked_fill_(~NM(2, 4).mask(weight.abs()), 0)
    return model


def evict(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def predicted(model: torch.nn.Module) -> None:
    model(torch.zeros(1, 3, 224, 224, dtype=next(model.parameters()).dtype))


def in_turn(read: Callable[[Path], object], folders: list[Path], repeats: int, cold: bool) -> list[list[float]]:
    """Seconds of each load of each folder."""
    times: list[list[float]] = [[] for _ in folders]
    for repeat in range(repeats + 1):
        for folder, taken in zip(folders, times, strict=True):
            if cold:
                evict(folder)
            started = time.perf_counter()
            read(folder)
            if repeat:  # the first run fills the caches
                taken.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--predict", action="store_true")
    arguments = parser.parse_args()
    calm_libraries()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    use = predicted if arguments.predict else lambda model: None
    results = vars(arguments) | {"threads": torch.get_num_threads()}
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
        [written] = in_turn(
            lambda path: [tensor.clone() for tensor in load_file(path / "model.safetensors").values()],
            [folder / "transformers"],
            arguments.repeats,
            arguments.cold,
        )
        results["written_s"] = {"least": min(written), "median": statistics.median(written)}
        readers = {
            "AutoModel.from_pretrained": (
                "transformers",
                lambda path: use(AutoModelForImageClassification.from_pretrained(path)),
            ),
            "snows_hf.from_pretrained, transformers": ("transformers", lambda path: use(from_pretrained(path).model)),
            "snows_hf.from_pretrained, timm": ("timm", lambda path: use(from_pretrained(path).model)),
        }
        for reader, (name, read) in readers.items():
            folders = [folder / name, folder / f"{name}-packed"]
            dense, packed = in_turn(read, folders, arguments.repeats, arguments.cold)
            results[reader] = {
                "dense_s": {"least": min(dense), "median": statistics.median(dense)},
                "packed_s": {"least": min(packed), "median": statistics.median(packed)},
                "ratio_of_least": min(packed) / min(dense),
                "ratio_of_medians": statistics.median(packed) / statistics.median(dense),
            }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
