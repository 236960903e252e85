"""``snows-hf probe``: several models, modes of output, bad requests."""

import json

import pytest
from embedded import DIGITS, RESNET, VIT


def test_several_models_in_one_table(run) -> None:
    options = ("--data", DIGITS, "--samples", 200)
    options_of_mask = ("--pattern", "1:8", "--mask", "magnitude", "--data", DIGITS, "--samples", 8, "--no-update")
    assert run("prune", VIT, *options_of_mask, "--output", "mask").code == 0
    result = run("probe", VIT, RESNET, "mask", *options, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    vit, resnet, mask = report["models"]
    assert (report["train_images"], report["test_images"], report["classes"]) == (200, 597, 10)
    assert (vit["model"], vit["difference"], vit["difference_interval"]) == (str(VIT), None, None)
    for row in report["models"]:
        assert row["interval"][0] < row["top1"] < row["interval"][1]
    for row in (resnet, mask):
        assert row["difference"] == pytest.approx(row["top1"] - vit["top1"])
        assert row["difference_interval"][0] < row["difference"] < row["difference_interval"][1]
    assert vit["top1"] > 95
    assert mask["difference_interval"][1] < 0
    assert "Extracting" in result.err

    people = run("probe", VIT, *options)
    assert people.code == 0
    assert f"{vit['top1']:.2f}" in people.out
    assert VIT.name in people.out
    assert run("probe", VIT, *options, "--quiet").out == ""


def test_bad_requests(run) -> None:
    same = run("probe", VIT, "--data", DIGITS, "--test-split", "train")
    assert same.code == 1
    assert "same split" in same.err
    assert run("probe", VIT, "--data", DIGITS, "--samples", 1).code == 1
    assert run("probe", "./nothing", "--data", DIGITS).code == 1
