"""Where the files of a checkpoint lie, and whether they are whole: before a library reads any of them."""

import json
import re
from contextlib import suppress
from functools import partial
from os import fspath
from pathlib import Path
from typing import Any

from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import git_hash

from ..data.names import Name, model_folder
from ..errors import LoadError, one_line
from ..runtime.files import checksum
from ..runtime.remote import hub_errors
from ..runtime.run import Run
from .packed import PACKED_FILE, check_packed, opened


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""What tokenizers of transformers are made of, at the root of a checkpoint."""


def bar_for(run: Run, name: str) -> type[tqdm]:
    """A bar for the Hub's client that shows nothing, and tells ``run`` how much of a download has come."""

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})
            # There are others: of files, and of what goes over the network, which may be less.
            self.told = options.get("unit") == "B" and options.get("desc", "").startswith("Reconstructing")

        def update(self, n: float | None = 1) -> None:
            with self.get_lock():  # one call for each piece, from several threads
                self.n += n or 0
                if self.told and (total := round((self.total or 0) / 1e6)):
                    run.tell(f"Downloading {name}, MB", self.n / 1e6, total)

    return Bar


def find_folder(source: Name, revision: str | None = None, run: Run | None = None) -> Path:
    """The folder of a checkpoint: a local one (``local-dir:`` optional), else a Hub snapshot (``hf-hub:`` optional),
    of whose download ``run`` is told.

    Raises:
        LoadError: neither exists, the Hub refuses, or the repository holds no checkpoint.
    """
    local = model_folder(source)
    if local is not None:
        return local
    name = fspath(source).removeprefix("hf-hub:")
    with hub_errors(LoadError, "model", name, revision):
        # A checkpoint is at the root: below are states of a training, other formats, other models.
        bar = None if run is None else bar_for(run, name)
        at_root = partial(snapshot_download, name, ignore_patterns=["*/*"], tqdm_class=bar)
        folder = Path(at_root(revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        # Wanted, and no reason to fail: an older snapshot in the cache may not have them.
        with suppress(LocalEntryNotFoundError):
            at_root(revision=folder.name, allow_patterns=["README.md", "LICENSE*", "*.txt", "*.model"])
    if not (folder / "config.json").is_file():
        raise LoadError(f"Model {name} has no config.json at its root.", "Expected a transformers or timm checkpoint.")
    check_download(name, folder)
    return folder


def check_download(name: str, snapshot: Path) -> None:
    """Compares what the cache holds with the checksums that it came with, which the Hub's client leaves undone: it
    names each file by its ETag, the SHA-256 of a large file, else git's SHA-1.

    Raises:
        LoadError: a file is not what the Hub has; it is removed from the cache, to be downloaded again.
    """
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        if path.is_dir() or blob == path.absolute() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue  # no link into the cache (Windows): nothing says what it should be
        if blob.name != (checksum(blob) if len(blob.name) == 64 else git_hash(blob.read_bytes())):
            path.unlink()
            blob.unlink()
            raise LoadError(
                f"{path.name} of {name} was damaged on its way: its checksum is not the Hub's.",
                "It was removed from the cache. Repeat the command to download it again.",
            )


def check_whole(source: str, revision: str | None, snapshot: Path, library: str) -> None:
    """Asks the Hub, which must answer, where a snapshot lacks a file: without a connection the cache has given all
    that it holds."""
    # preprocessor_config.json, or processor_config.json, which may hold it
    wanted = ["*.safetensors", *(["p*processor_config.json"] if library == "transformers" else [])]
    if not all(any(snapshot.glob(pattern)) for pattern in wanted):
        name = source.removeprefix("hf-hub:")
        with hub_errors(LoadError, "model", name, revision):
            model_info(name, revision=revision)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint's folder, or a folder in it, is a link to somewhere else: a copy of it would
    publish what nobody put there. A snapshot of the Hub's cache is made of links to its repository's own blobs."""
    home, target = folder.resolve(), path.resolve()
    own = [home, *([(home.parents[1] / "blobs").resolve()] if home.parent.name == "snapshots" else [])]
    return not any(target.is_relative_to(place) for place in own)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json: see :func:`read_json`."""
    return read_json(folder / "config.json", "Expected a transformers or timm checkpoint.")


def read_json(path: Path, expected: str = "", text: str | None = None, finite: bool = False) -> dict[str, Any]:
    """The JSON object in a file, or in the ``text`` that it holds; ``finite`` refuses NaN and infinity, which Python
    reads though they are no JSON.

    Raises:
        LoadError: missing (``expected`` says what it should have been), or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8") if text is None else text)
        json.dumps(value, allow_nan=not finite)
    except FileNotFoundError:
        raise LoadError(f"{path.parent} has no {path.name}.", expected) from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def is_custom(config: dict[str, Any]) -> bool:
    """Whether config.json says that the tensors are smaller than it describes."""
    said = config.get("snows")
    return isinstance(said, dict) and said.get("custom") is True


def library_of(config: dict[str, Any], folder: Path) -> str:
    """``timm`` or ``transformers``, by what config.json says: timm names an ``architecture``, transformers a
    ``model_type``. (timm models wrapped by transformers have both, and are timm's.)

    Raises:
        LoadError: it says neither.
    """
    if "architecture" in config:
        return "timm"
    if "model_type" in config:
        return "transformers"
    raise LoadError(
        f"{folder / 'config.json'} has neither 'architecture' (timm) nor 'model_type' (transformers).",
        "Only checkpoints of these two libraries can be pruned.",
    )


def check_weights(folder: Path) -> None:
    """Refuses folders without safetensors, safetensors files whose header does not fit their size, and packed files
    that are not what they say.

    Raises:
        LoadError: only pickles, nothing at all, weights packed and not, or a corrupt or truncated file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if folder / PACKED_FILE in files:
        if (folder / "model.safetensors").exists():
            raise LoadError(f"{folder} holds {PACKED_FILE} and model.safetensors.", "Remove one of them.")
        check_packed(folder / PACKED_FILE)
    if not files:
        pickles = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickles:
            fault = f"holds its weights as a pickle ({pickles[0]}), which can run any code when it is read."
            remedy = "Convert it to safetensors first: load it where you trust it, and `save_pretrained`."
            raise LoadError(f"{folder} {fault}", remedy)
        raise LoadError(f"{folder} has no *.safetensors file.", "Pickles (.bin, .pth) are never read.")
    for path in files:
        with opened(path):
            pass
