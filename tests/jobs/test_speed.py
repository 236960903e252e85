"""Which layers may run on sparse tensor cores, what a machine without them says, and operation counts."""

import re
import time
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from embedded import DIGITS, VIT
from torch import nn

from snows_hf import accelerate, load, prune
from snows_hf.adapters import build_chain
from snows_hf.adapters.flops import count_flops
from snows_hf.cli.bench import show
from snows_hf.cli.sink import Sink
from snows_hf.errors import ConfigError
from snows_hf.jobs.accelerate import device_obstacle, linear_layers, obstacle
from snows_hf.jobs.bench import bench, bench_smaller, compare, time_ms
from snows_hf.patterns import NM
from snows_hf.runtime.run import Run


CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return (weight * NM(2, 4).mask(weight.abs())).to(dtype)


@pytest.mark.parametrize(
    "weight, reason",
    [
        (two_of_four(32, 64), None),
        (two_of_four(16, 16, torch.bfloat16), None),
        (two_of_four(32, 64, torch.float32), "its type is float32"),
        (two_of_four(1000, 64), r"shape \(1000, 64\) does not divide by 16"),
        (two_of_four(64, 24), r"shape \(64, 24\) does not divide by 16"),
        (two_of_four(64, 64) + 1, "not 2:4"),
        (two_of_four(64, 64).t().contiguous().t(), "not contiguous"),
    ],
)
def test_what_a_weight_must_be(weight: torch.Tensor, reason: str | None) -> None:
    found = obstacle(weight)
    assert found is None if reason is None else re.search(reason, found or "")


def test_a_single_weight_too_many_is_noticed() -> None:
    weight = two_of_four(64, 64)
    zero = int((weight[5] == 0).nonzero()[0])
    weight[5, zero] = 1
    assert obstacle(weight) == "its weights are not 2:4"


def test_only_plain_linear_layers() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "own": Own(4, 4), "mha": nn.MultiheadAttention(4, 1)})
    assert list(linear_layers(model)) == ["a"]


def test_accelerate_on_a_cpu_changes_nothing_and_names_every_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = accelerate(model)
    assert done.sparse == ()
    assert done.dense.keys() == {"0", "2"}
    assert all("need an NVIDIA GPU, and this is a CPU" in reason for reason in done.dense.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not CUDA, reason="needs a GPU with sparse tensor cores")
def test_accelerate_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).half().cuda().requires_grad_(False)
    model[0].weight.copy_(two_of_four(128, 64))
    x = torch.randn(3, 5, 64).half().cuda()
    expected = model(x)
    done = accelerate(model)
    assert done.sparse == ("0",)
    assert "does not divide by 16" in done.dense["2"]
    torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
    assert accelerate(model).dense["0"] == "it is one already"


@pytest.mark.skipif(CUDA, reason="needs a machine without sparse tensor cores")
def test_bench_says_what_is_missing() -> None:
    assert device_obstacle(torch.device("cpu")) is not None
    result = bench(str(VIT))
    assert (result["supported"], result["batches"]) == (False, [])
    assert "NVIDIA GPU" in result["reason"]
    assert result["dense_layers"]["classifier"] == "its shape (10, 48) does not divide by 16"
    assert set(result["dense_layers"]) == set(linear_layers(load(str(VIT)).model))  # a dense model
    with pytest.raises(ConfigError, match="float16 or bfloat16"):
        bench(str(VIT), dtype="float32")
    with pytest.raises(ConfigError, match="Batch sizes"):
        bench(str(VIT), batch_sizes=[4, 0])


@pytest.mark.slow
def test_timing_the_same_network_twice() -> None:
    model = load(str(VIT)).model
    layers = ["vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"]
    result = compare(Run(), model, model, layers, (3, 16, 16), [1, 4])
    assert [row["batch"] for row in result["batches"]] == [1, 4]
    assert [(row["name"], row["shape"]) for row in result["layers"]] == [(layers[0], [96, 48]), (layers[1], [48, 96])]
    for row in result["batches"]:
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert row["dense_images_per_s"] == pytest.approx(1000 * row["batch"] / row["dense_ms"])
    assert result["difference"] == 0


class Greedy(nn.Module):
    """Asks for len(x)**12 numbers: for 16 images more than a process can address."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.new_empty(len(x) ** 12)
        return self.layer(x.mean((1, 2)))


@pytest.mark.slow
def test_a_batch_that_does_not_fit_costs_no_other_its_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("snows_hf.jobs.bench"), "SECONDS", 0.02)
    model = Greedy().eval()
    result = compare(Run(), model, model, ["layer"], (3, 8, 8), [1, 16, 4])
    assert result["batches"][1] == {"batch": 16, "failed": "out of memory"}
    assert [row["batch"] for row in result["batches"] if row.get("dense_ms", 0) > 0] == [1, 4]
    assert (result["layers_batch"], len(result["layers"]), result["difference"]) == (4, 1, 0)
    nothing = compare(Run(), model, model, ["layer"], (3, 8, 8), [16])
    assert (nothing["layers_batch"], nothing["layers"], nothing["difference"]) == (None, [], None)

    about = {"source": "m", "dtype": "float16", "device": "a GPU", "supported": True}
    for found in (result, nothing):
        show(Sink(), found | about | {"sparse_layers": ["layer"], "dense_layers": {}})
        shown = capsys.readouterr().out
        assert re.search(r"│ 16 +│ out of memory │", shown)
        assert "Batch 16: out of memory." in shown
        assert ("Layers at batch 4" in shown) == ("Batch 4: sparse is" in shown) == (found is result)
        assert ("Single layers were not measured" in shown) == (found is nothing)


def test_the_clock() -> None:
    assert 10 <= time_ms(lambda: time.sleep(0.01)) < 100


def test_operations_of_a_known_network() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    counted = count_flops(build_chain(model), torch.zeros(1, 3, 224, 224))
    tokens, width, depth = 197, 192, 12
    assert counted["blocks.3.mlp.fc1"] == 2 * tokens * width * 4 * width
    block = 2 * tokens * width * 12 * width + 4 * tokens * tokens * width  # matrices; queries x keys, x values
    patches, head = 2 * 196 * 3 * 16 * 16 * width, 2 * width * 1000
    assert counted[""] == depth * block + patches + head


@pytest.mark.slow
def test_a_smaller_model_is_timed_beside_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("snows_hf.jobs.bench"), "SECONDS", 0.02)
    out = tmp_path / "smaller"
    prune(str(VIT), "mlp:0.5", data=str(DIGITS), samples=16, update=False, output=out)
    found = bench_smaller(str(out), str(VIT), batch_sizes=(1, 2))
    dense, smaller = (sum(p.numel() for p in load(str(m)).model.parameters()) for m in (VIT, out))
    assert found["parameters"] == {"dense": dense, "smaller": smaller} and smaller < dense
    assert [row["batch"] for row in found["batches"]] == [1, 2]
    assert all(row["dense_ms"] > 0 and row["smaller_ms"] > 0 for row in found["batches"])
    assert all(0 < row["least"] <= row["ratio"] <= row["most"] for row in found["batches"])


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype 'int8': expected one of float32"):
        bench_smaller(str(VIT), str(VIT), dtype="int8")
