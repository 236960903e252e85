"""README and docs: figures are those of docs/results.md, links lead somewhere, and the front page is short."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from snows_hf import __version__
from snows_hf.masks.criteria import CRITERIA


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
GUIDE = ("README", "your-model", "patterns", "masks", "devices", "hub", "limits", "measuring")
"""Pages that repeat figures of others."""

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the repository")


@pytest.fixture(scope="module", autouse=True)
def scripts_of_the_docs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(DOCS), *sys.path])
        yield


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_table_is_that_of_the_results() -> None:
    from figures import README, with_table

    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make figures`"


def test_the_pictures_are_those_of_the_results() -> None:
    from pictures import PICTURES, PLACE, digest, drawn

    assert {path.stem for path in PLACE.iterdir()} == set(PICTURES)
    for name in PICTURES:
        with drawn(name) as figure:
            assert digest(figure) in (PLACE / f"{name}.svg").read_text(), f"{name}: run `make figures`"


@pytest.mark.parametrize("name", GUIDE)
def test_figures_stand_in_the_results(name: str) -> None:
    page = next(page for page in PAGES if page.stem == name)
    known = numbers(DOCS / "results.md") | numbers(DOCS / "structured.md") | numbers(DOCS / "coverage.md")
    assert numbers(page) <= known


def numbers(page: Path) -> set[str]:
    """Numbers with a decimal point in a page's text, outside of code, links and the table that has its own test."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"≥ 3\.\d+|```.*?```|<!-- made by .*?<!-- end -->", "", text, flags=re.DOTALL)
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune" in (tmp_path / "site/api.html").read_text(encoding="utf-8")


def test_the_table_of_criteria_is_whole() -> None:
    table = (DOCS / "masks.md").read_text(encoding="utf-8").partition("|---|---|---|\n")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.split(" | ")[0])}
    assert named == CRITERIA.keys()


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version, date = re.search(
        r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    ).groups()
    assert (str(citation["version"]), str(citation["date-released"])) == (version, date)
    assert version == __version__
