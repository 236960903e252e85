"""Settings as frozen, validated dataclasses, and the paper's presets (Table 7)."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from .errors import ConfigError


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"Setting {name} = {value!r}: expected {expected}.")


def check_seed(seed: int) -> None:
    """
    Raises:
        ConfigError: not a number that all generators take, also a thousand times and with steps added.
    """
    _check(isinstance(seed, int) and 0 <= seed < 2**32, "seed", seed, "a whole number from 0 to 2^32 - 1")


@dataclass(frozen=True)
class _Settings:
    """What settings have in common."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def updated(self, **changes: Any) -> Self:
        """A copy with some settings changed.

        Raises:
            ConfigError: a name that is no setting, or a value out of range.
        """
        own = {f.name for f in fields(self)}
        for name in changes:
            if name not in own:
                raise ConfigError(f"Unknown setting {name!r}.", f"Known: {', '.join(sorted(own))}.")
        return replace(self, **changes)


@dataclass(frozen=True)
class SolverConfig:
    """How one layer is optimised (Algorithms 1 and 2).

    Attributes:
        curvature: ``gauss-newton`` (positive semi-definite, cheaper) or ``hessian`` (the paper's exact products).
        preconditioner: of conjugate gradients: ``gram`` (preconditioner.py) or ``none`` (the paper's).
        factor_entries: most numbers in the preconditioner's factors of one parameter, whose rows are cut into blocks
            to stay below; fewer where memory is short.
        damping: λ of Eq. 10. Table 7: 1e-4.
        beta: Armijo constant. A.1.3: 1e-5.
        backtrack: factor between two trial steps of the line search.
        max_backtracks: trial steps after the first before a step is rejected.
        passes: passes over the calibration batches.
        patience: Newton steps in a row that may gain less than ``min_gain`` before a layer is done.
        min_gain: relative decrease of the held-out loss.
        cg_rtol: conjugate gradients stop at ‖r‖ ≤ cg_rtol·‖g‖.
        cg_atol: … or at ‖r‖ ≤ cg_atol, the paper's test (Table 7: 1e-3 CNN, 5e-4 ViT).
        cg_max_iter: most products per Newton step.
        cg_stall: … or when the quadratic model stalls (Martens 2010, section 4.4); 0 switches the test off.
        average: the running mean of the iterates looks back on that many (Polyak and Juditsky 1992); 0 means none.
    """

    curvature: str = "gauss-newton"
    preconditioner: str = "gram"
    factor_entries: int = 2**28
    damping: float = 1e-4
    beta: float = 1e-5
    backtrack: float = 0.5
    max_backtracks: int = 10
    passes: int = 1
    patience: int = 5
    min_gain: float = 0.005
    cg_rtol: float = 1e-3
    cg_atol: float = 0.0
    cg_max_iter: int = 10
    cg_stall: float = 0.0
    average: int = 0

    def __post_init__(self) -> None:
        _check(
            self.curvature in ("gauss-newton", "hessian"), "curvature", self.curvature, "'gauss-newton' or 'hessian'"
        )
        _check(self.preconditioner in ("gram", "none"), "preconditioner", self.preconditioner, "'gram' or 'none'")
        _check(self.factor_entries >= 1, "factor_entries", self.factor_entries, "an integer ≥ 1")
        _check(self.damping >= 0, "damping", self.damping, "a number ≥ 0")
        _check(0 < self.beta < 0.5, "beta", self.beta, "a number between 0 and 0.5")
        _check(0 < self.backtrack < 1, "backtrack", self.backtrack, "a number between 0 and 1")
        _check(self.max_backtracks >= 0, "max_backtracks", self.max_backtracks, "an integer ≥ 0")
        _check(self.passes >= 1, "passes", self.passes, "an integer ≥ 1")
        _check(self.patience >= 1, "patience", self.patience, "an integer ≥ 1")
        _check(0 <= self.min_gain < 1, "min_gain", self.min_gain, "a number from 0 to below 1")
        _check(self.cg_max_iter >= 1, "cg_max_iter", self.cg_max_iter, "an integer ≥ 1")
        _check(0 <= self.cg_rtol < 1, "cg_rtol", self.cg_rtol, "a number from 0 to below 1")
        _check(self.cg_atol >= 0, "cg_atol", self.cg_atol, "a number ≥ 0")
        _check(self.cg_stall >= 0, "cg_stall", self.cg_stall, "a number ≥ 0")
        _check(self.average >= 0, "average", self.average, "an integer ≥ 0")


