"""A pattern for a speed: the search on latencies that are given, and a prune from a speed to a checkpoint."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedded import DIGITS, VIT

from snows_hf import inspect, load, prune, report as page_of
from snows_hf.adapters.widths import Width
from snows_hf.errors import ConfigError
from snows_hf.jobs.faster import ABOVE, PROBES, Speed, loss_of, not_beaten, patterns_of, search, search_all
from snows_hf.runtime.memory import Images, Shelf
from snows_hf.runtime.run import Progress, Run


FASTER = import_module("snows_hf.jobs.faster")
QUICK: dict[str, Any] = {"data": str(DIGITS), "samples": 40, "k": 1, "joint_steps": 1, "views": 1, "mask": "magnitude"}

SHARES = [f"mlp:{i / 96:.4g}" for i in range(1, 96)]


def linear(pattern: str, of_mlps: float = 0.6) -> float:
    """A network that spends this part of its time in MLPs, which gets shorter as their units go."""
    return 1 / (1 - of_mlps * float(pattern.partition(":")[2]))


@pytest.mark.parametrize("asked", [1.05, 1.2, 1.5, 2.0, 2.4])
@pytest.mark.parametrize("bent", [False, True])
def test_the_search_ends_just_above_what_was_asked(asked: float, bent: bool) -> None:
    def ratio(pattern: str) -> float:
        return 1 + (linear(pattern) - 1) ** 2 if bent else linear(pattern)

    found = search(SHARES, ratio, asked)
    assert found.found is not None and asked <= found.found.ratio == ratio(found.found.pattern)
    assert found.found.ratio <= asked * (1 + ABOVE) or found.found.pattern == next(
        p for p in SHARES if ratio(p) >= asked
    )
    assert len(found.timed) <= (PROBES if bent else 4)
    assert found == search(SHARES, ratio, asked)


def test_shares_that_no_configuration_says_are_passed_over() -> None:
    said = {"mlp:0.25", "mlp:0.5", "mlp:0.75"}

    def ratio(pattern: str) -> float | None:
        return linear(pattern) if pattern in said else None

    found = search(SHARES, ratio, 1.3)
    assert found.found is not None and found.found.pattern == "mlp:0.5"
    assert {speed.pattern for speed in found.timed} <= said
    assert search(SHARES, lambda pattern: None, 1.3).timed == []


def test_a_speed_that_no_mix_reaches_is_refused_with_the_fastest() -> None:
    slow, fast = (lambda pattern: linear(pattern, 0.2)), (lambda pattern: linear(pattern, 0.5))

    def ratio(pattern: str) -> float:
        return (fast if "heads" in pattern else slow)(pattern.partition("+")[0])

    mixes = [SHARES, [f"{pattern}+heads:0.5" for pattern in SHARES]]
    with pytest.raises(ConfigError, match=r"--faster 3: .* is 1\.98 times as fast, mlp:0\.9896\+heads:0\.5\."):
        search_all(Run(), mixes, ratio, 3)
    found = search_all(Run(), mixes, ratio, 1.5).facts
    assert [speed["pattern"].partition("+")[2] for speed in found["found"]] == ["heads:0.5"]
    assert {"mlp:0.9896", "mlp:0.9896+heads:0.5"} <= {speed["pattern"] for speed in found["timed"]}


def test_what_loses_more_of_everything_is_not_compared() -> None:
    found = [Speed("mlp:0.6", 1.5), Speed("mlp:0.6+heads:0.5", 1.9), Speed("mlp:0.3+heads:0.5", 1.5)]
    found += [Speed("mlp:0.4+heads:0.5", 1.6), Speed("heads:0.5", 1.6), Speed("mlp:0.6", 1.5)]
    assert [speed.pattern for speed in not_beaten(found)] == ["mlp:0.6", "heads:0.5"]


def test_shares_are_of_whole_units() -> None:
    widths = [
        Width("a", "mlp", 96, (), (), ()),
        Width("a", "heads", 3, (), (), ()),
        Width("b", "heads", 6, (), (), ()),
    ]
    found = patterns_of({"mlp": 1, "heads": 2 / 3}, widths, range(1, 96))
    assert found[0] == "mlp:0.2604+heads:0.3333"  # 25 of 96: of less no head would go
    assert found[-1] == "mlp:0.9896+heads:0.6667"
    assert {pattern.partition("+")[2] for pattern in found} == {"heads:0.3333", "heads:0.6667"}
    assert patterns_of({"heads": 1}, widths, range(1, 96)) == ["heads:0.3333", "heads:0.6667"]


def test_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    images, dense, smaller = (torch.randn(8, 5, generator=generator) for _ in range(3))
    models = (lambda x: {"features": x, "logits": dense}), (lambda x: {"features": x, "logits": smaller})
    found = loss_of(*models, images, classifier=True)
    expected = F.kl_div(smaller.log_softmax(1), dense.softmax(1), reduction="batchmean")
    assert (found["by"], found["loss"]) == ("divergence", pytest.approx(float(expected)))
    found = loss_of(*models, images, classifier=False)
    assert (found["by"], found["loss"]) == ("error", pytest.approx(float((smaller - dense).norm() / dense.norm())))


def test_the_first_images_of_some() -> None:
    images, chunks = Images(Shelf(1e9)), torch.arange(7.0).view(7, 1, 1, 1).split(3)
    for chunk in chunks:
        images.append(chunk)
    for count in (1, 3, 5, 7):
        first = images.first(count)
        assert len(first) == count and first[0:count].flatten().tolist() == list(range(count))
        assert [len(part) for part in first.split(4)] == ([count] if count <= 4 else [4, count - 4])


@pytest.mark.slow
def test_a_model_that_is_so_many_times_as_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed for real."""
    monkeypatch.setattr(import_module("snows_hf.jobs.bench"), "SECONDS", 0.02)
    out, said = tmp_path / "out", list[str]()
    result = prune(
        str(VIT), faster=1.1, faster_batch=64, output=out, eval_data=str(DIGITS), on_stage=said.append, **QUICK
    )
    report, faster = result.report, result.report["faster"]
    assert (faster["asked"], faster["batch"], faster["dtype"]) == (1.1, 64, "float32")
    chosen = min(faster["choices"], key=lambda choice: choice["loss"])
    assert chosen["pattern"] == report["pattern"] == report["settings"]["pattern"]
    assert chosen["ratio"] == faster["measured"] >= 1.1
    assert all(choice["ratio"] >= 1.1 and choice["by"] == "divergence" for choice in faster["choices"])
    assert {"pattern": chosen["pattern"], "ratio": chosen["ratio"]} in faster["timed"]
    for speed in faster["timed"]:
        assert any(line.startswith(f"{speed['pattern']}: {speed['ratio']:.2f} times as fast") for line in said)

    found = inspect(out)
    assert found["pattern_ok"] and found["pattern"] == report["pattern"]
    assert found["faster"] == {key: faster[key] for key in ("asked", "measured", "batch", "dtype", "hardware")}
    card = " ".join((out / "README.md").read_text().split())
    assert f"1.1 times as fast as the base model: {faster['measured']:.2f} times was measured" in card
    assert "64 images at a time in float32" in card
    page = Path(page_of(out)["html"]).read_text()
    assert f"<td>{chosen['pattern']} (chosen)</td>" in page and "as fast as the dense model" in page

    same = prune(str(VIT), report["pattern"], output=tmp_path / "same", **QUICK)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert same.report["faster"] is None and inspect(tmp_path / "same")["faster"] is None


