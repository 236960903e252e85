"""The fault table of docs/reliability.md names tests that exist."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/reliability.md"


@pytest.mark.skipif(not TABLE.is_file(), reason="needs the repository")
def test_every_fault_has_a_test() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| fault")]
    assert len(rows) >= 60
    for row in rows:
        path, name = re.fullmatch(r"\| .+ \| .+ \| `(tests/\S+\.py)::(\w+)` \|", row).groups()
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), row
