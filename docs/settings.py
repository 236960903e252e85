"""Prints docs/settings.md, made of the fields of src/snows_hf/settings.py.

python docs/settings.py > docs/settings.md
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from snows_hf.settings import (
    ALPS,
    EFFORTS,
    FITTED,
    FinetuneConfig,
    PruneConfig,
    Settings,
    SolverConfig,
    TrainConfig,
    expected_of,
)


HEAD = """# Settings

Made by `python docs/settings.py` from `src/snows_hf/settings.py`: do not edit.

`--set NAME=VALUE` sets any of these on the command line (`prune` and `sensitivity`: PruneConfig and SolverConfig,
`finetune`: FinetuneConfig, `train`: TrainConfig), a line `NAME: VALUE` in the YAML file of `prune --config`, and a
keyword of the functions of the same names in Python, where `null` is None. What counts: the effort, over it the file,
over it `--set`, over it a setting's own option.
"""


def table(config: type[Settings]) -> Iterator[str]:
    yield f"\n## {config.__name__}\n\n{(config.__doc__ or '').splitlines()[0]}\n"
    yield "| setting | takes | default | meaning |\n|---|---|---|---|"
    for name, field in config.own().items():
        if name == "solver":
            continue
        default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
        meaning = " ".join((field.description or "").split()).replace("``", "`").replace("|", "\\|")
        yield f"| `{name}` | {expected_of(field)} | {default} | {meaning} |"


def efforts() -> Iterator[str]:
    for effort, families in EFFORTS.items():
        yield f"\n## Effort `{effort}`\n\n| setting | {' | '.join(families)} |\n|---|{'---|' * len(families)}"
        for name in dict.fromkeys(name for settings in families.values() for name in settings):
            values = (f"`{json.dumps(s[name])}`" if name in s else "" for s in families.values())
            yield f"| `{name}` | {' | '.join(values)} |"
    where = "With N:M patterns, and for a share of zeros in ViTs, unless an allocation but `uniform` is asked for"
    yield f"\n{where}, all but `paper` set {assignments(ALPS)} besides, and where ALPS makes the masks:\n"
    for effort, families in FITTED.items():
        yield from (f"- `{effort}`, `{family}`: {assignments(own)}" for family, own in families.items())


def assignments(settings: dict[str, Any]) -> str:
    return " and ".join(f"`{name}` = `{json.dumps(value)}`" for name, value in settings.items())


lines = (line for config in (PruneConfig, SolverConfig, FinetuneConfig, TrainConfig) for line in table(config))
sys.stdout.write("\n".join([HEAD.rstrip("\n"), *lines, *efforts()]) + "\n")
