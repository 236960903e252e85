"""The rooms of docs/architecture.md: which module of the package may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snows_hf


ROOT = Path(snows_hf.__file__).parent
MAY_IMPORT = {
    "errors": "",
    "settings": "errors",
    "patterns": "errors settings",
    "runtime": "errors",
    "adapters": "errors runtime",
    "method": "errors settings patterns runtime adapters",
    "masks": "errors settings patterns runtime adapters method",
    "data": "errors runtime adapters",
    "hub": "errors runtime adapters data",
    "reports": "errors settings patterns runtime adapters method masks data hub",
    "jobs": "errors settings patterns runtime adapters method masks data hub reports",
    "cli": "errors settings patterns runtime data hub jobs",
    "__init__": "errors settings runtime adapters data hub jobs",
    "__main__": "cli",
}
"""One line per entry of the package, each above what it may import; a folder's own files may import each other."""

TABLE = ROOT.parents[1] / "docs/architecture.md"

MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, by names that start below the package."""
    package = ["snows_hf", *path.parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            parts += node.module.split(".") if node.module else []
            # `from . import name` may name a module or an attribute: a module where there is one.
            names |= {
                ".".join([*parts, alias.name]) if is_module([*parts[1:], alias.name]) else ".".join(parts)
                for alias in node.names
            }
    return {name.removeprefix("snows_hf.") for name in names if name.split(".")[0] == "snows_hf"}


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_imports_only_its_layers(path):
    own = path.with_suffix("").parts[0]
    allowed = [own, *MAY_IMPORT[own].split()]
    for name in imported(path):
        assert any(name == layer or name.startswith(f"{layer}.") for layer in allowed), (
            f"{path} imports snows_hf.{name}; it may import {', '.join(allowed) or 'nothing of the package'}"
        )


@pytest.mark.skipif(not TABLE.is_file(), reason="needs the repository")
def test_the_table_of_the_rooms_says_the_same():
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| .+ \| (.*?) ?\|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == MAY_IMPORT
    assert len(rows) == len(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_sink_prints(path):
    calls = [n.func for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    prints = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
    assert not prints or path == Path("cli/sink.py")


LIGHT = "snows_hf snows_hf.cli snows_hf.masks.criteria snows_hf.settings snows_hf.patterns.plan snows_hf.jobs.request"
HEAVY = ("torch", "transformers", "timm", "datasets", "accelerate")


def test_these_load_no_large_library():
    """Nor does what they import: a command line is refused, and helped, before torch is there."""
    code = f"import sys, {LIGHT.replace(' ', ', ')}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
