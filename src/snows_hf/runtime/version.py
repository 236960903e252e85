"""The package's version, read by pyproject.toml."""

from types import ModuleType


__version__ = "0.1.0"


def versions(*modules: ModuleType) -> dict[str, str]:
    """Of this package and of others, by name."""
    return {"snows-hf": __version__} | {module.__name__: module.__version__ for module in modules}
