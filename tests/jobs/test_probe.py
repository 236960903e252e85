"""Features against the libraries' own, the fit against scikit-learn's, intervals against scipy's and a bootstrap."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, variants
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature
from embedded import DIGITS
from PIL import Image
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import DeiTForImageClassificationWithTeacher

from snows_hf import probe
from snows_hf.adapters.outputs import logits_of
from snows_hf.data.images import ImageSource, describe_rows
from snows_hf.errors import AdapterError, ConfigError, DataError
from snows_hf.jobs.probe import (
    STRENGTHS,
    choose_strength,
    classes_between,
    extract_features,
    find_classifiers,
    fit_and_score,
    fit_logistic,
    paired,
    standardisation,
    wilson,
)
from snows_hf.runtime.run import Run


SOURCE = ImageSource("d", "train", None, "image", "label", None)


def clusters(n: int, seed: int, classes: int = 6, width: int = 10) -> tuple[Tensor, Tensor]:
    """Overlapping clusters with features of very different scales."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    x = centres[y] + 0.8 * torch.randn(n, width, generator=generator)
    return x * 10.0 ** torch.arange(-2, width - 2) + 5, y


@pytest.mark.parametrize("name", variants())
def test_features_are_what_the_classifier_reads(name: str) -> None:
    case = BY_NAME[name]
    model, images = case.model(), case.images(3)
    batches = [(images[:2], torch.tensor([4, 1])), (images[2:], torch.tensor([0]))]
    x, y = extract_features(Run(), model, batches, SOURCE)
    assert y.tolist() == [4, 1, 0]
    heads = find_classifiers(model, images)
    with torch.no_grad():
        logits = sum(head(part) for head, part in zip(heads, x.chunk(len(heads), 1), strict=True)) / len(heads)
        torch.testing.assert_close(logits, logits_of(model, images), atol=1e-4, rtol=1e-4)
        if hasattr(model, "forward_head"):
            expected = model.forward_head(model.forward_features(images), pre_logits=True)
            expected = torch.cat(expected, 1) if isinstance(expected, tuple) else expected
            if len(heads) == 1:
                torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
        if isinstance(model, DeiTForImageClassificationWithTeacher):
            hidden = model.base_model(images).last_hidden_state
            torch.testing.assert_close(x, hidden[:, :2].flatten(1), atol=1e-4, rtol=1e-4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(AdapterError, match="Linear"):
        find_classifiers(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
def test_fit_against_scikit_learn(strength: float) -> None:
    x, y = clusters(200, 0)
    scaler = StandardScaler().fit(x.double())
    shift, scale = standardisation(x.double())
    standard = (x.double() - shift) / scale
    torch.testing.assert_close(standard, torch.from_numpy(scaler.transform(x.double())))
    weight, bias = fit_logistic(standard, y, 6, strength)
    oracle = LogisticRegression(C=1 / (len(y) * strength), tol=1e-8, max_iter=10_000).fit(standard, y)
    expected = torch.from_numpy(oracle.decision_function(standard))
    got = standard @ weight + bias
    torch.testing.assert_close(got.softmax(1), expected.softmax(1), atol=2e-3, rtol=0)

    def objective(logits: Tensor, weight: Tensor) -> float:
        return float(F.cross_entropy(logits, y) + strength / 2 * weight.square().sum())

    assert objective(got, weight) <= objective(expected, torch.from_numpy(oracle.coef_)) + 1e-6


def test_probe_against_scikit_learn_from_end_to_end() -> None:
    (x, y), (x_test, y_test) = clusters(300, 1), clusters(400, 2)
    y, y_test = 10 * y, 10 * y_test  # any whole numbers
    hits, facts = fit_and_score(x, y, x_test, y_test, seed=0)
    scaler = StandardScaler().fit(x)
    oracle = LogisticRegression(C=1 / (len(y) * facts["strength"]), max_iter=1000).fit(scaler.transform(x), y)
    expected = torch.from_numpy(oracle.predict(scaler.transform(x_test))) == y_test
    assert (hits != expected).sum() <= 1
    assert facts["strength"] in STRENGTHS
    assert facts["features"] == 10
    again = fit_and_score(x, y, x_test, y_test, seed=0)
    assert torch.equal(hits, again[0])
    assert facts == again[1]


def test_the_strength_is_the_best_on_held_out_images() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (80,), generator=generator)
    x = torch.randn(80, 200, generator=generator)  # more features than images, of which one matters
    x[:, 0] += 2.0 * y
    shift, scale = standardisation(x[:40])
    tops = []
    for strength in STRENGTHS:
        weight, bias = fit_logistic((x[:40] - shift) / scale, y[:40], 2, strength)
        tops.append(int((((x[40:] - shift) / scale @ weight + bias).argmax(1) == y[40:]).sum()))
    found = choose_strength(x[:40], y[:40], x[40:], y[40:], 2)
    assert tops[STRENGTHS.index(found)] == max(tops)
    assert STRENGTHS.index(found) == tops.index(max(tops))


def test_constant_features_do_no_harm() -> None:
    x = torch.tensor([[1.0, 0.0, 7.0], [2.0, 0.0, 7.0], [3.0, 0.0, 7.0]])
    shift, scale = standardisation(x)
    assert torch.isfinite((x - shift) / scale).all()
    assert scale[1:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("hits, n", [(0, 10), (10, 10), (597, 597), (123, 2000), (1, 3)])
def test_wilson_against_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_paired_interval_against_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2000, generator=generator) < 0.3
    hits = reference ^ (torch.rand(2000, generator=generator) < 0.1)
    gains = hits.double() - reference.double()
    drawn = torch.randint(2000, (4000, 2000), generator=generator)
    bootstrap = 100 * gains[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert paired(hits, reference) == pytest.approx(bootstrap.tolist(), abs=0.15)
    low, high = paired(reference, reference)
    assert low < 0 < high


def test_classes_are_matched_by_name() -> None:
    def source(names: list[str]) -> ImageSource:
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"image": [Image.new("RGB", (1, 1))], "label": [0]}, features)
        return describe_rows("d", "test", rows)

    assert classes_between(source(["cat", "dog"]), source(["dog", "cat"]), torch.tensor([0, 1, 1])).tolist() == [
        1,
        0,
        0,
    ]
    assert classes_between(SOURCE, source(["dog", "cat"]), torch.tensor([0, 7])).tolist() == [0, 7]
    with pytest.raises(DataError, match="matched"):
        classes_between(source(["cat", "cow"]), source(["dog", "cat", "pig"]), torch.tensor([0]))
    with pytest.raises(DataError, match="outside"):
        classes_between(SOURCE, source(["dog", "cat"]), torch.tensor([0, -1]))


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="No model"):
        probe([], str(DIGITS))
    with pytest.raises(DataError, match="one class"):
        fit_and_score(torch.randn(4, 2), torch.ones(4), torch.randn(1, 2), torch.ones(1), 0)