@dataclass(frozen=True)
class PruneConfig(_Settings):
    """Everything that decides what a prune does, besides the model and the images.

    Attributes:
        pattern: ``N:M``, a fraction of zeros, or a set of patterns such as ``1:4,2:4,dense``, as text.
        k: K of Eq. 3, the operations after the layer whose outputs are kept. Values past the last operation mean
            K_max.
        mask: name of a criterion, or a safetensors file of booleans.
        permute: put input channels in an order that N:M suits better, where they are free (permutation.py). None: if
            one N:M for all layers keeps less than half of the weights, and the masks do not come from a file.
        allocation: which layers lose how much of an unstructured sparsity: ``global`` (the lowest scores of all layers
            together), ``uniform`` (every layer the same share) or ``sensitivity`` (allocation.py). A set of patterns
            always goes by sensitivity.
        sparsity: of a set of patterns, the zeros of all layers together; 0 where the pattern itself says it.
        budget: what an allocation by sensitivity counts: ``weights``, or ``flops`` (the operations that the zeros
            make superfluous).
        repair_steps: Newton steps that each layer takes before its sensitivity is measured; 0 measures the mask alone.
        layers: names of the layers to prune, with wildcards; empty means all.
        samples: calibration images, held-out ones included.
        batch_size: images per Newton step.
        held_out: share of the calibration images that only judge the steps.
        targets: ``dense`` (the dense network's own activations) or ``cascaded`` (the paper's: the dense layers run on
            the pruned network's activations).
        weighting: of the operations in Eq. 3: ``mean`` (mean squared errors) or ``relative`` (these over the variance
            of their targets).
        sweeps: passes of the cascade over the layers; from the second on, what follows a layer is pruned already.
        layer_steps: most Newton steps for one layer in one sweep; 0 means as many as the passes give.
        joint_steps: Newton steps, after the sweeps, that move the weights of all layers together.
        gradual: share of the joint steps, the first of them, during which masks that keep twice as many weights, with
            which the sweeps were made, thin out to the pattern (gradual.py). Masks stay as they are at 0, and wherever
            the pattern keeps half of the weights or more, or the masks come from a file.
        emphasis: of late operations in joint steps: output k of K weighs ((k + 1) / (K + 1)) to this power.
        augment: mirror and shift the images of joint steps at random (augment.py), other than those that judge.
        offload: weights rest in main memory, and come to the device for one operation after the other. None: where
            they would take too much of the device (fitting.py).
        autocast: steps compute in bfloat16 where that does (torch.autocast); the loss that judges them does not.
        seed: decides which images are drawn, and their order.
        solver: see :class:`SolverConfig`.
    """

    pattern: str
    k: int = 5
    mask: str = "magnitude"
    permute: bool | None = None
    allocation: str = "global"
    sparsity: float = 0.0
    budget: str = "weights"
    repair_steps: int = 1
    layers: tuple[str, ...] = ()
    samples: int = 512
    batch_size: int = 256
    held_out: float = 0.1
    targets: str = "dense"
    weighting: str = "mean"
    sweeps: int = 1
    layer_steps: int = 0
    joint_steps: int = 0
    gradual: float = 0.0
    emphasis: float = 0.0
    augment: bool = False
    autocast: bool = False
    offload: bool | None = None
    seed: int = 0
    solver: SolverConfig = field(default_factory=SolverConfig)

    def __post_init__(self) -> None:
        _check(isinstance(self.k, int) and self.k >= 0, "k", self.k, "an integer ≥ 0")
        _check(
            self.allocation in ("global", "uniform", "sensitivity"),
            "allocation",
            self.allocation,
            "'global', 'uniform' or 'sensitivity'",
        )
        _check(0 <= self.sparsity < 1, "sparsity", self.sparsity, "a fraction of zeros from 0 to below 1")
        _check(self.budget in ("weights", "flops"), "budget", self.budget, "'weights' or 'flops'")
        _check(self.repair_steps >= 0, "repair_steps", self.repair_steps, "an integer ≥ 0")
        _check(self.samples >= 1, "samples", self.samples, "an integer ≥ 1")
        _check(self.sweeps >= 1, "sweeps", self.sweeps, "an integer ≥ 1")
        _check(self.layer_steps >= 0, "layer_steps", self.layer_steps, "an integer ≥ 0")
        _check(self.joint_steps >= 0, "joint_steps", self.joint_steps, "an integer ≥ 0")
        _check(0 <= self.gradual <= 1, "gradual", self.gradual, "a number from 0 to 1")
        if self.gradual_steps:
            preconditioner = self.solver.preconditioner
            _check(preconditioner == "gram", "preconditioner", preconditioner, "'gram', or gradual = 0")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "an integer ≥ 1")
        _check(0 < self.held_out < 1, "held_out", self.held_out, "a number between 0 and 1")
        _check(self.permute is None or isinstance(self.permute, bool), "permute", self.permute, "true or false")
        _check(self.offload is None or isinstance(self.offload, bool), "offload", self.offload, "true or false")
        _check(isinstance(self.augment, bool), "augment", self.augment, "true or false")
        _check(isinstance(self.autocast, bool), "autocast", self.autocast, "true or false")
        _check(self.emphasis >= 0, "emphasis", self.emphasis, "a number ≥ 0")
        _check(self.weighting in ("mean", "relative"), "weighting", self.weighting, "'mean' or 'relative'")
        _check(self.targets in ("dense", "cascaded"), "targets", self.targets, "'dense' or 'cascaded'")
        check_seed(self.seed)

    @property
    def gradual_steps(self) -> int:
        """Joint steps with masks that thin out, where the pattern has them."""
        return round(self.gradual * self.joint_steps)

    def updated(self, **changes: Any) -> Self:
        """A copy with some settings changed; names of :class:`SolverConfig` reach into ``solver``.

        Raises:
            ConfigError: a name that is no setting, or a value out of range.
        """
        own = {f.name for f in fields(self)} - {"solver"}
        inner = {f.name for f in fields(SolverConfig)}
        for name in changes:
            if name not in own | inner:
                raise ConfigError(f"Unknown setting {name!r}.", f"Known: {', '.join(sorted(own | inner))}.")
        solver = replace(self.solver, **{n: v for n, v in changes.items() if n in inner})
        return replace(self, solver=solver, **{n: v for n, v in changes.items() if n in own})


