"""Where a job is: lines without a terminal, a bar on one, nothing for --quiet; and a thread that ends with the job."""

import io
import re
import time

import pytest
from rich.console import Console

from snows_hf.cli.sink import Sink
from snows_hf.cli.watch import Watch
from snows_hf.runtime.run import Run


def watched(watch: Watch) -> Run:
    return Run(on_stage=watch.stage, on_progress=watch.progress)


def terminal(sink: Sink) -> io.StringIO:
    """Makes the sink's stderr a terminal, and returns what is written there."""
    screen = io.StringIO()
    sink.err = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    return screen


def test_a_job_that_says_nothing_yields_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(Sink(), quiet=0.2):
        time.sleep(0.7)
    assert capsys.readouterr().err == 3 * "Starting: still at it\n"
    with Watch(Sink(), quiet=0.2) as watch:
        watch.stage("Loading a model")
        time.sleep(0.3)
    assert capsys.readouterr().err == "Loading a model\nLoading a model: still at it\n"


def test_lines_say_where_and_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten parts, a resumed run begins at the fifth: 5 → 7 took 2 s or so, hence 7 → 10 take 3 s or so."""
    with Watch(Sink(), quiet=0.15) as watch:
        run = watched(watch)
        run.tell("Solving", 5, 10, "fc1")
        time.sleep(2.0)
        run.tell("Solving", 7, 10, "fc[2]", "loss 0.1")
        time.sleep(0.4)
        run.tell("Reading", 3, None)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Solving 5/10 fc1, 0:00:00 so far"
    assert any(re.fullmatch(r"Solving 7/10 fc\[2\]: loss 0\.1, about 0:00:0[345] left", line) for line in lines), lines
    assert any(line.startswith("Reading 3, 0:00:0") and line.endswith(" so far") for line in lines), lines


def test_what_each_part_is_thought_to_take_says_how_long_it_will(capsys: pytest.CaptureFixture[str]) -> None:
    """The first of three parts, nine tenths of the time, took 1.8 s: the others take 0.2 s, not 3.6."""
    with Watch(Sink(), quiet=0.15) as watch:
        for part in watched(watch).track("abc", "Solving", 3, str, {"a": 9.0, "b": 0.5, "c": 0.5}):
            time.sleep({"a": 1.8, "b": 0.4, "c": 0.0}[part])
    lines = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert lines and all(re.fullmatch("Solving 1/3 b, about 0:00:0[01] left", line) for line in lines), lines


def test_no_line_while_the_job_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(Sink(), quiet=0.4) as watch:
        for i in range(10):
            watch.stage(str(i))
            time.sleep(0.1)
    assert capsys.readouterr().err.split() == list("0123456789")


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], on_a_terminal: bool) -> None:
    sink = Sink(quiet=True)
    screen = terminal(sink) if on_a_terminal else io.StringIO()
    with Watch(sink, quiet=0.1) as watch:
        watch.stage("Loading")
        watched(watch).tell("Solving", 1, 2)
        time.sleep(0.3)
    assert (*capsys.readouterr(), screen.getvalue()) == ("", "", "")


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    sink = Sink()
    screen = terminal(sink)
    with Watch(sink, quiet=0.1) as watch:
        watch.stage("Loading")
        for i in range(5):
            watched(watch).tell("Solving", i, 5, "[fc]")
            time.sleep(0.2)
    shown = screen.getvalue()
    assert "Loading" in shown and "Solving 3/5 [fc]" in shown and "━" in shown
    assert "still at it" not in shown and " left" not in shown


def test_an_error_leaves_the_terminal_as_it_was() -> None:
    sink = Sink()
    screen = terminal(sink)
    with pytest.raises(RuntimeError, match="broken"), Watch(sink) as watch:
        watched(watch).tell("Solving", 1, 5)
        time.sleep(0.2)
        raise RuntimeError("broken")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert hidden in screen.getvalue()
    assert screen.getvalue().rindex(shown) > screen.getvalue().rindex(hidden)
    assert not watch.bar.live.is_started


def test_an_error_ends_the_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="broken"), Watch(Sink(), quiet=0.1) as watch:
        assert watch.ticker.is_alive()
        raise RuntimeError("broken")
    assert not watch.ticker.is_alive()
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    sink = Sink()
    screen = io.StringIO()
    sink.err = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "dumb"})
    with Watch(sink, quiet=0.1):
        time.sleep(0.25)
    assert "Starting: still at it" in screen.getvalue()
