"""Linear probes: what a backbone's features are worth for other classes, dense or sparse (the paper's Figure 5)."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.outputs import logits_of, outputs_of
from ..data.images import CHUNK, ImageSource, check_labels, drawn, label_map, labelled_batches, open_images, to_classes
from ..data.names import Name
from ..data.neighbours import pooled
from ..errors import AdapterError, ConfigError, DataError, NumericsError
from ..hub.load import Checkpoint
from ..hub.tasks import CLASSIFICATION, FEATURES
from ..reports.describe import describe_data
from ..runtime.memory import Tensors, in_parts
from ..runtime.run import Progress, Run
from .request import check_probe
from .subject import listed, load_told


STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(2, -13, -1))
"""Candidates for λ in mean cross-entropy + λ/2 ‖W‖², on standardised features: 10 … 10⁻⁶, half a decade apart."""

PATIENCE = 4
"""Weaker candidates without a gain on the held-out images after which no more are tried: these take longest."""

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def probe(
    models: Name | Sequence[Name],
    data: Name,
    *,
    train_split: str = "train",
    eval_data: Name | None = None,
    test_split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Fits a linear classifier on the frozen features of each model, and measures it on held-out images.

    Features are what enters the model's own classifier, or, without one, its pooled output (else the mean over its
    positions); standardised, and extracted once. The probe is a multinomial logistic regression, its λ chosen on a
    fifth of the training images and the fit repeated on all of them. Every model sees the same images and the same
    split.

    Args:
        models: Hub ids or folders; differences are to the first.
        data: labelled images, whose classes need not be the models'.
        eval_data: labelled images to measure on, of the ``test_split``; None takes ``data``.
        samples: training images to draw; None takes all.
        seed: of the draw, and of the split that chooses λ.
        others: as for :func:`snows_hf.prune`.

    Returns:
        ``models``, a list with ``top1`` in per cent, ``interval`` (Wilson, 95 %), ``difference`` to the first and its
        ``difference_interval`` (paired, 95 %; both None for the first), ``train_top1``, ``strength`` (λ) and
        ``features`` (their number); ``train_images``, ``test_images``, ``classes``, and what was asked for.

    Raises:
        SnowsError: bad settings, no such model or data, or classes that do not match.
    """
    names = listed(models)
    check_probe(data, train_split, eval_data, test_split, samples, seed)
    measured = data if eval_data is None else eval_data
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    train, test = open_images(data, train_split), open_images(measured, test_split)
    check_labels(train, "a probe")
    check_labels(test, "a probe")

    results: list[dict[str, Any]] = []
    hits: list[Tensor] = []
    for name in names:
        checkpoint = load_told(run, name)
        check_features(checkpoint)
        checkpoint.model.to(run.device)
        run.say(f"Extracting its features of {data} ({train_split})")
        few, size = (train, 256) if samples is None else (drawn(train, samples, seed), CHUNK)
        extract = partial(extract_features, run, checkpoint.model, classifier=checkpoint.is_classifier)
        x, y = extract(labelled_batches(few, checkpoint.preprocess, size), train)
        run.say(f"Extracting its features of {measured} ({test_split})")
        batches = labelled_batches(test, checkpoint.preprocess, 256)
        x_test, y_test = extract(batches, test)
        y = to_classes(y, torch.arange(int(y.max()) + 1), train)  # refuses those that stand for no label
        y_test = classes_between(test, train, y_test)
        run.say(f"Fitting the probe on {len(y)} images")
        x, y, x_test, y_test = (part.to(run.device) for part in (x, y, x_test, y_test))
        own, facts = fit_and_score(x, y, x_test, y_test, seed)
        hits.append(own)
        results.append({"model": name} | compared(own, hits[0], first=not results) | facts)
        counts = {"train_images": len(y), "test_images": len(y_test), "classes": len(y.unique())}
    return {
        "models": results,
        **counts,
        "data": describe_data(data, train_split),
        "eval_data": describe_data(measured, test_split),
        "seed": seed,
    }


