"""The layers of docs/architecture.md: which module of the package may import which."""

import ast
from pathlib import Path

import pytest

import snows_hf


ROOT = Path(snows_hf.__file__).parent
ALGORITHM = (
    "adapters allocation augment cascade collapse config distributed errors gradual journal masks memory models "
    "objective preconditioner progress solver streams"
)
STEPS = "calibration checks choices describe fitting permutation training"
JOBS = "attention bench evaluate finetune inspect probe prune report sensitivity train"
EVERYTHING_BUT_CLI = f"{ALGORITHM} {STEPS} {JOBS} accuracy data flops hub remote speed version"
MAY_IMPORT = {
    "errors": "",
    "version": "",
    "config": "errors",
    "distributed": "errors memory",
    "journal": "distributed errors solver",
    "solver": "solver config",
    "masks": "masks adapters config errors memory objective preconditioner solver",
    "models": "models",
    "adapters": "adapters errors models",
    "preconditioner": "adapters.base distributed",
    "objective": "adapters.base distributed preconditioner solver",
    "memory": "errors",
    "augment": "distributed",
    "streams": "adapters augment config distributed masks memory objective",
    "gradual": "config masks objective preconditioner solver streams",
    "progress": "objective solver streams",
    "cascade": "adapters config distributed errors gradual journal masks memory objective progress solver streams",
    "allocation": "adapters config errors masks objective solver streams",
    "collapse": "adapters masks",
    "remote": "errors",
    "data": "config errors remote",
    "accuracy": "data errors memory",
    "hub": "hub config data errors journal models remote version",
    "flops": "adapters",
    "speed": "masks",
    "training": "config errors",
    "checks": "accuracy adapters data errors masks",
    "calibration": "adapters checks config data distributed flops hub journal masks memory",
    "describe": "adapters config data hub journal masks progress version",
    "fitting": (
        "adapters allocation config describe distributed errors journal masks memory objective preconditioner solver "
        "streams"
    ),
    "permutation": "adapters masks",
    "choices": "allocation config errors fitting journal masks memory",
    **dict.fromkeys((*JOBS.split(), "__init__"), EVERYTHING_BUT_CLI),
    "__main__": "cli",
    "cli": f"cli {EVERYTHING_BUT_CLI}",
}
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
    allowed = MAY_IMPORT[path.with_suffix("").parts[0]].split()
    for name in imported(path):
        assert any(name == layer or name.startswith(f"{layer}.") for layer in allowed), (
            f"{path} imports snows_hf.{name}; it may import {', '.join(allowed) or 'nothing of the package'}"
        )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_sink_prints(path):
    calls = [n.func for n in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    prints = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
    assert not prints or path == Path("cli/sink.py")