@dataclass(frozen=True)
class FinetuneConfig(_Settings):
    """How a pruned model is retrained, by SGD with a stepwise decay of the learning rate (A.3.4).

    Attributes:
        epochs: passes over the training images. A.3.4: 90 (CIFAR-10).
        minutes: of training at most; where they do not do for ``epochs``, as many are planned as the first one's time
            lets expect. 0 means no limit.
        lr: learning rate at the start. A.3.4: 3e-3.
        decay: factor on the learning rate, every ``decay_every`` epochs. A.3.4: 0.1.
        decay_every: 0 means a third of the epochs, rounded up. A.3.4: 30 of 90 epochs, 2 of 5.
        momentum: A.3.4: 0.9.
        weight_decay: A.3.4: 5e-5.
        batch_size: images per step.
        crop: images are padded by this share of their size on each side and cropped at random back to it; 0 switches
            it off. 4 pixels of 32, as usual for CIFAR (He et al., 2015, section 4.2).
        flip: half of the images, at random, are mirrored left to right.
        distillation: α in (1 - α)·cross-entropy + α·T²·KL(teacher ‖ student), where there is a teacher.
        temperature: T, by which the logits of both are divided in the second term (Hinton et al., 2015).
        samples: training images to draw; None means all.
        seed: of the draw, the order and the augmentation.
    """

    epochs: int = 90
    minutes: float = 0.0
    lr: float = 3e-3
    decay: float = 0.1
    decay_every: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-5
    batch_size: int = 128
    crop: float = 0.125
    flip: bool = True
    distillation: float = 0.9
    temperature: float = 4.0
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "epochs", self.epochs, "an integer ≥ 1")
        _check(0 <= self.minutes < float("inf"), "minutes", self.minutes, "a number ≥ 0")
        _check(0 < self.lr < 1e30, "lr", self.lr, "a number > 0, below 1e30")
        _check(0 < self.decay <= 1, "decay", self.decay, "a number above 0, up to 1")
        _check(self.decay_every >= 0, "decay_every", self.decay_every, "an integer ≥ 0")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "a number from 0 to below 1")
        _check(0 <= self.weight_decay < 1e30, "weight_decay", self.weight_decay, "a number ≥ 0, below 1e30")
        _check(self.batch_size >= 2, "batch_size", self.batch_size, "an integer ≥ 2")
        _check(0 <= self.crop < 1, "crop", self.crop, "a number from 0 to below 1")
        _check(0 <= self.distillation <= 1, "distillation", self.distillation, "a number from 0 to 1")
        _check(self.temperature > 0, "temperature", self.temperature, "a number > 0")
        _check(self.samples is None or self.samples >= 2, "samples", self.samples, "an integer ≥ 2")
        check_seed(self.seed)