def compared(hits: Tensor, reference: Tensor, first: bool) -> dict[str, Any]:
    """Top-1 of one model on the test images, and, unless it is the first, how it differs from that."""
    return {
        "top1": 100 * float(hits.double().mean()),
        "interval": wilson(int(hits.sum()), len(hits)),
        "difference": None if first else 100 * float(hits.double().mean() - reference.double().mean()),
        "difference_interval": None if first else paired(hits, reference),
    }


def classes_between(test: ImageSource, train: ImageSource, y_test: Tensor) -> Tensor:
    """The training data's classes of the test data's labels (n,), matched by name where both have names.

    Raises:
        DataError: the classes cannot be matched, or a label is no class.
    """
    if test.class_names is None or train.class_names is None:
        return to_classes(y_test, torch.arange(int(y_test.max()) + 1), test)
    return to_classes(y_test, label_map(test.class_names, train.class_names, len(train.class_names), test.name), test)


def check_features(checkpoint: Checkpoint) -> None:
    """
    Raises:
        ConfigError: a model whose outputs are neither classes nor features.
    """
    if checkpoint.task not in (CLASSIFICATION, FEATURES) and checkpoint.tower is None:
        raise ConfigError(
            f"{checkpoint.source} ({type(checkpoint.model).__name__}) is for {checkpoint.task}.",
            "A probe reads what enters a classifier, or the features of a model without one.",
        )


@torch.no_grad()
def extract_features(
    run: Run, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], source: ImageSource, classifier: bool = True
) -> tuple[Tensor, Tensor]:
    """What enters the classifier, or comes out of a model without one, of batches of pixel values (b, 3, height,
    width) and labels (b,) from ``source``: features (n, d) in float32 on the CPU, those of several classifiers side by
    side, and labels (n,).

    Raises:
        AdapterError: the model's logits do not come from a Linear layer.
        DataError: no images.
        NumericsError: a feature is not finite.
    """
    parameter = next(model.parameters())
    heads: list[nn.Linear] = []
    entered: dict[nn.Module, Tensor] = {}
    features, labels = [], []

    def extract(state: Tensors) -> Tensors:
        outputs = outputs_of(model, state[0].to(parameter.device, parameter.dtype))
        return (torch.cat([entered[head] for head in heads], dim=1) if heads else pooled(outputs),)

    with ExitStack() as hooks:
        for pixels, some in run.track(batches, f"Batches of {source.name} ({source.split})"):
            if classifier and not heads:
                heads = find_classifiers(model, pixels[:1].to(parameter.device, parameter.dtype))
                for head in heads:
                    note = head.register_forward_pre_hook(lambda module, given: entered.update({module: given[0]}))
                    hooks.enter_context(note)
            features.append(in_parts(extract, (pixels,))[0].float().cpu())
            labels.append(some)
    if not features:
        raise DataError(f"Data {source.name} ({source.split}) is empty.")
    x = torch.cat(features)
    if not torch.isfinite(x).all():
        raise NumericsError(
            f"Features of {type(model).__name__} on {source.name} ({source.split}) are NaN or infinite.",
            "Save the checkpoint in float32, or check it with `snows-hf eval`.",
        )
    return x, torch.cat(labels)


@torch.no_grad()
def find_classifiers(model: nn.Module, pixels: Tensor) -> list[nn.Linear]:
    """The Linear layers that the logits come from, found by running the model: the last whose output is the logits, or
    all those whose outputs have them as their mean (distilled DeiT has two).

    Raises:
        AdapterError: there are none.
    """
    outputs: dict[nn.Linear, Tensor] = {}

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                note = module.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
                hooks.enter_context(note)
        logits = logits_of(model, pixels)
    fitting = {module: output for module, output in outputs.items() if output.shape == logits.shape}
    for module, output in reversed(fitting.items()):
        if torch.equal(output, logits):
            return [module]
    if fitting and torch.allclose(torch.stack(list(fitting.values())).mean(0), logits, atol=1e-3, rtol=1e-3):
        return list(fitting)
    raise AdapterError(
        f"The logits of {type(model).__name__} do not come from a Linear layer.",
        "A probe reads what enters the classifier, and needs one.",
    )


