"""Every job on a device that is not the CPU, where there is no GPU: main memory under another name.

other_device.cpp, compiled first (which needs a C++ compiler and ninja), adds a device to torch. It computes with the
CPU's kernels, so that results can be held against the CPU's; but a tensor that was left behind on the CPU is an error
there, as on a GPU, and its memory has a limit and a peak. What GPUs compute, and how fast, it cannot show.

    python benchmarks/other_device.py [--criteria]

First table: jobs, and for prunes the largest relative difference of a weight to the same prune on the CPU. Second
table: a prune whose device has less and less memory. Third: peak of the device over the bytes of the model's weights,
without and with `offload`, and then on a device that has room for a part of them.
"""

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import snows_hf
from snows_hf.errors import SnowsError
from snows_hf.masks.criteria import CRITERIA


NAME = "elsewhere"
EMBEDDED = Path(str(files("snows_hf") / "embedded"))
VIT, CNN, DIGITS = (str(EMBEDDED / name) for name in ("vit_digits", "resnet_digits", "digits"))
QUICK: dict[str, Any] = {"samples": 8, "layer_steps": 1, "joint_steps": 0}

PRUNES: list[tuple[str, str, dict[str, Any]]] = [
    (VIT, "2:4", {}),
    (VIT, "1:4", {"joint_steps": 2}),
    (VIT, "0.7", {"joint_steps": 4}),
    (VIT, "0.7", {"allocation": "sensitivity", "repair_steps": 1}),
    (VIT, "1:4,2:4,dense", {"sparsity": 0.5, "repair_steps": 1}),
    (VIT, "2:4", {"effort": "paper"}),
    (VIT, "2:4", {"dtype": "float64", "memory": 8.0}),
    (VIT, "2:4", {"dtype": "bfloat16"}),
    (CNN, "2:4", {"joint_steps": 2}),
    (CNN, "2:4", {"permute": True, "mask": "magnitude"}),
    (CNN, "0.7", {"joint_steps": 4, "allocation": "global"}),
    (CNN, "2:4", {"sweeps": 2, "batch_size": 4, "held_out": 0.25, "mask": "sparsegpt"}),
    (CNN, "2:4", {"curvature": "hessian", "mask": "magnitude"}),
    (VIT, "2:4", {"offload": True}),
    (VIT, "0.7", {"offload": True, "allocation": "sensitivity", "joint_steps": 2}),
    (CNN, "2:4", {"offload": True, "joint_steps": 2}),
]


