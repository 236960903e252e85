"""examples/prune_your_model.ipynb: its code runs, and what it shows is stored with it."""

from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "examples/prune_your_model.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="needs the repository")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_stored(notebook) -> None:
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [*range(1, 9)]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_code_runs(notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where libraries are loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    names: dict[str, object] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
    report = names["report"]
    assert report["masked"]["top1"] < report["pruned"]["top1"]
    assert names["proved"]["pattern_ok"]


@pytest.mark.slow
def test_it_runs_as_a_notebook(notebook, tmp_path: Path) -> None:
    client = NotebookClient(notebook, resources={"metadata": {"path": tmp_path}})
    client.execute()
