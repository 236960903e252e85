"""What people are shown: tables on terminals of any width, and what is true of the layers."""

import io
from typing import Any

import pytest
from rich.console import Console

from snows_hf.cli.prune import show_solves
from snows_hf.cli.report import show_models
from snows_hf.cli.sink import Sink


COLUMNS = {"layer": "{name}", "weights": "{weights:,}", "loss": "{loss:.4f}"}
ROWS = [
    {"name": "vit.encoder.layer.0.attention.attention.query", "weights": 123_456_789, "loss": 0.0123},
    {"name": "head", "weights": 1, "loss": None},
]
COMPARED = {
    "name": "vit-base-patch16-224-2to4", "pattern": "2:4", "dense": 81.43, "masked": 71.25, "pruned": 79.86,
    "drop": 1.57, "retrained": True, "eval_data": {"name": "timm/mini-imagenet", "split": "test"}, "loss_left": 0.314,
    "samples": 512, "products": 123_456, "seconds": 1234.0, "size": {"packed": 190.12e6, "dense": 346.29e6},
    "flops": {"reduction": 1.97},
}  # fmt: skip


def screen(width: int) -> tuple[Sink, io.StringIO]:
    """A sink whose stdout is a terminal of this width, and what is written there."""
    sink, written = Sink(), io.StringIO()
    sink.out = Console(
        file=written, force_terminal=True, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    return sink, written


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_numbers_are_never_broken(width: int) -> None:
    sink, written = screen(width)
    show_models(sink, [COMPARED, COMPARED | {"dense": None, "eval_data": None, "loss_left": None}])
    shown = written.getvalue()
    numbers = "2:4", "81.43", "71.25", "79.86 (retrained)", "1.57", "31.4", "512", "123456", "1234", "1/1.97"
    for text in (*numbers, "190.12 of 346.29", "timm/mini-imagenet (test)", "loss left (%)", "MB, packed"):
        assert text in shown, text
    assert ("┃" in shown) == (width > 60), "a box only where it fits"


def test_names_fold_where_numbers_leave_room() -> None:
    sink, written = screen(60)
    sink.table(COLUMNS, ROWS, "Losses")
    lines = written.getvalue().splitlines()
    assert {len(line) for line in lines[1:]} <= {len(lines[1])} and len(lines[1]) <= 60
    assert "123,456,789" in written.getvalue() and "0.0123" in written.getvalue()
    assert ROWS[0]["name"] not in written.getvalue()
    assert ROWS[0]["name"] in "".join(line.split("│")[1].strip() for line in lines if "│" in line)


def test_rows_become_lines_where_nothing_else_does() -> None:
    sink, written = screen(30)
    sink.table(COLUMNS, ROWS, "Losses")
    first, second = (row["name"] for row in ROWS)
    expected = f"Losses\n{first}\n  weights: 123,456,789\n  loss: 0.0123\n{second}\n  weights: 1\n"
    assert written.getvalue() == expected


def test_a_real_terminal_of_sixty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """``COLUMNS`` is what a shell says of its terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Sink().out.width == 60


def solve(name: str, status: str, sweep: int = 1, parameters: tuple[str, ...] | None = None, **more: Any) -> dict:
    facts = {"name": name, "status": status, "sweep": sweep, "parameters": parameters or (f"{name}.weight",)}
    return facts | {"remedy": f"Remedy of {status}.", "steps": 4, "rejected_steps": 0} | more


BOTH = ("a.weight", "b.weight")
SOLVES = [
    ([solve("a", "improved"), solve("b", "not_improved")], ["Not improved: b: not_improved. Remedy of not_improved."]),
    (
        [solve("a", "improved"), solve("b", "not_improved"), solve("all layers", "improved", 2, BOTH)],
        ["Not improved: b: not_improved. The joint solve has moved it since."],
    ),
    (
        [solve("b", "non_finite"), solve("all layers, thinning out", "thinned_out", 2, BOTH)],
        ["Not improved: b: non_finite. The joint solve has moved it since."],
    ),
    (
        [solve("a", "improved"), solve("all layers", "non_finite", 2, BOTH, rejected_steps=3)],
        [
            "Not improved: all layers: non_finite. Remedy of non_finite.",
            "Rejected 3 of 4 Newton steps: all layers.",
        ],
    ),
    (
        [solve("b", "not_improved"), solve("all layers", "not_improved", 2, BOTH)],
        [
            "Not improved: b: not_improved. Remedy of not_improved.",
            "Not improved: all layers: not_improved. Remedy of not_improved.",
        ],
    ),
    (
        [solve("a", "not_improved"), solve("b", "improved"), solve("a", "improved", 2), solve("b", "not_improved", 2)],
        [
            "Not improved: a (sweep 1): not_improved. Sweep 2 has moved it since.",
            "Not improved: b (sweep 2): not_improved. Remedy of not_improved.",
        ],
    ),
    (
        [solve("b", "not_improved"), solve("rest", "improved", 2, ("a.weight",))],
        ["Not improved: b: not_improved. Remedy of not_improved."],
    ),
]


@pytest.mark.parametrize(("solves", "expected"), SOLVES)
def test_what_is_said_of_a_layer_is_true_of_the_result(
    solves: list[dict], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show_solves(Sink(), solves)
    assert capsys.readouterr().out.splitlines() == expected