def fit_and_score(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Chooses λ on a fifth of the training features, fits on all of them, and classifies the test features.

    They are (n, d), of classes ``y`` (n,), any whole numbers, and (m, d), of classes ``y_test`` (m,); a class that
    ``y`` lacks is never hit.

    Returns:
        Which test images are hit, bool (m,) on the CPU, and facts for the report.

    Raises:
        DataError: fewer than two classes.
    """
    known, classes = y.unique(return_inverse=True)
    if len(known) < 2:
        raise DataError("The probe's training images are all of one class.", "Give more --samples, or other data.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, fitted = order.tensor_split([max(1, round(0.2 * len(x)))])
    strength = choose_strength(x[fitted], classes[fitted], x[held], classes[held], len(known))
    shift, scale = standardisation(x)
    x, x_test = (x - shift) / scale, (x_test - shift) / scale
    weight, bias = fit_logistic(x, classes, len(known), strength)
    train_hits, hits = (known[(part @ weight + bias).argmax(1)] == own for part, own in ((x, y), (x_test, y_test)))
    facts = {"train_top1": 100 * float(train_hits.double().mean()), "strength": strength, "features": x.shape[1]}
    return hits.cpu(), facts


def choose_strength(x: Tensor, y: Tensor, x_held: Tensor, y_held: Tensor, classes: int) -> float:
    """The λ with the highest top-1 on the held-out features; the strongest of equals. Each fit starts from the one
    before, from strong to weak."""
    shift, scale = standardisation(x)
    x, x_held = (x - shift) / scale, (x_held - shift) / scale
    start: tuple[Tensor, Tensor] | None = None
    hits: list[int] = []
    for strength in STRENGTHS:
        start = fit_logistic(x, y, classes, strength, start)
        hits.append(int(((x_held @ start[0] + start[1]).argmax(1) == y_held).sum()))
        if len(hits) - hits.index(max(hits)) > PATIENCE:
            break
    return STRENGTHS[hits.index(max(hits))]


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature (d,); 1 in place of the deviation of a constant one."""
    scale, shift = torch.std_mean(x, dim=0, correction=0)
    return shift, torch.where(scale > 1e-6 * shift.abs().clamp(min=1e-6), scale, 1.0)


def fit_logistic(
    x: Tensor, y: Tensor, classes: int, strength: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: the minimum of mean cross-entropy + strength/2 ‖W‖², bias free.

    (scikit-learn's ``C`` is 1 / (n · strength). benchmarks/probe_solver.py compares the two.)

    Features are ``x`` (n, d), of classes ``y`` (n,) below ``classes``; strength is λ, above 0; weight (d, classes) and
    bias (classes,) begin as zeros unless there is a ``start``.
    """
    weight, bias = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``n`` images, in per cent (Wilson, 1927)."""
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def paired(hits: Tensor, reference: Tensor) -> tuple[float, float]:
    """95 % interval of the difference of two models' top-1 on the same images, in per cent points.

    Wald's interval for paired shares with half an image added to each cell of the 2 × 2 table (Agresti and Min, 2005).
    It is narrower than two separate intervals, since most images are hit or missed by both models.
    Both are bool (m,).
    """
    n = len(hits) + 2
    gained = int((hits & ~reference).sum()) + 0.5
    lost = int((~hits & reference).sum()) + 0.5
    difference = (gained - lost) / n
    half = Z95 * math.sqrt((gained + lost) / n - difference**2) / math.sqrt(n)
    return 100 * (difference - half), 100 * (difference + half)
