"""``snows-hf attention``: the picture, the figures, and the refusal of networks without attention."""

import json
from pathlib import Path

import pytest
from embedded import DIGITS, RESNET
from PIL import Image


def test_attention(run, small_vit: Path) -> None:
    pruning = (
        "prune",
        small_vit,
        "--pattern",
        "1:8",
        "--data",
        DIGITS,
        "--samples",
        8,
        "--no-update",
        "--output",
        "mask",
    )
    assert run(*pruning).code == 0
    options = ("--data", DIGITS, "--images", 2, "--samples", 5)
    result = run("attention", small_vit, "mask", small_vit, *options, "--output", "maps.png", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    first, mask, same = report["models"]
    assert (report["images"], report["samples"], report["output"]) == (2, 5, "maps.png")
    for kind in ("last", "rollout"):
        assert first[kind] == {"correlation": None, "cosine": None}
        assert -1 <= mask[kind]["correlation"] < 0.999
        assert same[kind]["correlation"] == pytest.approx(1)
    with Image.open("maps.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert sorted(path.name for path in Path().iterdir()) == ["maps.png", "mask"]

    people = run("attention", small_vit, "mask", *options, "--output", "again.png")
    assert people.code == 0
    assert f"{mask['last']['correlation']:.3f}" in people.out
    assert "Saved to again.png" in people.out

    refused = run("attention", RESNET, *options, "--output", "x.png")
    assert refused.code == 1
    assert "Error: ResNetForImageClassification has no attention" in refused.err
    assert not Path("x.png").exists()
