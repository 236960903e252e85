"""Settings: each is one field, which is its check, its option, its key in a YAML file and its row in docs/settings.md;
and what of it an effort decides; the paper's own settings (Table 7) are one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, field, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .errors import ConfigError


def _number(value: object) -> object:
    """YAML reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _names(value: object) -> object:
    """One name alone, or a list of them."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Number = Annotated[float, BeforeValidator(_number)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
"""What all generators take, also a thousand times and with steps added."""

_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of names"}


def expected(kind: Any, bounds: Any = ()) -> str:
    """What a field takes, in words, from its annotation and the bounds beside it; None, where it may be, unsaid."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return expected(parts[0], (*parts[1:], *bounds))
    if origin in (UnionType, Union):
        return " or ".join(expected(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return f"{', '.join(map(repr, parts[:-1]))} or {parts[-1]!r}"
    limits = [f"{_SIGNS[type(bound)]} {astuple(bound)[0]}" for bound in bounds if type(bound) in _SIGNS]
    return f"{_KINDS[origin or kind]} {' and '.join(limits)}".strip()


def expected_of(setting: FieldInfo) -> str:
    return expected(setting.annotation, setting.metadata)


_CONFIG = ConfigDict(use_attribute_docstrings=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_CONFIG)
class Settings:
    """What settings have in common.

    Raises:
        ConfigError: a name that is no setting, or a value out of range.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, given: Any, validate: Callable[[Any], Self]) -> Self:
        try:
            return validate(given)
        except ValidationError as error:
            raise cls._refusal(error) from None

    @classmethod
    def _refusal(cls, error: ValidationError) -> ConfigError:
        fault, own = error.errors()[0], cls.own()
        if not fault["loc"]:
            return ConfigError(f"Expected {cls.__name__}, got {fault['input']!r}.")
        name = fault["loc"][0]
        name = list(own)[name] if isinstance(name, int) else name
        if name not in own:
            return cls.unknown(name)
        came = "is missing" if fault["type"] == "missing" else f"= {fault['input']!r}"
        return ConfigError(f"Setting {name} {came}: expected {expected_of(own[name])}.")

    @classmethod
    def own(cls) -> dict[str, FieldInfo]:
        """The fields, by name."""
        return dict(cls.__pydantic_fields__)  # type: ignore[attr-defined]  # pydantic's, of every class

    @classmethod
    def known(cls) -> dict[str, FieldInfo]:
        """What a user may set, by name."""
        return cls.own()

    @classmethod
    def unknown(cls, name: object) -> ConfigError:
        return ConfigError(f"Unknown setting {name!r}.", f"Known: {', '.join(sorted(cls.known()))}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def updated(self, **changes: Any) -> Self:
        """A copy with some settings changed.

        Raises:
            ConfigError: a name that is no setting, or a value out of range.
        """
        return replace(self, **changes)


@dataclass(frozen=True, config=_CONFIG)
class SolverConfig(Settings):
    """How one layer is optimised (Algorithms 1 and 2)."""

    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """``gauss-newton`` (positive semi-definite, cheaper) or ``hessian`` (the paper's exact products)."""
    preconditioner: Literal["gram", "none"] = "gram"
    """Of conjugate gradients: ``gram`` (preconditioner.py) or ``none`` (the paper's)."""
    factor_entries: Annotated[int, Ge(1)] = 2**28
    """Most numbers in the preconditioner's factors of one parameter, whose rows are cut into blocks to stay below;
    fewer where memory is short."""
    damping: Annotated[Number, Ge(0)] = 1e-4
    """λ of Eq. 10. Table 7: 1e-4."""
    beta: Annotated[Number, Gt(0), Lt(0.5)] = 1e-5
    """Armijo constant. A.1.3: 1e-5."""
    backtrack: Annotated[Number, Gt(0), Lt(1)] = 0.5
    """Factor between two trial steps of the line search."""
    max_backtracks: Annotated[int, Ge(0)] = 10
    """Trial steps after the first before a step is rejected."""
    passes: Annotated[int, Ge(1)] = 1
    """Passes over the calibration batches."""
    patience: Annotated[int, Ge(1)] = 5
    """Newton steps in a row that may gain less than ``min_gain`` before a layer is done."""
    min_gain: Annotated[Number, Ge(0), Lt(1)] = 0.005
    """Relative decrease of the held-out loss."""
    cg_rtol: Annotated[Number, Ge(0), Lt(1)] = 1e-3
    """Conjugate gradients stop at ‖r‖ ≤ cg_rtol·‖g‖."""
    cg_atol: Annotated[Number, Ge(0)] = 0.0
    """Conjugate gradients stop, too, at ‖r‖ ≤ cg_atol, the paper's test (Table 7: 1e-3 CNN, 5e-4 ViT)."""
    cg_max_iter: Annotated[int, Ge(1)] = 10
    """Most products per Newton step."""
    cg_stall: Annotated[Number, Ge(0)] = 0.0
    """Conjugate gradients stop, too, when the quadratic model stalls (Martens 2010, section 4.4); 0 switches that
    off."""
    average: Annotated[int, Ge(0)] = 0
    """Besides the iterates their mean is judged by the held-out loss, and the best is kept (after Polyak and Juditsky
    1992): the plain mean for so many steps, then an exponential moving average in which each new iterate has one part
    in so many. 0 means none."""


@dataclass(frozen=True, config=_CONFIG)
class PruneConfig(Settings):
    """Everything that decides what a prune does, besides the model and the images."""

    pattern: str
    """``N:M`` (N of M weights kept), a fraction of zeros such as ``0.7``, or a set of which each layer gets one:
    ``1:4,2:4,dense``."""
    k: Annotated[int, Ge(0)] = 5
    """K of Eq. 3: the operations after the layer whose outputs are kept. Values past the last operation mean
    K_max."""
    mask: str = "magnitude"
    """Mask criterion (magnitude, wanda, sparsegpt, alps, …), or a safetensors file of booleans."""
    units: str = "obs"
    """Criterion by which structures choose the units that go: ``obs`` (group OBS), or one of weights, such as
    ``magnitude``, summed over each unit's."""
    repair: bool = True
    """Layers that read a structure's units make up, by least squares, for those that go; with ``obs`` always."""
    fit_dense: bool = True
    """Layers that the pattern does not fit make up for those before them, too, where layers are fitted one after the
    other (masks/aims.py); unless ``layers`` names those to prune."""
    fit_between: bool = False
    """Where units go, the layers between those that read them make up for those before them, too."""
    permute: bool | None = None
    """Put input channels in an order that N:M suits better, where they are free (permutation.py). None: if one N:M
    for all layers keeps less than half of the weights, and the masks do not come from a file."""
    allocation: Literal["global", "uniform", "sensitivity"] = "global"
    """Which layers lose how much of an unstructured sparsity: ``global`` (the lowest scores of all layers
    together), ``uniform`` (every layer the same share) or ``sensitivity`` (allocation.py). A set of patterns
    always goes by sensitivity. Units: all layers alike, or by ``sensitivity`` (unit_budget.py)."""
    sparsity: Annotated[Number, Ge(0), Lt(1)] = 0.0
    """Of a set of patterns, the zeros of all layers together, such as 0.65; 0 where the pattern itself says it."""
    budget: Literal["weights", "flops"] = "weights"
    """What an allocation by sensitivity counts: ``weights``, or ``flops`` (the operations that zeros make
    superfluous, or that go with units, which are what counts there by default)."""
    repair_steps: Annotated[int, Ge(0)] = 1
    """Newton steps that each layer takes before its sensitivity is measured; 0 measures the mask alone."""
    layers: Names = ()
    """Names of the layers to prune, with wildcards; none means all."""
    samples: Annotated[int, Ge(1)] = 512
    """Calibration images, held-out ones included."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per Newton step."""
    curvature_size: Annotated[int, Ge(0)] = 0
    """Images of a step's batch on which curvature products are taken, others in each step (Byrd et al., 2011); value
    and gradient are of all. 0: all of them."""
    views: Annotated[int, Ge(1)] = 1
    """How often layers that are fitted one after the other (masks/aims.py) see each calibration image: as it is,
    mirrored, and then shifted at random, mirrored or not."""
    held_out: Annotated[Number, Gt(0), Lt(1)] = 0.1
    """Share of the calibration images that only judge the steps."""
    targets: Literal["dense", "cascaded", "halfway"] = "dense"
    """What layers are fitted to: ``dense`` (the dense network's own activations), ``cascaded`` (the paper's: the dense
    layers run on the pruned network's activations) or ``halfway`` between them; what judges is dense then."""
    weighting: Literal["mean", "relative"] = "mean"
    """Of the operations in Eq. 3: ``mean`` (mean squared errors) or ``relative`` (these over the variance of their
    targets)."""
    sweeps: Annotated[int, Ge(0)] = 1
    """Passes of the cascade over the layers; from the second on, what follows a layer is pruned already. 0: only the
    joint steps move weights."""
    layer_steps: Annotated[int, Ge(0)] = 0
    """Most Newton steps for one layer in one sweep; 0 means as many as the passes give."""
    joint_steps: Annotated[int, Ge(0)] = 0
    """Newton steps, after the sweeps, that move the weights of all layers together."""
    gradual: Annotated[Number, Ge(0), Le(1)] = 0.0
    """Share of the joint steps, the first of them, during which masks that keep twice as many weights, with which
    the sweeps were made, thin out to the pattern (gradual.py). Masks stay as they are at 0, and wherever the
    pattern keeps half of the weights or more, or the masks come from a file."""
    biases: bool = False
    """Biases of the pruned layers, or of the batch norms that follow them, move with the weights."""
    emphasis: Annotated[Number, Ge(0)] = 0.0
    """Of late operations in joint steps: output k of K weighs ((k + 1) / (K + 1)) to this power."""
    augment: bool = False
    """Mirror and shift the images of joint steps at random (augment.py), other than those that judge."""
    autocast: bool = False
    """Steps compute in bfloat16 where that does (torch.autocast); the loss that judges them does not."""
    offload: bool | None = None
    """Weights rest in main memory, and come to the device for one operation after the other. None: where they
    would take too much of the device (adapters/offload.py)."""
    seed: Seed = 0
    """Decides which images are drawn, and their order."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """See :class:`SolverConfig`."""

    @model_validator(mode="after")
    def _check_gradual(self) -> Self:
        if self.gradual_steps and self.solver.preconditioner != "gram":
            raise ConfigError(
                f"Setting preconditioner = {self.solver.preconditioner!r}: expected 'gram', or gradual = 0."
            )
        return self

    def steps_of_a_layer(self, batches: int) -> int:
        """Most Newton steps that a layer takes in one sweep, each on one of so many batches."""
        most = self.solver.passes * batches
        return min(most, self.layer_steps or most)

    @property
    def gradual_steps(self) -> int:
        """Joint steps with masks that thin out, where the pattern has them."""
        return round(self.gradual * self.joint_steps)

    @classmethod
    def known(cls) -> dict[str, FieldInfo]:
        own = cls.own()
        return {name: own[name] for name in own if name not in ("pattern", "solver")} | SolverConfig.own()

    def updated(self, **changes: Any) -> Self:
        """A copy with some settings changed; names of :class:`SolverConfig` reach into ``solver``.

        Raises:
            ConfigError: a name that is no setting, or a value out of range.
        """
        inner = {name: changes.pop(name) for name in SolverConfig.own() if name in changes}
        if inner:
            changes["solver"] = replace(self.solver, **inner)
        return replace(self, **changes)


@dataclass(frozen=True, config=_CONFIG)
class FinetuneConfig(Settings):
    """How a pruned model is retrained, by SGD with a stepwise decay of the learning rate (A.3.4)."""

    epochs: Annotated[int, Ge(1)] = 90
    """Passes over the training images. A.3.4: 90 (CIFAR-10)."""
    minutes: Annotated[Number, Ge(0)] = 0.0
    """Most minutes of training; where they do not do for ``epochs``, as many are planned as the first one's time lets
    expect. 0 means no limit."""
    lr: Annotated[Number, Gt(0), Lt(1e30)] = 3e-3
    """Learning rate at the start. A.3.4: 3e-3."""
    decay: Annotated[Number, Gt(0), Le(1)] = 0.1
    """Factor on the learning rate, every ``decay_every`` epochs. A.3.4: 0.1."""
    decay_every: Annotated[int, Ge(0)] = 0
    """Epochs between decays; 0 means a third of the epochs, rounded up. A.3.4: 30 of 90 epochs, 2 of 5."""
    momentum: Annotated[Number, Ge(0), Lt(1)] = 0.9
    """Of SGD. A.3.4: 0.9."""
    weight_decay: Annotated[Number, Ge(0), Lt(1e30)] = 5e-5
    """Of SGD. A.3.4: 5e-5."""
    batch_size: Annotated[int, Ge(2)] = 128
    """Images per step."""
    crop: Annotated[Number, Ge(0), Lt(1)] = 0.125
    """Images are padded by this share of their size on each side and cropped at random back to it; 0 switches it
    off. 4 pixels of 32, as usual for CIFAR (He et al., 2015, section 4.2)."""
    flip: bool = True
    """Half of the images, at random, are mirrored left to right."""
    distillation: Annotated[Number, Ge(0), Le(1)] = 0.9
    """α in (1 - α)·cross-entropy + α·T²·KL(teacher ‖ student), where there is a teacher."""
    temperature: Annotated[Number, Gt(0)] = 4.0
    """T, by which the logits of both are divided in the second term (Hinton et al., 2015)."""
    samples: Annotated[int, Ge(2)] | None = None
    """Training images to draw; None means all."""
    seed: Seed = 0
    """Of the draw, the order and the augmentation."""


@dataclass(frozen=True, config=_CONFIG)
class TrainConfig(Settings):
    """How a network is pruned at initialisation and trained."""

    mask: str = "magnitude"
    """Mask criterion (magnitude, wanda, sparsegpt, alps, …), or a safetensors file of booleans."""
    allocation: Literal["global", "uniform"] = "global"
    """Of an unstructured sparsity: ``global`` (all layers ranked together) or ``uniform``."""
    layer_cap: Annotated[Number, Gt(0), Le(1)] = 1.0
    """With ``global``, the most that one layer may lose; 1, the paper's plain ranking, lets layers collapse."""
    criterion_samples: Annotated[int, Ge(1)] = 512
    """Images that the criterion reads."""
    warm_up_bn: Annotated[int, Ge(0)] = 0
    """Batches on which the statistics of batch norms are set before the masks are chosen."""
    samples: Annotated[int, Ge(0)] = 0
    """Training images; 0 means all."""
    epochs: Annotated[int, Ge(0)] = 30
    """Passes over them; 0 trains nothing."""
    batch_size: Annotated[int, Ge(1)] = 128
    """Images per step."""
    lr: Annotated[Number, Gt(0)] = 0.1
    """Learning rate at the start."""
    schedule: Literal["cosine", "step"] = "cosine"
    """``cosine``, or ``step``: a tenth after half and after three quarters of the steps."""
    momentum: Annotated[Number, Ge(0), Lt(1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[Number, Ge(0)] = 5e-4
    """Of all weights."""
    augment: bool = True
    """Mirror and shift images at random."""
    seed: Seed = 0
    """Of weights, order of images, augmentation and criteria."""


def check_seed(seed: int) -> None:
    """
    Raises:
        ConfigError: no :data:`Seed`.
    """
    TrainConfig(seed=seed)


_PAPER: dict[str, Any] = {"curvature": "hessian", "preconditioner": "none", "permute": False, "targets": "cascaded"}
_PAPER |= {"damping": 1e-4, "cg_rtol": 0.0, "backtrack": 0.9, "max_backtracks": 50, "batch_size": 128}
_PAPER_CNN = {**_PAPER, "cg_atol": 1e-3, "cg_max_iter": 1000, "passes": 3, "samples": 3000}
_PAPER_VIT = {**_PAPER, "cg_atol": 5e-4, "cg_max_iter": 500, "passes": 1, "samples": 5000}

_VIT: dict[str, Any] = {"k": 5, "weighting": "relative", "batch_size": 128, "curvature_size": 32, "passes": 8}
_VIT |= {"targets": "halfway", "biases": True}
_CNN: dict[str, Any] = {"weighting": "relative", "cg_max_iter": 5, "layer_steps": 4, "joint_steps": 60}
_CNN |= {"gradual": 1 / 3, "emphasis": 3.0, "augment": True, "average": 10, "patience": 10, "min_gain": 0.002}


def _convolutional(**changes: Any) -> dict[str, dict[str, Any]]:
    return {
        family: {"k": k, **_CNN, **changes}
        for family, k in {"cifar_resnet": 40, "resnet": 30, "mobilenet": 60}.items()
    }


EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    # What measured best here in its time (docs/results.md).
    "quick": {
        "vit": {**_VIT, "k": 2, "layer_steps": 1, "cg_max_iter": 2},
        **_convolutional(joint_steps=15),
    },
    "standard": {"vit": {**_VIT, "layer_steps": 2, "cg_max_iter": 3}, **_convolutional()},
    "best": {"vit": {**_VIT, "layer_steps": 4, "cg_max_iter": 3}, **_convolutional(joint_steps=120)},
    # Table 7, and what A.1.3 and the paper's own code add to it.
    "paper": {
        "vit": {**_PAPER_VIT, "k": 3},
        "cifar_resnet": {**_PAPER_CNN, "k": 40},
        "resnet": {**_PAPER_CNN, "k": 30},
        "mobilenet": {**_PAPER_CNN, "k": 60, "samples": 1000},
    },
}
"""Settings by effort and family of architectures."""


ALPS: dict[str, Any] = {"mask": "alps", "gradual": 0.0}
"""By default, wherever a pattern has groups of M, and for a share of zeros in ViTs: its layers all lose that
share, where no other allocation is asked for."""

LARGE_CNNS = ("resnet", "mobilenet")
"""Families of convolutional networks of a real size."""

FITTED: dict[str, dict[str, dict[str, Any]]] = {
    effort: {
        "vit": {"sweeps": 0, "views": views},
        "cifar_resnet": {"sweeps": 0, "joint_steps": small},
        **{family: {"sweeps": 0, "joint_steps": large} for family in LARGE_CNNS},
    }
    for effort, views, small, large in (("quick", 1, 15, 8), ("standard", 4, 30, 24), ("best", 16, 120, 60))
}
"""By effort and family, where ALPS makes the masks, or units go: each layer is fitted to the dense network already
(aims.py), and a sweep brings no more. In ViTs further views of the same images take far more off what is left than
steps do; in CNNs joint steps do, of which those of a real size get fewer, at a minute each; but where units alone go
there, views do, in a third of the time (docs/results.md)."""

OF_STRUCTURES: dict[str, Any] = {"biases": True, "targets": "dense"}
"""By default, wherever units go: of a smaller network no activations are between two."""

UNITS_BY_SENSITIVITY: dict[str, Any] = {"budget": "flops"}
"""By default, where layers lose as many units as they can spare: counting weights, CNNs would lose late layers, whose
operations are few (docs/results.md)."""


def settings_for(effort: str, family: str, pattern: str, changes: Mapping[str, Any] | None = None) -> PruneConfig:
    """The settings of an effort for a family and a pattern, with a caller's changes over them.

    Raises:
        ConfigError: there is no such effort; a change that is no setting, or a value out of range.
    """
    if effort not in EFFORTS:
        raise ConfigError(f"Effort {effort!r}: expected one of {', '.join(EFFORTS)}.")
    changes = dict(changes or {})
    settings: dict[str, Any] = EFFORTS[effort].get(family, {})
    if effort == "paper":  # whose settings are the same for all patterns
        return PruneConfig(pattern).updated(**settings | changes)
    alike = family == "vit" and changes.get("allocation", "uniform") == "uniform"
    share = alike and re.fullmatch(r"(.*\+)?\s*0?\.\d+\s*", pattern)
    if share or re.search(r"\d:\d", pattern):
        settings = settings | ALPS
    structures = [part for part in pattern.split("+") if re.match(r"\s*[a-z]+:", part)]
    if structures:
        settings = settings | OF_STRUCTURES
        if changes.get("allocation") == "sensitivity":
            settings = settings | UNITS_BY_SENSITIVITY
    zeros = len(structures) < len(pattern.split("+"))
    if structures and effort == "best" and family == "vit":
        settings = settings | {"fit_between": True}
    if not zeros and family in LARGE_CNNS:
        settings = settings | FITTED[effort]["vit"] | {"joint_steps": 0}
    elif not zeros or changes.get("mask", settings.get("mask")) == ALPS["mask"]:
        settings = settings | FITTED[effort].get(family, {})
    return PruneConfig(pattern).updated(**settings | changes)