@dataclass(frozen=True)
class TrainConfig(_Settings):
    """How a network is pruned at initialisation and trained.

    Attributes:
        mask: name of a criterion, or a safetensors file of booleans.
        allocation: of an unstructured sparsity: ``global`` (all layers ranked together) or ``uniform``.
        layer_cap: with ``global``, the most that one layer may lose; 1, the paper's plain ranking, lets layers
            collapse.
        criterion_samples: images that the criterion reads.
        warm_up_bn: batches on which the statistics of batch norms are set before the masks are chosen.
        samples: training images; 0 means all.
        epochs: passes over them; 0 trains nothing.
        batch_size: images per step.
        lr: learning rate at the start.
        schedule: ``cosine``, or ``step``: a tenth after half and after three quarters of the steps.
        momentum: of SGD.
        weight_decay: of all weights.
        augment: mirror and shift images at random.
        seed: of weights, order of images, augmentation and criteria.
    """

    mask: str = "magnitude"
    allocation: str = "global"
    layer_cap: float = 1.0
    criterion_samples: int = 512
    warm_up_bn: int = 0
    samples: int = 0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.allocation in ("global", "uniform"), "allocation", self.allocation, "'global' or 'uniform'")
        _check(0 < self.layer_cap <= 1, "layer_cap", self.layer_cap, "a fraction up to 1")
        for name in ("criterion_samples", "batch_size"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "an integer ≥ 1")
        for name in ("warm_up_bn", "samples", "epochs"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "an integer ≥ 0")
        _check(self.lr > 0, "lr", self.lr, "a number > 0")
        _check(self.schedule in ("cosine", "step"), "schedule", self.schedule, "'cosine' or 'step'")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "a number from 0 to below 1")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number ≥ 0")
        check_seed(self.seed)


_PAPER = {
    "curvature": "hessian",
    "preconditioner": "none",
    "permute": False,
    "targets": "cascaded",
    "damping": 1e-4,
    "cg_rtol": 0.0,
    "backtrack": 0.9,
    "max_backtracks": 50,
    "batch_size": 128,
}
_PAPER_CNN = {**_PAPER, "cg_atol": 1e-3, "cg_max_iter": 1000, "passes": 3, "samples": 3000}
_PAPER_VIT = {**_PAPER, "cg_atol": 5e-4, "cg_max_iter": 500, "passes": 1, "samples": 5000}

_CNN = {
    "weighting": "relative",
    "cg_max_iter": 5,
    "layer_steps": 4,
    "joint_steps": 60,
    "gradual": 1 / 3,
    "emphasis": 3.0,
    "augment": True,
    "average": 10,
    "patience": 10,
    "min_gain": 0.002,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # What measured best here (docs/results.md).
    "default": {
        "vit": {
            "k": 5,
            "weighting": "relative",
            "batch_size": 128,
            "cg_max_iter": 5,
            "passes": 2,
            "layer_steps": 8,
        },
        "cifar_resnet": {"k": 40, **_CNN},
        "resnet": {"k": 30, **_CNN},
        "mobilenet": {"k": 60, **_CNN},
    },
    # Table 7, and what A.1.3 and the paper's own code add to it.
    "paper": {
        "vit": {**_PAPER_VIT, "k": 3},
        "cifar_resnet": {**_PAPER_CNN, "k": 40},
        "resnet": {**_PAPER_CNN, "k": 30},
        "mobilenet": {**_PAPER_CNN, "k": 60, "samples": 1000},
    },
}
"""Settings by preset and family of architectures."""


_N_M = {"mask": "swap", "gradual": 0.0}
"""By default, wherever a pattern has groups within which weights can be swapped."""


def preset(name: str, family: str, pattern: str) -> PruneConfig:
    """The settings of a preset for a family and a pattern.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"Preset {name!r}: expected one of {', '.join(PRESETS)}.")
    settings = PRESETS[name].get(family, {})
    if name == "default" and ":" in pattern:
        settings = settings | _N_M
    return PruneConfig(pattern).updated(**settings)