Ratio = Callable[[str], float | None]


def given(run: Run, subject: object, batch: int) -> Ratio:
    """Latencies as if MLPs took half of the time, and what heads compute a quarter."""
    parts = {"mlp": 0.5, "ranks": 0.25}

    def ratio(pattern: str) -> float:
        pairs = (part.split(":") for part in pattern.split("+"))
        return 1 / (1 - sum(parts[name] * float(share) for name, share in pairs))

    return ratio


def never(*arguments: object) -> Ratio:
    raise AssertionError("timed again")


class BrokenOffError(Exception):
    pass


def at(stage: str) -> Callable[[Progress], None]:
    """Something to send progress to, which breaks the run off at a stage."""

    def break_off(progress: Progress) -> None:
        if progress.stage == stage:
            raise BrokenOffError

    return break_off


@pytest.mark.slow
def test_a_prune_that_is_broken_off_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before patterns are compared, and with the units of the chosen one."""
    monkeypatch.setattr(FASTER, "timer", given)
    out, asked = tmp_path / "out", {"faster": 1.3, **QUICK}
    expected = prune(str(VIT), output=tmp_path / "whole", **asked).report
    assert len(expected["faster"]["choices"]) > 1

    with pytest.raises(BrokenOffError):
        prune(str(VIT), output=out, on_progress=at("Comparing patterns"), **asked)
    monkeypatch.setattr(FASTER, "timer", never)
    with pytest.raises(BrokenOffError):
        prune(str(VIT), output=out, on_progress=at("Layers"), **asked)
    monkeypatch.setattr(FASTER, "loss_of", never)
    report = prune(str(VIT), output=out, **asked).report
    assert report["resumed"] and report["faster"] == expected["faster"] and report["pattern"] == expected["pattern"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_another_speed_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FASTER, "timer", given)
    with pytest.raises(BrokenOffError):
        prune(str(VIT), output=tmp_path / "out", faster=1.3, on_progress=at("Comparing patterns"), **QUICK)
    with pytest.raises(ConfigError, match=r"settings.pattern was '--faster 1.3 .*' and is '--faster 1.4 "):
        prune(str(VIT), output=tmp_path / "out", faster=1.4, **QUICK)


@pytest.mark.slow
def test_the_dense_model_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing and comparing leave its bits, and its accuracy."""
    monkeypatch.setattr(FASTER, "timer", given)
    measured = {"eval_data": str(DIGITS), "update": False, **QUICK}
    found = prune(str(VIT), faster=1.3, **measured).report
    plain = prune(str(VIT), found["pattern"], **measured).report
    assert all(found[key] == plain[key] for key in ("dense", "masked", "fidelity", "units"))
    assert load(str(VIT)).model.config.num_attention_heads == 4
