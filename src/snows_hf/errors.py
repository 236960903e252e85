"""One tree of errors. Each message says what was expected, what came, where, and what to do about it."""

from collections.abc import Sequence


class SnowsError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: what was expected, what came, and in which layer or file.
        remedy: what the user can do about it, as a full sentence.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class ConfigError(SnowsError):
    """A setting has a value that makes no sense, alone or together with another."""


class PatternError(ConfigError):
    """A sparsity pattern cannot be read, or does not fit a layer."""


class LoadError(SnowsError):
    """A checkpoint cannot be found, read or trusted."""


class AdapterError(SnowsError):
    """No adapter knows this architecture, or an adapter does not reproduce the model."""


class MaskError(SnowsError):
    """A mask is missing, has the wrong shape or type, or breaks the pattern it should follow."""


class DataError(SnowsError):
    """Images or labels cannot be found, read or matched to the model's classes."""


class NumericsError(SnowsError):
    """A weight, activation or loss is not a finite number."""


class MemoryLimitError(SnowsError):
    """Memory, of the machine or of a device, does not suffice."""


class ProcessError(SnowsError):
    """Another of several processes that work together has ended."""


class SaveError(SnowsError):
    """The result cannot be written where it was asked for."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Another library's message, for use within one of ours: on one line, and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} …"


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, for a message."""
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])
