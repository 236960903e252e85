"""The commands as processes of their own: few, because each spends seconds on importing torch."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import warm
from embedded import NO_HUB

from snows_hf import __version__


README = Path(__file__).parents[2] / "README.md"


def snows_hf(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m snows_hf`` with an empty home and no Hub."""
    home = cwd.parent / "home"
    environment = {"HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": NO_HUB, "OMP_NUM_THREADS": "1"}
    return warm.run("-m", "snows_hf", *arguments, cwd=cwd, env={**os.environ, **environment})


def without_figures(text: str) -> str:
    """Of what differs from one machine to the next in its last digits, and from run to run."""
    return re.sub(r"[ \d.]+", " ", text)


def test_version(elsewhere: Path) -> None:
    result = snows_hf("--version", cwd=elsewhere)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.slow
def test_demo_needs_nothing_but_the_package(elsewhere: Path, run) -> None:
    result = snows_hf("demo", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "snows-hf inspect snows-demo" in result.stdout  # what to try next
    if README.is_file():
        shown = re.search(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
        assert without_figures(shown) in without_figures(result.stdout)
    assert [path.name for path in elsewhere.iterdir()] == ["snows-demo"]
    report = json.loads((elsewhere / "snows-demo/snows_config.json").read_text())
    assert abs(report["pruned"]["top1"] - report["dense"]["top1"]) < 1
    assert report["fidelity"]["pruned"]["divergence"] < report["fidelity"]["masked"]["divergence"]
    again = run("demo")
    assert again.code == 1
    assert "snows-demo exists and is not empty" in again.err


def test_error(elsewhere: Path) -> None:
    result = snows_hf("prune", "nobody/nothing", "--pattern", "2:4", cwd=elsewhere)
    assert (result.returncode, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0] == "Loading nobody/nothing"
    assert lines[1].startswith("Error: Model nobody/nothing is no folder here")
    assert len(lines) == 3
    assert list(elsewhere.iterdir()) == []
