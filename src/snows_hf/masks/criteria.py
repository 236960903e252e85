"""The mask criteria, by the names that ``--mask`` takes. Nothing of them is loaded before it is used."""

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Criterion:
    """Where a criterion's function is, as ``module:function`` of :mod:`snows_hf.masks.scores`, whether it reads the
    labels of the calibration images, whether it makes masks itself, without a score for each weight, and whether it
    fits layer after layer to make up for those before it (aims.py), those that stay dense, too."""

    function: str
    labels: bool = False
    whole: bool = False
    fits: bool = False


CRITERIA = {
    "magnitude": Criterion("magnitude:magnitude"),
    "random": Criterion("random:random"),
    "wanda": Criterion("wanda:wanda"),
    "sparsegpt": Criterion("sparsegpt:sparsegpt", whole=True),
    "alps": Criterion("alps:alps", whole=True, fits=True),
    "obc": Criterion("obc:obc", whole=True),
    "grad-norm": Criterion("gradient:grad_norm", labels=True),
    "snip": Criterion("gradient:snip", labels=True),
    "grasp": Criterion("gradient:grasp", labels=True),
    "synflow": Criterion("synflow:synflow"),
    "fd": Criterion("fisher:fd", labels=True),
    "fp": Criterion("fisher:fp", labels=True),
    "fts": Criterion("fisher:fts", labels=True),
    "hd": Criterion("hutchinson:hd", labels=True),
    "hp": Criterion("hutchinson:hp", labels=True),
    "hts": Criterion("hutchinson:hts", labels=True),
    "hd-kstep": Criterion("hutchinson:hd_kstep"),
    "hp-kstep": Criterion("hutchinson:hp_kstep"),
    "hts-kstep": Criterion("hutchinson:hts_kstep"),
}


def find_criterion(name: str) -> Criterion:
    """
    Raises:
        ConfigError: there is none of that name.
    """
    if name not in CRITERIA:
        known = ", ".join(sorted(CRITERIA))
        raise ConfigError(f"Mask criterion {name!r}: expected one of {known}, or a safetensors file of booleans.")
    return CRITERIA[name]


SCORES = tuple(sorted(name for name, criterion in CRITERIA.items() if not criterion.whole))
"""Those with scores of weights, which can be summed over units."""


def fits_layers(name: str) -> bool:
    """Whether a criterion fits layer after layer, those that stay dense, too; a mask file does not."""
    return name in CRITERIA and CRITERIA[name].fits


def needs_labels(*names: str) -> bool:
    """Whether one of these criteria reads the labels of the calibration images; a mask file, or ``obs`` of units, does
    not."""
    return any(name in CRITERIA and CRITERIA[name].labels for name in names)
