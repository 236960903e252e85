"""Runs of the main job that are kept in a file of JSON lines, so that a benchmark that was cut off goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(log: Path, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The last logged run that has all of ``key``; where there is none, ``run`` makes one, and it is logged."""
    lines = log.read_text().splitlines() if log.exists() else []
    for found in map(json.loads, reversed(lines)):
        if found | key == found:
            return dict(found)
    made = key | run()
    with log.open("a") as file:
        file.write(json.dumps(made) + "\n")
    return made
