"""From a pruned model to a folder that stock transformers and timm load: complete, or not there at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from timm.models import save_for_hf

from ..errors import ConfigError, LoadError, SaveError, one_line
from ..journal import sync, work_folder
from .load import Checkpoint


REPORT_FILE = "snows_config.json"

REPORT_KEYS = {
    "source", "pattern", "sparsity", "layers", "dense_layers", "settings", "update", "criterion", "versions", "seed",
    "samples", "calibration_data", "eval_data", "dense", "masked", "pruned", "parameters", "flops", "bytes", "seconds",
    "hardware",
}  # fmt: skip
"""What the card reads of a report."""

PLACING = "placing"
"""A file of the work folder, from when the result begins to move to its place: what is there then is ours."""


def check_output(output: Path, size: int) -> None:
    """Refuses, before any work is done, an output folder that could not be written at the end.

    Args:
        output: the folder to be made.
        size: bytes that it will hold at least.

    Raises:
        SaveError: it exists and is not empty, its parent cannot be written, or the disk has no room.
    """
    work = work_folder(output)
    try:
        if output.exists() and not output.is_dir():
            raise SaveError(f"Output {output} exists and is a file.", "Choose another --output.")
        entries = {path.name for path in output.iterdir()} if output.exists() else set()
        if entries - {work.name} and not (work / PLACING).exists():
            raise SaveError(f"Output {output} exists and is not empty.", "Choose another --output, or remove it.")
        place = output.absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        raise SaveError(
            f"Output {output} cannot be written: {error.strerror or error}.", "Choose another --output."
        ) from error
    if free < size:
        raise SaveError(
            f"Output {output} needs {size / 1e6:.1f} MB, and its disk has {free / 1e6:.1f} MB left.",
            "Free some space, or choose another --output.",
        )


@contextmanager
def whole_folder(output: Path, work: Path | None = None) -> Iterator[Path]:
    """A fresh folder whose files are in ``output``, and on the disk, when the block ends well, and gone when it does
    not.

    An ``output`` that exists already, empty, stays the folder that it is (a mount point, say) and is filled.

    Args:
        output: the folder to be made.
        work: where the fresh folder is until then; None: hidden, beside ``output`` or in it.

    Raises:
        SaveError: the disk is full or refuses.
    """
    output = output.resolve()
    if work is not None:
        partial = work / "result"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    else:
        partial = (output if output.exists() else output.parent) / f".{output.name}.partial-{uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = partial.stat().st_mode & 0o666  # what the umask allows; safetensors would keep its file to the owner
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                sync(path)
        sync(partial)
        if work is not None:
            (work / PLACING).touch()
            sync(work)
        if output.exists():
            for path in partial.iterdir():
                path.rename(output / path.name)
            sync(output)
        else:
            partial.rename(output)
            sync(output.parent)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"Output {output} cannot be written: {one_line(error)}.", "Nothing was left behind there."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(checkpoint: Checkpoint, folder: Path, summary: dict[str, Any], report: dict[str, Any]) -> None:
    """Writes model, config and preprocessing in the library's own format, and the report beside them.

    Args:
        checkpoint: holding the pruned model.
        folder: an empty folder.
        summary: small; goes into config.json under ``snows``.
        report: everything; goes into snows_config.json.
    """
    model: Any = checkpoint.model
    config = deepcopy(checkpoint.config)
    if checkpoint.library == "transformers":
        model.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
    else:
        save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
        if "pretrained_cfg" not in config:  # an old, flat file, which can hold no other key
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["pretrained_cfg"].pop("label_offset", None)  # done on loading
        # transformers would pass this to timm twice, and fail.
        if "num_classes" in config.get("model_args", {}):
            config["num_classes"] = config["model_args"].pop("num_classes")
    # The libraries' own rewriting of the configuration depends on their versions: only ``snows`` is new.
    write_json(folder / "config.json", {**config, "snows": summary})
    write_json(folder / REPORT_FILE, report)
    for licence in checkpoint.folder.glob("LICENSE*"):  # most licences want to go along
        if licence.is_file():
            shutil.copyfile(licence, folder / licence.name)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of the prune that made a folder.

    Raises:
        LoadError: there is none, or it is not what ``prune`` writes.
    """
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(
            f"{folder} has no {REPORT_FILE}.", "Expected what `snows-hf prune` writes; --no-update gives a mask alone."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(report, dict) or REPORT_KEYS - report.keys():
        raise LoadError(f"{path} is not a report that this version of `snows-hf prune` writes.", "Prune again.")
    return report


def retrainings(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``finetune`` has added to a report, the last one at the end; empty where there was none."""
    return [*report.get("earlier_finetunes", []), report["finetune"]] if report.get("finetune") else []


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_file(output: Path, suffix: str) -> None:
    """Refuses, before any work is done, a single file that could not be written.

    Raises:
        ConfigError: its name does not end in ``suffix``.
        SaveError: it exists, or its folder does not.
    """
    if output.suffix.lower() != suffix:
        raise ConfigError(f"Output {output}: expected a name that ends in {suffix}.")
    if output.exists():
        raise SaveError(f"Output {output} exists.", "Choose another --output, or remove it.")
    if not output.absolute().parent.is_dir():
        raise SaveError(f"Output {output}: its folder does not exist.", "Make it, or choose another --output.")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place once it is whole.

    Raises:
        SaveError: the disk is full or refuses.
    """
    partial = path.with_name(f".{path.name}.partial-{uuid4().hex[:8]}")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise SaveError(f"Output {path} cannot be written: {one_line(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)
