"""Two processes, as the launcher starts them, against one: the same weights, whichever way the images divide."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from embedded import DIGITS, NO_HUB, VIT, tensors_of

from snows_hf.runtime.device import find_device


SETTINGS = "layer_steps: 2\njoint_steps: 3\nbatch_size: 7\n"  # 7 divides neither by 2 nor the images


FULL = """
import os, sys
import torch
from snows_hf.cli import main
from snows_hf.method.objective import KStepObjective

def expand(objective, w):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")

if os.environ["RANK"] == "1":
    KStepObjective.expand = expand
sys.exit(main())
"""
"""The command, for processes of which one runs out of memory."""

ALONE = """
import os
import torch.distributed
from snows_hf.runtime.distributed import share
from snows_hf.errors import ProcessError

torch.distributed.init_process_group("gloo")
if os.environ["RANK"] == "1":
    os._exit(1)
try:
    share(4).sum(torch.ones(3))
except ProcessError as error:
    print(error.message)
"""
"""Two processes, of which one ends before a sum of both."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launch(
    processes: int, *arguments: object, program: tuple[str, ...] = ("-m", "snows_hf")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    # Named after GPUs, it starts processes wherever it is.
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]
    command += [free_port(), *program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": NO_HUB}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "gradual", "dtype", "tolerance"),
    [
        ("1:4", 0.7, "float64", 1e-5),
        ("2:4", 0, "float64", 1e-5),
        ("2:4", 0, "float32", 1e-3),
    ],
)
def test_two_processes_come_to_the_weights_of_one(
    run, elsewhere: Path, pattern: str, gradual: float, dtype: str, tolerance: float
) -> None:
    """Joint steps, gradual ones and a Gram preconditioner included; the held-out batch has one image, for two. What
    float32 leaves between them is rounding, which the preconditioner makes more of (docs/results.md)."""
    Path("s.yaml").write_text(SETTINGS + f"gradual: {gradual}\n")
    options = ("prune", VIT, "--pattern", pattern, "--data", DIGITS, "--samples", 20, "--k", 3, "--dtype", dtype)
    options += ("--config", "s.yaml", "--mask", "wanda", "--json", "--eval-data", DIGITS, "--output")
    two = launch(2, *options, "two")
    assert two.returncode == 0, two.stderr
    report = json.loads(two.stdout)  # one of them alone speaks
    one = json.loads(run(*options, "one").out)
    assert (report["processes"], one["processes"]) == (2, 1)
    assert report["pruned"] == one["pruned"]
    first, second = tensors_of(Path("one")), tensors_of(Path("two"))
    for name, tensor in first.items():
        assert ((tensor == 0) == (second[name] == 0)).all()
        if tensor.is_floating_point():
            assert (tensor - second[name]).norm() <= tolerance * tensor.norm(), name
    assert {path.name for path in elsewhere.iterdir()} == {"one", "two", "s.yaml"}
    # The losses agree to rounding, of steps that follow one another.
    for alone, together in zip(one["layers"], report["layers"], strict=True):
        assert together["loss_pruned"] == pytest.approx(alone["loss_pruned"], rel=tolerance)
        assert together["steps"] == alone["steps"]


def test_an_error_of_the_main_process_ends_all(elsewhere: Path) -> None:
    (elsewhere / "out").mkdir()
    (elsewhere / "out/file").write_text("")
    failed = launch(2, "prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--output", "out")
    assert failed.returncode != 0
    assert "Error: Output out exists and is not empty" in failed.stderr
    assert os.listdir("out") == ["file"]


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_ends_all(elsewhere: Path) -> None:
    """The others would wait for its part of the next sum; what was kept is there for a command that fits."""
    (elsewhere / "full.py").write_text(FULL)
    options = "prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--output", "out"
    failed = launch(2, *options, program=("full.py",))
    assert failed.returncode != 0
    assert "Process 1: Error: vit.layers.0.attention.qkv: out of memory, in one process of several." in failed.stderr
    assert failed.stderr.count("Traceback") == 1  # the launcher's own
    assert sorted(os.listdir()) == [".out.snows-work", "full.py"]


@pytest.mark.slow
def test_a_process_that_is_left_alone_says_so() -> None:
    """A launcher may end it first; several machines have one each."""
    together = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", ALONE]
    with subprocess.Popen(command, env=together | {"RANK": "1"}):
        left = subprocess.run(
            command, env=together | {"RANK": "0"}, capture_output=True, text=True, timeout=120, check=True
        )
    assert left.stdout.startswith("Another process has ended, and this one cannot go on alone")


def test_one_process_gets_whichever_device_it_asks_for() -> None:
    """accelerate's state, which is the process's, would keep to the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    asked = ["cpu", "cuda", "auto", "cpu"] if torch.cuda.is_available() else ["cpu", "auto"]
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert [find_device(device).type for device in asked] == [best if device == "auto" else device for device in asked]
    assert not AcceleratorState._shared_state
