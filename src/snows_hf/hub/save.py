"""From a pruned model to a folder that stock transformers and timm load: complete, or not there at all."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import save_for_hf

from ..errors import SaveError
from .load import Checkpoint


REPORT_FILE = "snows_config.json"


def check_output(output: Path, size: int) -> None:
    """Refuses, before any work is done, an output folder that could not be written at the end.

    Args:
        output: the folder to be made.
        size: bytes that it will hold at least.

    Raises:
        SaveError: it exists and is not empty, its parent cannot be written, or the disk has no room.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SaveError(f"Output {output} exists and is not empty.", "Choose another --output, or remove it.")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        raise SaveError(f"Output {output} cannot be written: {error.strerror}.", "Choose another --output.") from error
    if free < size:
        raise SaveError(
            f"Output {output} needs {size / 1e6:.1f} MB, and its disk has {free / 1e6:.1f} MB left.",
            "Free some space, or choose another --output.",
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A fresh folder beside ``output`` that becomes it when the block ends well, and is removed when it does not.

    Raises:
        SaveError: the disk is full or refuses.
    """
    output = output.absolute()
    partial: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        yield partial
        partial.chmod(0o755)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"Output {output} cannot be written: {error}.", "Nothing was left behind there.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def save_checkpoint(checkpoint: Checkpoint, folder: Path, summary: dict[str, Any], report: dict[str, Any]) -> None:
    """Writes model, config and preprocessing in the library's own format, and the report beside them.

    Args:
        checkpoint: holding the pruned model.
        folder: an empty folder.
        summary: small; goes into config.json under ``snows``.
        report: everything; goes into snows_config.json.
    """
    if checkpoint.library == "transformers":
        checkpoint.model.config.snows = summary
        checkpoint.model.save_pretrained(folder)
        checkpoint.processor.save_pretrained(folder)
    else:
        config = deepcopy(checkpoint.config)
        save_for_hf(checkpoint.model, str(folder), model_config={**config, "snows": summary}, safe_serialization=True)
        _drop_duplicate_num_classes(folder / "config.json")
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _drop_duplicate_num_classes(path: Path) -> None:
    # transformers passes both the config's num_classes and model_args to timm, which then gets it twice and fails.
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_args", {}).pop("num_classes", None) is not None:
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
