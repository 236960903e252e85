"""From a pruned model to a folder that stock transformers and timm load: complete, or not there at all."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import Tensor, nn

from ..errors import LoadError
from ..runtime.files import write_json
from ..runtime.version import __version__
from .folder import TOKENIZER_FILES, leads_out, read_json
from .load import Checkpoint


REPORT_FILE = "snows_config.json"

DATA = {"name": str, "split": str}
ACCURACY = {"top1": float, "top5": float, "images": int, "method": [str, None]}
FIDELITY = {"images": int, "outputs": dict, "agreement": [float, None], "divergence": [float, None]}
FASTER = {
    "asked": float,
    "measured": float,
    "batch": int,
    "dtype": str,
    "hardware": str,
    "choices": list,
    "timed": list,
}
SPEED = {key: FASTER[key] for key in ("asked", "measured", "batch", "dtype", "hardware")}
RETRAINING = {
    "epochs": int, "images": int, "data": DATA, "eval_data": [DATA, None], "before": [ACCURACY, None],
    "after": [ACCURACY, None],
}  # fmt: skip
REPORT = {
    "source": str, "pattern": str, "sparsity": float, "layers": list, "dense_layers": list, "settings": dict,
    "update": bool, "criterion": dict, "versions": dict, "seed": int, "samples": int, "calibration_data": DATA,
    "eval_data": [DATA, None], "dense": [ACCURACY, None], "masked": [ACCURACY, None], "pruned": [ACCURACY, None],
    "parameters": {"total": int, "nonzero": int}, "flops": {"dense": float, "pruned": float}, "bytes": int,
    "seconds": float, "hardware": str, "name": [str, None], "finetune": [RETRAINING, None],
    "task": [str, None], "tower": [str, None], "fidelity": [{"masked": FIDELITY, "pruned": FIDELITY}, None],
    "faster": [FASTER, None],
}  # fmt: skip
"""Keys of a report and their types; a list names alternatives. What lies deeper its readers check."""

REPORTS: dict[str, dict[str, Any]] = {
    "prune": REPORT,
    "train": {
        "source": str, "pattern": [str, None], "sparsity": float, "layers": list, "settings": dict, "versions": dict,
        "collapse": {"layers": dict, "connected": bool}, "images": int, "data": DATA, "eval_data": [DATA, None],
        "accuracy": [ACCURACY, None], "training_seconds": float, "hardware": str, "finetune": [RETRAINING, None],
    },
    "finetune": {"source": str, "pattern": None, "layers": list, "versions": dict, "finetune": RETRAINING},
}  # fmt: skip
"""The same by who began the report: ``finetune`` goes on with what it finds, or else begins its own."""


def save_checkpoint(checkpoint: Checkpoint, folder: Path, summary: dict[str, Any], report: dict[str, Any]) -> None:
    """Writes model, config and preprocessing in the library's own format, and the report, into an empty folder, and
    copies licences and tokenizer.

    The ``summary``, which is small, goes into config.json under ``snows``, with ``custom`` where the configuration
    does not describe the model; the ``report`` into snows_config.json. Files that were not copied, since they are
    links to elsewhere, are added to it as ``left_out``.
    """
    model: Any = checkpoint.model
    config = deepcopy(checkpoint.config)
    if checkpoint.library == "transformers":
        model.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
    else:
        with untied(model):
            save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
        if "pretrained_cfg" not in config:  # an old, flat file, which can hold no other key
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["pretrained_cfg"].pop("label_offset", None)  # done on loading
        # transformers would pass this to timm twice, and fail.
        if "num_classes" in config.get("model_args", {}):
            config["num_classes"] = config["model_args"].pop("num_classes")
    # The libraries' own rewriting of the configuration depends on their versions: only ``snows`` is new.
    custom = {"custom": True} if checkpoint.custom else {}
    write_json(folder / "config.json", {**config, "snows": summary | custom})
    along = sorted(checkpoint.folder.glob("LICENSE*"))  # most licences want to go along
    if checkpoint.library == "transformers":
        along += [checkpoint.folder / name for name in (*TOKENIZER_FILES, "processor_config.json")]
    along = [path for path in along if path.is_file()]
    if left_out := [path.name for path in along if leads_out(path, checkpoint.folder)]:
        report["left_out"] = left_out
    write_json(folder / REPORT_FILE, report)
    for path in along:
        if path.name not in left_out:
            shutil.copyfile(path, folder / path.name)


@contextmanager
def untied(model: nn.Module) -> Iterator[None]:
    """For the time of the block, tensors that two modules share (CoaT's) are in the model's state once for each: timm
    saves no file of tensors that lie in the same memory."""

    def separate(_: nn.Module, state: dict[str, Tensor], *__: object) -> None:
        seen = set[int]()
        for name, tensor in state.items():
            state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())

    hook = model.register_state_dict_post_hook(separate)
    try:
        yield
    finally:
        hook.remove()


def claim(pattern: str, sparsity: float, weights: Iterable[Tensor]) -> dict[str, Any]:
    """What config.json says under ``snows``, which ``inspect`` holds the weights against: pattern and share of zeros
    of what was pruned, and the number of ``weights`` that the pattern binds, all of which a report must name."""
    count = sum(weight.numel() for weight in weights)
    return {"version": __version__, "pattern": pattern, "sparsity": round(sparsity, 6), "weights": count}


def claim_of_speed(faster: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json says besides of a model that was to be so many times as fast, of what its report says; weights
    prove none of it."""
    return {} if faster is None else {"faster": {key: faster[key] for key in SPEED}}


def speed_of(claimed: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many times as fast as the dense one a model should be (``asked``), and was when it was made (``measured``),
    as a config.json claims; None where it claims nothing of the kind."""
    said = claimed.get("faster")
    return {key: said[key] for key in SPEED} if isinstance(said, dict) and is_a(said, SPEED) else None


def claims_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says under ``snows``: see :func:`claim`; empty where it says nothing."""
    said = config.get("snows")
    return said if isinstance(said, dict) else {}


def read_report(folder: Path) -> dict[str, Any]:
    """The report of the prune that made a folder.

    Raises:
        LoadError: there is none, or it is not what ``prune`` writes.
    """
    if (report := find_report(folder)) is None:
        remedy = "Expected what `snows-hf prune` writes; --no-update gives a mask alone."
        raise LoadError(f"{folder} has no {REPORT_FILE}.", remedy)
    if (maker := maker_of(report)) != "prune":
        of = " of a model without a report" if maker == "finetune" else ""
        fault = f"{folder} is what `snows-hf {maker}` wrote{of}; expected what `snows-hf prune` writes."
        raise LoadError(fault, "`snows-hf eval` and `snows-hf inspect` read it.")
    return report


def find_report(folder: Path) -> dict[str, Any] | None:
    """The report of whatever made a folder; None where there is none.

    Raises:
        LoadError: it is not what ``prune``, ``train`` or ``finetune`` writes.
    """
    path = folder / REPORT_FILE
    if not path.exists():
        return None
    report = read_json(path, finite=True)
    maker = maker_of(report)
    found = ((key, report.get(key), kind) for key, kind in REPORTS[maker].items())
    wrong = [f"its {key!r} is {value!r:.60}" for key, value, kind in found if not is_a(value, kind)]
    earlier = report.get("earlier_finetunes", [])
    if not isinstance(earlier, list) or not all(is_a(made, RETRAINING) for made in earlier):
        wrong.append("its 'earlier_finetunes' are no list of retrainings")
    if wrong:
        fault = f"{path} is not a report that this version of `snows-hf {maker}` writes: {wrong[0]}."
        raise LoadError(fault, f"{maker.capitalize()} again.")
    return report


def maker_of(report: dict[str, Any]) -> str:
    """Who began a report, by what only they write: ``prune``, ``train`` or ``finetune``."""
    if "calibration_data" in report:
        return "prune"
    return "train" if "collapse" in report else "finetune" if "finetune" in report else "prune"


def takes_steps(report: Mapping[str, Any]) -> bool:
    """Whether Newton steps moved the weights of a prune, after what the criterion made of them."""
    settings = report["settings"]
    return report["update"] and bool(settings.get("sweeps", 1) or settings.get("joint_steps"))


def alone_of(report: Mapping[str, Any]) -> str:
    """What the result before SNOWS is called. A criterion's own weights are part of it, but where they are all that
    SNOWS makes of it."""
    if report.get("units"):
        return "units cut"
    return "zeros alone" if report["update"] and not takes_steps(report) else "mask alone"


def is_a(value: object, kind: Any) -> bool:
    """Whether a value of JSON has a type, as in ``REPORT``."""
    if isinstance(kind, list):
        return any(is_a(value, one) for one in kind)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(is_a(value.get(key), one) for key, one in kind.items())
    if kind in (int, float):  # to Python a bool is an int, and an int has no end, which a float cannot follow
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < 1e100
    return value is None if kind is None else isinstance(value, kind)


def retrainings(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``finetune`` has added to a report, the last one at the end; empty where there was none."""
    return [*report.get("earlier_finetunes", []), report["finetune"]] if report.get("finetune") else []
