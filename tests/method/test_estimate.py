"""Times that are told before the work begins."""

import pytest
import tiny

from snows_hf.adapters import build_chain
from snows_hf.method import estimate
from snows_hf.method.cascade import prune_chain
from snows_hf.method.estimate import estimated_seconds, grown, in_words


def test_short_work_is_not_estimated():
    model = tiny.transformers_vit()
    masks = tiny.magnitude_masks(model)
    assert estimated_seconds(build_chain(model), tiny.images(12), 24, masks, tiny.config()) is None


@pytest.mark.parametrize("joint_steps", [0, 3])
def test_an_estimate_is_of_the_size_of_the_truth(monkeypatch, joint_steps):
    """No layer ends early here. What other programs do at the same time is why the bounds are wide."""
    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    monkeypatch.setattr(estimate, "REPEATED", 0.1)
    model, images = tiny.transformers_vit(), tiny.images(48)
    masks, chain = tiny.magnitude_masks(model), build_chain(model)
    settings = {"batch_size": 16, "patience": 99, "joint_steps": joint_steps, "cg_rtol": 0.0, "preconditioner": "gram"}
    config = tiny.config(**settings)
    seconds = estimated_seconds(chain, images[: estimate.MORE], len(images), masks, config)
    assert seconds is not None
    took = sum(report.seconds for report in prune_chain(chain, images, masks, config))
    assert took / 4 < seconds < 4 * took


def test_what_grows_for_few_images_alone_is_found_by_timing_more():
    """A part that 40 images exhaust: 4 and 12 of them foretell three times the truth."""
    timed = []

    def seconds(images):
        timed.append(images)
        return 0.3 + 0.005 * images + 0.02 * min(images, 40)

    assert grown(seconds, 230, steps=60) == pytest.approx(0.3 + 0.005 * 230 + 0.02 * 40)
    assert timed == [4, 12, 36, 108, 230]
    timed.clear()
    assert grown(seconds, 230, steps=2) > 2 * (0.3 + 0.005 * 230 + 0.02 * 40)
    assert timed == [4, 12], "of two steps a third is too many to time"
    timed.clear()
    assert grown(lambda images: 10 * seconds(images), 230, steps=60) > 0
    assert timed == [4, 12], "steps of five seconds keep a processor busy"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "10 seconds"), (44, "40 seconds"), (100, "2 minutes"), (2400, "40 minutes"), (9000, "2.5 hours")],
)
def test_times_in_words_are_rough(seconds, text):
    assert in_words(seconds) == text
