"""What an effort changes, and what is said of its time before the work begins."""

import pytest
import tiny

from snows_hf.adapters import build_chain
from snows_hf.jobs import prune as job
from snows_hf.method import estimate
from snows_hf.runtime.memory import Images, Shelf
from snows_hf.runtime.run import Run
from snows_hf.settings import EFFORTS, LARGE_CNNS, PruneConfig, settings_for


def work(config: PruneConfig, batches: int = 2) -> int:
    """Curvature products that a prune of one layer may take."""
    return (config.sweeps * config.steps_of_a_layer(batches) + config.joint_steps) * config.solver.cg_max_iter


@pytest.mark.parametrize("family", ["vit", "cifar_resnet", "resnet", "mobilenet"])
@pytest.mark.parametrize("pattern", ["2:4", "0.7", "mlp:0.5", "mlp:0.5+2:4"])
def test_more_effort_is_more_work(family, pattern):
    """Steps, or views where layers are fitted already."""
    quick, standard, best = (settings_for(effort, family, pattern) for effort in ("quick", "standard", "best"))
    if family == "vit" or (family in LARGE_CNNS and pattern == "mlp:0.5"):
        assert work(best) == 0 and quick.views < standard.views < best.views
    else:
        assert 0 < work(quick) < work(standard) < work(best)


def test_no_effort_but_the_papers_own_changes_the_masks():
    for family in EFFORTS["standard"]:
        assert len({settings_for(effort, family, "2:4").mask for effort in ("quick", "standard", "best")}) == 1


@pytest.mark.parametrize("pattern", ["0.7", ".7", "mlp:0.5+0.7", "2:4", "1:4,2:4,dense"])
def test_alps_chooses_the_zeros_of_vits(pattern):
    """But where the user says how layers share them: by its scores, which ALPS has none of."""
    assert settings_for("standard", "vit", pattern).mask == "alps" != settings_for("paper", "vit", pattern).mask
    if ":" not in pattern:
        assert settings_for("standard", "resnet", pattern).mask == "magnitude"
        assert settings_for("standard", "vit", pattern, {"allocation": "global"}).mask == "magnitude"
        assert settings_for("standard", "vit", pattern, {"allocation": "uniform"}).mask == "alps"


def test_no_step_is_taken_where_alps_has_fitted_the_layers():
    for effort in ("quick", "standard", "best"):
        for mask in ({}, {"mask": "alps"}):
            assert settings_for(effort, "vit", "2:4", mask).sweeps == 0
            assert settings_for(effort, "vit", "0.7", mask).sweeps == 0
        others = [("vit", "2:4", {"mask": "sparsegpt"}), ("vit", "0.7", {"mask": "wanda"}), ("cifar_resnet", "0.7")]
        assert all(settings_for(effort, *other).sweeps == 1 for other in others)
    assert settings_for("quick", "vit", "2:4", {"sweeps": 2}).sweeps == 2


@pytest.mark.parametrize("family, steps", [("cifar_resnet", [15, 30, 120]), ("mobilenet", [8, 24, 60])])
def test_cnns_take_joint_steps_alone_after_a_fit(family, steps):
    """From masks that nothing was fitted for the sweep stays."""
    found = [settings_for(effort, family, "2:4") for effort in ("quick", "standard", "best")]
    assert [each.joint_steps for each in found] == steps and not any(each.sweeps for each in found)


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit"])
def test_where_units_go_more_effort_is_more_views_but_in_cifars_resnets(family: str) -> None:
    found = [settings_for(effort, family, "channels:0.5") for effort in ("quick", "standard", "best")]
    assert [each.views for each in found] == [1, 4, 16]
    assert not any(each.sweeps or each.joint_steps for each in found)
    assert [each.fit_between for each in found] == [False, False, family == "vit"]
    assert settings_for("standard", "cifar_resnet", "channels:0.5").joint_steps == 30
    assert settings_for("standard", family, "channels:0.5+2:4") == settings_for("standard", family, "2:4").updated(
        pattern="channels:0.5+2:4", biases=True, targets="dense"
    )
    assert settings_for("standard", family, "channels:0.25").sweeps == 0
    assert settings_for("standard", family, "2:4", {"mask": "magnitude"}).sweeps == 1
    for pattern, budget in (("channels:0.25", "flops"), ("0.7", "weights")):
        assert settings_for("standard", family, pattern, {"allocation": "sensitivity"}).budget == budget


@pytest.mark.parametrize("told", [True, False])
def test_what_a_quick_prune_would_take_is_said_where_it_is_less_by_far(monkeypatch, told):
    """To one that is quick itself there is none to compare with."""
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    monkeypatch.setattr(estimate, "REPEATED", 0.1)
    monkeypatch.setattr(job, "LONG", 0.0)
    model, said = tiny.transformers_vit(), []
    masks, images = tiny.magnitude_masks(model), Images(Shelf())
    images.append(tiny.images(24))
    best, quick = (settings_for(name, "vit", "2:4", {"mask": "wanda", "samples": 24}) for name in ("best", "quick"))
    given = (best, quick) if told else (quick, None)
    job.tell_estimate(Run(on_stage=said.append), build_chain(model), images, masks, *given)
    assert len(said) == 1 and said[0].startswith("The layers will take about ")
    assert ("; with --effort quick about " in said[0]) == told


def test_a_quick_prune_is_timed_with_the_batches_that_fit(monkeypatch):
    """Its own are larger, and more images than fit may end the process."""
    timed = []
    monkeypatch.setattr(job, "LONG", 0.0)
    monkeypatch.setattr(job, "estimated_seconds", lambda *given: timed.append(given[-1]) or 100.0)
    model, images = tiny.transformers_vit(), Images(Shelf())
    images.append(tiny.images(12))
    config, quick = (settings_for(name, "vit", "2:4", {"mask": "wanda"}) for name in ("standard", "quick"))
    config = config.updated(batch_size=5, factor_entries=2**16)
    job.tell_estimate(Run(), build_chain(model), images, tiny.magnitude_masks(model), config, quick)
    assert [(each.batch_size, each.solver.factor_entries) for each in timed] == 2 * [(5, 2**16)]
