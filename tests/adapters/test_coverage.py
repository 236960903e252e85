"""A sample of docs/coverage.md: classes that go the whole way, by the benchmark's own measure."""

import sys
from pathlib import Path

import pytest
from quick import slow


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAMPLE = (
    ("timm", "test_vit"),
    slow(("timm", "test_efficientnet")),
    ("headless", "Dinov2Backbone"),
    ("two towers", "CLIPModel"),
    slow(("timm", "test_mambaout")),
    slow(("timm", "levit_128s")),
    slow(("transformers", "PvtV2ForImageClassification")),
    slow(("dense", "SegformerForSemanticSegmentation")),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "model"), SAMPLE)
def test_a_class_goes_the_whole_way(kind: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "coverage", raising=False)  # the package for lines of code
    from coverage import measure
    from coverage_models import Case
    from coverage_table import fault

    monkeypatch.delitem(sys.modules, "coverage")
    record = {}
    for facts in measure(Case(kind, model, model)):
        record |= facts
    assert not fault(record)
    assert record["share_inner"] > 0.9
