"""What the Hub refuses, and how it fails, in this package's words."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, ModelInfo, constants, errors, get_token
from huggingface_hub.utils import validate_repo_id

from ..errors import SaveError, SnowsError, one_line


TOKEN = "set HF_TOKEN or run `hf auth login`"


@contextmanager
def hub_errors(
    error_class: type[SnowsError], kind: str, name: str, revision: str | None = None, writing: bool = False
) -> Iterator[None]:
    """Turns what the Hub's clients raise within the block into one ``error_class`` that says what to do.

    ``kind`` is ``model`` or ``dataset``, ``name`` the repository's id, and ``writing`` a push.
    """
    try:
        yield
    # httpx's errors are not OSErrors; huggingface_hub hides those of its upload threads in RuntimeErrors.
    except (errors.HTTPError, errors.XetDownloadError, OSError, ValueError, RuntimeError) as error:
        raise error_class(*explain(error, kind, name, revision, writing)) from error


def explain(error: BaseException, kind: str, name: str, revision: str | None, writing: bool) -> tuple[str, str]:
    """What happened, and what the user can do about it. Never shows a token."""
    what = f"{kind.capitalize()} {name}"
    while error.__cause__ is not None and isinstance(error, errors.LocalEntryNotFoundError | RuntimeError):
        error = error.__cause__  # those two only say that something else went wrong
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{what} is gated.", f"Accept its licence on {page}, then {TOKEN} of an account that may read it."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision or 'main'!r}.", "Give a branch, a tag or a commit."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"Writing to {name} on the Hub needs a token, and there is none.", _get_a_token("with write access")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError) and not writing:
        place = "dataset" if kind == "dataset" else "repository"
        fault = f"{what} is neither a folder here nor a {place} on the Hub."
        return fault, f"Check the spelling; for a private {kind} {TOKEN}."
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        fetch = f"hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}"
        fault = f"{what} is no folder here, offline mode is on, and the cache does not hold all of it."
        return fault, f"Unset HF_HUB_OFFLINE, or run `{fetch}` while there is a connection."
    if status == 401:
        return "The Hub does not accept the token that it was sent.", _get_a_token()
    if status == 403:
        return f"The Hub forbids this for {name}: {_shown(error)}", _get_a_token(f"with access to {name}")
    if status == 429:
        return f"The Hub limits the number of requests (429), at {kind} {name}.", "Wait some minutes and repeat it."
    if status is not None and status >= 500:
        return f"The Hub is out of order ({status}), at {kind} {name}.", "Nothing was lost: repeat it later."
    if writing:
        fault = f"{what} cannot be pushed to the Hub: {_shown(error)}"
        return fault, "Check the name and the connection, and repeat it."
    return (
        f"{what} is no folder here, is not whole in the cache, and cannot be read from the Hub: {_shown(error)}",
        "Check the spelling and the connection, unset HF_HUB_OFFLINE, or give a folder.",
    )


def _get_a_token(rights: str = "") -> str:
    return f"Make one {f'{rights} ' if rights else ''}on https://huggingface.co/settings/tokens, then {TOKEN}."


def _shown(error: BaseException) -> str:
    text = one_line(error)
    token = get_token()  # a malformed header is quoted in the message about it
    return text.replace(token, "…") if token else text


def check_push(repository: str, private: bool = False) -> ModelInfo | None:
    """The repository as it is, or None where there is none yet; what could not be pushed at the end is refused before
    any work is done.

    Raises:
        SaveError: a bad name, offline mode, no token, one that the Hub does not accept, or a public repository for a
            private push.
    """
    if repository.count("/") != 1:
        raise SaveError(f"Cannot push to {repository!r}.", "Give the repository as USER/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise SaveError(f"Cannot push to {repository}: offline mode is on.", "Unset HF_HUB_OFFLINE.")
    api = HfApi()
    with hub_errors(SaveError, "model", repository, writing=True):
        validate_repo_id(repository)
        api.whoami()
        try:
            info = api.model_info(repository)
        except errors.RepositoryNotFoundError as error:
            if isinstance(error, errors.GatedRepoError):  # it exists
                raise
            return None
    if private and not info.private:
        fault = f"{repository} exists and is public: --private would not change that."
        raise SaveError(fault, "Make it private on its page, or choose another name.")
    return info
