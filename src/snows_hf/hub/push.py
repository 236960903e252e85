"""From a saved folder to a repository on the Hub, in one commit: complete, or not visible."""

import re
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from ..errors import SaveError
from ..runtime.remote import check_push, hub_errors
from .card import PLACEHOLDER
from .folder import TOKENIZER_FILES, check_weights, leads_out, library_of, read_config
from .repack import check_own, weight_files
from .save import REPORT_FILE


PUSHED = {
    "config.json", "preprocessor_config.json", "processor_config.json", "README.md", REPORT_FILE, "report.json",
    *TOKENIZER_FILES,
}  # fmt: skip
"""What is published beside weights and licences, by name: a folder may hold anything. report.html is not, since it may
show images."""

OLD_WEIGHTS = re.compile(
    r"model(\.snows|-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"
)
"""Names by which transformers, timm and this package look for weights, at the root of a repository."""


@dataclass(frozen=True)
class Pushed:
    """A push that ended well.

    Attributes:
        url: the repository's page.
        revision: the commit.
        left_out: what else lies in the folder, links out of it included.
        deleted: weights of an earlier push that it removed.
    """

    repository: str
    url: str
    revision: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    deleted: tuple[str, ...]


def push(folder: str | Path, repository: str, private: bool = False) -> Pushed:
    """Publishes a saved checkpoint as ``USER/NAME``. The folder is only read, so that a push that failed can be
    repeated.

    Only the checkpoint's own files go there, and no link to a file elsewhere. The repository is made where there is
    none, and a public one is refused for a ``private`` push. Weights at its root that this push does not replace are
    deleted in the same commit, since a loader would read them in place of the new ones.

    Raises:
        LoadError: the folder holds no checkpoint, lacks a file of its weights, or has it by a link to elsewhere.
        SaveError: the Hub cannot be reached, or refuses.
    """
    folder = Path(expanduser(folder))
    library_of(read_config(folder), folder)
    check_weights(folder)
    needed = weight_files(folder) | {"config.json", "preprocessor_config.json"}
    for name in sorted(needed):  # without these it would be another checkpoint; other links are left out
        check_own(folder / name, folder)
    info = check_push(repository, private)
    paths = sorted(folder.iterdir())
    wanted = [path for path in paths if path.name in PUSHED | needed or path.name.startswith("LICENSE")]
    files = [path for path in wanted if path.is_file() and not leads_out(path, folder)]
    names = tuple(path.name for path in files)
    old = [file.rfilename for file in info.siblings or ()] if info is not None else []
    deleted = tuple(name for name in sorted(old) if OLD_WEIGHTS.fullmatch(name) and name not in names)
    api = HfApi()
    with hub_errors(SaveError, "model", repository, writing=True):
        if info is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        added = [CommitOperationAdd(path.name, _content(path, repository)) for path in files]
        removed = [CommitOperationDelete(name) for name in deleted]
        message = "Add a sparse model, pruned with snows-hf"
        commit = api.create_commit(repository, [*added, *removed], commit_message=message)
    left_out = tuple(path.name for path in paths if path not in files)
    return Pushed(repository, f"{constants.ENDPOINT}/{repository}", commit.oid, names, left_out, deleted)


def _content(path: Path, repository: str) -> bytes | Path:
    if path.name != "README.md":
        return path
    text = path.read_text(encoding="utf-8")
    return text.replace(f"local-dir:{PLACEHOLDER}", f"hf-hub:{repository}").replace(PLACEHOLDER, repository).encode()