class Module:
    """What torch asks of a device's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = set_rng_state = staticmethod(lambda *given: None)
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def new_device() -> Any:
    """Compiles and registers it; the extension that knows its memory."""
    source = str(Path(__file__).with_suffix(".cpp"))
    extension = load(NAME, [source], extra_cflags=["-O1", "-std=c++20"], with_cuda=False)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module)
    torch.utils.generate_methods_for_privateuse1_backend()
    extension.register()
    copy = torch.Tensor.__deepcopy__

    def deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:  # torch's knows no such device
        if tensor.device.type != NAME or id(tensor) in memo:
            return copy(tensor, memo)
        twin = tensor.detach().clone()
        memo[id(tensor)] = torch.nn.Parameter(twin) if isinstance(tensor, torch.nn.Parameter) else twin
        return memo[id(tensor)]

    torch.Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]
    return extension


def use(device: torch.device) -> None:
    """From here on every job that looks for a device finds this one."""
    for module in [module for name, module in sys.modules.items() if name.startswith("snows_hf")]:
        if hasattr(module, "find_device"):
            module.find_device = lambda _: device  # type: ignore[attr-defined]


def outcome(run: Callable[[], object]) -> str:
    """What a job says, or the fault that ended it: ours is a message, any other a fault."""
    try:
        said = run()
        return "ok" if said is None else str(said)
    except SnowsError as error:
        return f"{type(error).__name__}: {error}"
    except torch.OutOfMemoryError:
        return "out of memory, which the command line says in one message"
    except Exception as error:
        return f"**FAILED** {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def difference(model: str, pattern: str, settings: dict[str, Any], there: torch.device) -> str:
    """The largest relative difference of a weight between a prune there and one on the CPU."""
    weights = []
    for device in (torch.device("cpu"), there):
        use(device)
        result = snows_hf.prune(model, pattern, data=DIGITS, **QUICK | settings)
        weights.append({name: tensor.double() for name, tensor in result.model.state_dict().items()})
    use(there)
    first, second = weights
    return f"{max(float((first[n] - second[n]).norm() / first[n].norm().clamp_min(1e-30)) for n in first):.1e}"


def jobs(there: torch.device, every_criterion: bool) -> None:
    print("| job | outcome |\n|---|---|")
    for model, pattern, settings in PRUNES:
        said = outcome(lambda m=model, p=pattern, s=settings: difference(m, p, s, there))
        print(f"| prune {Path(model).name}, {pattern}, {settings} | {said} |", flush=True)
    for mask in sorted(CRITERIA) if every_criterion else ():
        for model in (VIT, CNN):
            for pattern, scope in (("2:4", "uniform"), ("0.7", "global")):
                settings = {"update": False, "mask": mask, "allocation": scope}
                said = outcome(lambda m=model, p=pattern, s=settings: difference(m, p, s, there))
                print(f"| {mask} alone, {Path(model).name}, {pattern} | {said} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        vit, cnn = root / "vit", root / "cnn"
        small: dict[str, Any] = {"epochs": 1, "samples": 64}
        runs: list[tuple[str, Callable[[], object]]] = [
            ("prune, saved", lambda: snows_hf.prune(VIT, "2:4", data=DIGITS, eval_data=DIGITS, output=vit, **QUICK)),
            ("prune, saved", lambda: snows_hf.prune(CNN, "2:4", data=DIGITS, output=cnn, **QUICK)),
            ("evaluate", lambda: snows_hf.evaluate(vit, data=DIGITS)),
            ("sensitivity", lambda: snows_hf.sensitivity(VIT, data=DIGITS, samples=16, repair_steps=1)),
            ("attention", lambda: snows_hf.attention([VIT, vit], data=DIGITS, output=root / "attention.png")),
            ("report", lambda: snows_hf.report(vit, data=DIGITS)),
            ("probe", lambda: snows_hf.probe([VIT, vit], data=DIGITS)),
            ("finetune", lambda: snows_hf.finetune(vit, DIGITS, output=root / "tuned", teacher=VIT, **small)),
            ("finetune", lambda: snows_hf.finetune(cnn, DIGITS, output=root / "tuned-cnn", **small)),
            ("train", lambda: snows_hf.train("resnet20_cifar", DIGITS, "0.9", mask="synflow", warm_up_bn=2, **small)),
            ("train", lambda: snows_hf.train(VIT, DIGITS, "2:4", mask="hp", **small)),
            ("bench", lambda: import_module("snows_hf.jobs.bench").bench(VIT)),
        ]
        for name, run in runs:
            print(f"| {name} | {outcome(lambda run=run: run() and None)} |", flush=True)


def less_memory(extension: Any) -> None:
    print("\n| memory over what it takes | peak over limit | outcome |\n|---|---|---|")
    settings = {"samples": 24, "k": 2, "mask": "sparsegpt", "layers": ("*attention*",), "eval_data": DIGITS}
    most = 0
    for share in (None, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1):
        notes: list[str] = []

        def note(said: str, notes: list[str] = notes) -> None:
            notes.extend([said.partition(": ")[2]] if "out of memory" in said else [])

        gc.collect()
        base = extension.used()
        extension.set_limit(base + int(share * most) if share else 2**60)
        extension.reset_peak()
        given = settings | {"on_stage": note}
        said = outcome(lambda given=given: snows_hf.prune(VIT, "2:4", data=DIGITS, **given) and None)
        peak = extension.peak() - base
        most = most or peak
        shown = "; ".join([*dict.fromkeys(notes), said])
        print(f"| {share or 'no limit'} | {peak / (share * most) if share else 1:.2f} | {shown} |", flush=True)
    extension.set_limit(2**60)


def weights_there(extension: Any) -> None:
    """Few images, no preconditioner: what is on the device is weights."""
    print("\n| mask, settings | choosing masks: peak | solving: weights that stay |\n|---|---|---|")
    config = ViTConfig(
        image_size=32, patch_size=16, hidden_size=256, num_attention_heads=8, intermediate_size=1024,
        num_hidden_layers=24, num_labels=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ViTForImageClassification(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        size = Path(folder, "model.safetensors").stat().st_size
        few = {"samples": 4, "k": 1, "layer_steps": 1, "cg_max_iter": 1, "preconditioner": "none"}
        masks = ({"mask": "magnitude"}, {"mask": "sparsegpt"})
        for settings in (*masks, {"mask": "magnitude", "joint_steps": 1}, *({**m, "offload": True} for m in masks)):
            marks = []

            def mark(stage: str, marks: list[tuple[float, float]] = marks) -> None:
                marks.append((extension.peak() / size, extension.used() / size))

            gc.collect()
            extension.reset_peak()
            snows_hf.prune(folder, "2:4", data=DIGITS, on_stage=mark, **few | settings)
            print(f"| {settings} | {marks[-1][0]:.2f} | {marks[-1][1]:.2f} |", flush=True)
        print("\n| room, over the weights | settings | peak, over the weights | outcome |\n|---|---|---|---|")
        for room in (1.5, 0.8, 0.4):
            for offload in (False, True):
                gc.collect()
                base = extension.used()
                extension.set_limit(base + int(room * size))
                extension.reset_peak()
                given = few | {"mask": "sparsegpt", "offload": offload}
                said = outcome(lambda given=given: snows_hf.prune(folder, "2:4", data=DIGITS, **given) and None)
                print(f"| {room} | {offload=} | {(extension.peak() - base) / size:.2f} | {said} |", flush=True)
        extension.set_limit(2**60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--criteria", action="store_true", help="each of them, too")
    arguments = parser.parse_args()
    os.environ.setdefault("MAX_JOBS", "1")
    extension = new_device()
    there = torch.device(NAME, 0)
    use(there)
    jobs(there, arguments.criteria)
    less_memory(extension)
    weights_there(extension)


if __name__ == "__main__":
    main()
