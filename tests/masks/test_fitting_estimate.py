"""How long fitted layers will take, as it is told before the work begins."""

import time
from pathlib import Path

import pytest
import tiny

from snows_hf.adapters import build_chain
from snows_hf.adapters.widths import widths_of
from snows_hf.jobs.subject import weights_of
from snows_hf.masks import estimate
from snows_hf.masks.aims import Fit, aim_of, halfway_aims
from snows_hf.masks.evidence import Evidence
from snows_hf.masks.scores.alps import alps, decide
from snows_hf.masks.scores.obc import Kept, decide_for, layer_by_layer
from snows_hf.masks.units import choose_units
from snows_hf.patterns import Full, parse_pattern
from snows_hf.runtime.journal import Journal
from snows_hf.runtime.run import Run


def evidence(said: list[str], views: int = 1, count: int = 48, folder: Path | None = None) -> Evidence:
    chain = build_chain(tiny.transformers_vit())
    config = tiny.config(pattern="2:4", mask="alps", views=views)
    run = Run(on_stage=said.append, journal=Journal(folder))
    return Evidence(weights_of(chain), parse_pattern("2:4"), config, chain, tiny.images(count), run=run)


def test_an_estimate_is_of_the_size_of_the_truth(monkeypatch):
    """What other programs do at the same time is why the bounds are wide."""
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    given = evidence([], views=2)
    before = {name: weight.clone() for name, weight in given.weights.items()}

    def settle(few: Evidence, fit: Fit) -> Kept:
        return decide_for(few, decide, aim_of(few, fit), zeros=0)

    times = estimate.estimated_times(given, settle)
    assert list(times.of_layers(2)) == list(given.fitted)
    assert all(weight.equal(before[name]) for name, weight in weights_of(given.network).items())
    started = time.perf_counter()
    layer_by_layer(given, decide, halfway_aims)
    took = time.perf_counter() - started
    assert took / 4 < times.probing + sum(times.of_layers(2).values()) < 4 * took


@pytest.mark.parametrize("views", [1, 4])
def test_it_is_said_before_the_layers_and_not_once_more_where_they_go_on(monkeypatch, tmp_path, views):
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    said = []
    given = evidence(said, views, folder=tmp_path)
    alps(given)
    assert len(said) == 1 and said[0].startswith("The masks will take about ")
    assert ("with --effort quick" in said[0]) == (views > 1)
    alps(given)
    assert len(said) == 1


@pytest.mark.parametrize("repair", [True, False])
def test_repairs_of_units_are_estimated_where_there_are_any(monkeypatch, repair):
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    said, chain = [], build_chain(tiny.transformers_vit())
    config = tiny.config(pattern="mlp:0.5", units="magnitude", repair=repair)
    given = Evidence({}, Full(), config, chain, tiny.images(48), run=Run(on_stage=said.append))
    keep = {width: width.units // 2 for width in widths_of(chain) if width.kind == "mlp"}
    choose_units(given, keep)
    assert [line.split(" about ")[0] for line in said] == ["The repairs will take"] * repair


def test_short_work_is_not_estimated():
    said = []
    alps(evidence(said, count=12))
    assert said == []
