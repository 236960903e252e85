"""What config.json claims is held against the weights, whatever a report beside it says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from embedded import DIGITS, RESNET, VIT, copy_of, edit_config, tensors_of, write_tensors
from quick import rest_slow
from safetensors.torch import save_file

from snows_hf import finetune, inspect, prune, train
from snows_hf.patterns import NM


KEPT = "vit.layers.3.mlp.fc2"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pruned(folder: Path, pattern: str, source: Path = VIT, **settings: Any) -> Path:
    quick = {"data": str(DIGITS), "samples": 16, "k": 0, "mask": "magnitude", "update": False}
    prune(str(source), pattern, output=folder, **quick | settings)
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tmp_path_factory.mktemp("sparse") / "m", "2:4")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def claim(folder: Path, **changes: Any) -> Path:
    """Edits what config.json claims; None takes a key away."""
    snows = config_of(folder)["snows"] | changes
    return edit_config(folder, snows={key: value for key, value in snows.items() if value is not None})


def put_back(folder: Path) -> Path:
    """All layers but one are dense again, and nothing but that one is named as pruned."""
    dense, tensors = tensors_of(VIT), tensors_of(folder)
    kept = [name for name in tensors if "layers.3.mlp.fc2" in name or "layer.3.output.dense" in name]
    assert len(kept) == 2
    write_tensors(folder, dense | {name: tensors[name] for name in kept})
    report = json.loads((folder / "snows_config.json").read_text())
    layers = [layer for layer in report["layers"] if layer["name"] == KEPT]
    return edit_config(folder, "snows_config.json", layers=layers, pruned_parameters=[f"{KEPT}.weight"])


def broken(found: dict[str, Any]) -> list[str]:
    return [layer["name"] for layer in found["layers"] if layer["pattern_ok"] is False]


@pytest.fixture(scope="module")
def layers(sparse: Path) -> list[dict[str, Any]]:
    return inspect(sparse)["layers"]


@pytest.mark.parametrize("how", ["as it is", "excused", "doubled", "no report", "no number", "own patterns"])
def test_a_report_cannot_leave_out_what_is_dense_again(
    how: str, sparse: Path, layers: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = put_back(copy_of(sparse, tmp_path / "m"))
    if how == "excused":
        names = [layer["name"] for layer in layers if layer["name"] != KEPT]
        excuses = [{"name": name, "reason": "the mask file has no mask for it"} for name in names]
        edit_config(folder, "snows_config.json", dense_layers=excuses, settings={"layers": [KEPT]})
    elif how == "doubled":
        edit_config(folder, "snows_config.json", pruned_parameters=[f"{KEPT}.weight"] * 16)
    elif how == "no report":
        (folder / "snows_config.json").unlink()
    elif how == "no number":  # as of an earlier version
        claim(folder, weights=None)
    elif how == "own patterns":
        own = {name: "0.00001" for layer in layers for name in layer["parameters"]}
        edit_config(folder, "snows_config.json", allocation={"patterns": own}, pruned_parameters=list(own))
    found = inspect(folder)
    assert (found["pattern"], found["pattern_ok"]) == ("2:4", False)
    assert len(broken(found)) >= 15


def lists_of_patterns(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "1:4,2:4,dense", sparsity=0.6)


def shares_of_each_layer(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "0.7", allocation="sensitivity", budget="flops")


def some_layers(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "15:16", layers=("*.0.mlp.*", "*.2.attention.qkv"))


def widths_that_do_not_fit(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "16:32")


def few_zeros(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "0.05", layers=("*fc1",))


def masks_of_some(folder: Path, tmp_path: Path) -> Path:
    names = {"vit.layers.1.mlp.fc1.weight": (96, 48), "vit.layers.1.attention.q_proj.weight": (48, 48)}
    save_file(
        {name: NM(2, 4).mask(torch.rand(shape)) for name, shape in names.items()}, tmp_path / "masks.safetensors"
    )
    return pruned(folder, "2:4", mask=str(tmp_path / "masks.safetensors"))


def trained(folder: Path, tmp_path: Path) -> Path:
    train(str(RESNET), str(DIGITS), "0.8", output=folder, samples=60, epochs=1, mask="magnitude")
    return folder


def trained_by_groups(folder: Path, tmp_path: Path) -> Path:
    train(str(RESNET), str(DIGITS), "2:4", output=folder, samples=60, epochs=1, mask="magnitude")
    return folder


def retrained(folder: Path, tmp_path: Path) -> Path:
    source = pruned(tmp_path / "before", "2:4", layers=("*fc2",))
    finetune(str(source), str(DIGITS), output=folder, samples=32, epochs=1)
    return folder


def pruned_twice(folder: Path, tmp_path: Path) -> Path:
    return pruned(folder, "1:4", source=pruned(tmp_path / "before", "2:4"), layers=("*fc2",))


HONEST = [
    lists_of_patterns, shares_of_each_layer, some_layers, widths_that_do_not_fit, few_zeros, masks_of_some, trained,
    trained_by_groups, retrained, pruned_twice,
]  # fmt: skip


@pytest.mark.parametrize("make", rest_slow(HONEST, (some_layers, widths_that_do_not_fit, trained)))
def test_honest_results_hold(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tmp_path)
    found = inspect(folder)
    assert found["pattern_ok"] is True
    bound = [layer["name"] for layer in found["layers"] if layer["pattern_ok"]]
    assert bound and not broken(found)

    def same(after: dict[str, Any]) -> bool:
        return [layer["name"] for layer in after["layers"] if layer["pattern_ok"]] == bound and after["pattern_ok"]

    assert same(inspect(claim(copy_of(folder, tmp_path / "old"), weights=None)))
    if make not in (lists_of_patterns, shares_of_each_layer):  # what each layer's own is, only the report says
        (folder / "snows_config.json").unlink()
        assert same(inspect(folder))


@pytest.mark.parametrize("changes", [
    {"sparsity": 0.6}, {"sparsity": "half"}, {"sparsity": float("nan")}, {"weights": 10**9}, {"weights": "all"},
    {"pattern": "1:4"}, {"pattern": "2:4,1:4"}, {"pattern": ["2:4"]}, {"pattern": f"1:{'9' * 5000}"},
])  # fmt: skip
def test_claims_that_the_weights_do_not_hold(changes: dict[str, Any], sparse: Path, tmp_path: Path) -> None:
    found = inspect(claim(copy_of(sparse, tmp_path / "m"), **changes))
    assert found["pattern_ok"] is False and len(broken(found)) == 16


@pytest.mark.parametrize("snows", [None, {}, [], "2:4", {"sparsity": 0.9}, {"weights": 10**9}])
def test_what_claims_nothing_is_measured(snows: Any, sparse: Path, tmp_path: Path) -> None:
    folder = edit_config(copy_of(sparse, tmp_path / "m"), snows=snows)
    dense = edit_config(copy_of(VIT, tmp_path / "dense"), snows=snows)
    for model, expected in ((folder, ("2:4", True)), (dense, (None, False))):
        found = inspect(model)
        assert (found["pattern"], found["pattern_ok"]) == expected


def test_the_claim_counts_the_weights_it_binds(sparse: Path) -> None:
    report = json.loads((sparse / "snows_config.json").read_text())
    layers = [layer["shape"] for layer in report["layers"]]
    assert config_of(sparse)["snows"]["weights"] == sum(height * width for height, width in layers)
