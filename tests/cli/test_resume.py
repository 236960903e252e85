"""A prune that is broken off goes on with the same command, and gives the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from embedded import DIGITS, NO_HUB, RESNET, VIT, copy_of, tensors_of, write_tensors
from safetensors.torch import save_file

from snows_hf import prune
from snows_hf.errors import ConfigError
from snows_hf.patterns import NM
from snows_hf.runtime.run import Progress


QUICK = {"data": str(DIGITS), "samples": 32, "k": 1, "sweeps": 1}
JOINT = QUICK | {"mask": "sparsegpt", "layer_steps": 1, "joint_steps": 6, "batch_size": 16}
WORK = ".out.snows-work"


class BrokenOffError(Exception):
    pass


def after(steps: int) -> Callable[[Progress], None]:
    """Something to send progress to, which breaks the run off after so many Newton steps."""
    seen = 0

    def on_progress(progress: Progress) -> None:
        nonlocal seen
        seen += "CG iterations" in progress.detail
        if seen == steps:
            raise BrokenOffError

    return on_progress


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of a prune with a joint solve that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    result = prune(str(RESNET), "2:4", output=folder / "out", **JOINT)
    assert result.report["later_sweeps"][0]["steps"] == 6
    return weights(folder / "out")


@pytest.mark.slow
def test_broken_off_again_and_again(joint: bytes, tmp_path: Path) -> None:
    """Between layers, and between the steps of the joint solve."""
    said: list[str] = []
    for _ in range(20):
        try:
            prune(str(RESNET), "2:4", output=tmp_path / "out", on_progress=after(3), on_stage=said.append, **JOINT)
            break
        except BrokenOffError:
            assert not (tmp_path / "out").exists()
    assert sum("is kept in" in line for line in said) >= 4
    assert weights(tmp_path / "out") == joint
    assert not (tmp_path / WORK).exists()
    assert any("with 8 layers finished" in line for line in said)


@pytest.mark.slow
def test_torn_files_are_made_again(joint: bytes, tmp_path: Path) -> None:
    for steps, damage in ((3, b"torn"), (9, None)):
        with suppress(BrokenOffError):
            prune(str(RESNET), "2:4", output=tmp_path / "out", on_progress=after(steps), **JOINT)
        newest = max((tmp_path / WORK).glob("layer-*"), key=lambda path: path.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:-9] if damage is None else damage)
    prune(str(RESNET), "2:4", output=tmp_path / "out", **JOINT)
    assert weights(tmp_path / "out") == joint


def broken_off(
    *options: object, after_layers: int = 3, records: str = "layer", by: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """A process that is killed once so many layers, or masks of layers, are finished: exit code and stderr."""
    command = [sys.executable, "-m", "snows_hf", *command_line(*options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": NO_HUB}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(list(Path(WORK).glob(f"{records}-*.safetensors"))) < after_layers:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(by)
        error = process.communicate()[1].decode()
    assert Path(WORK).is_dir() and not Path("out").exists()
    return process.returncode, error


def command_line(*options: object, model: Path = VIT) -> list[str]:
    given = ("prune", model, "--pattern", "2:4", "--data", DIGITS, "--samples", 32, "--k", 1, "--output", "out")
    return [str(word) for word in (*given, "--set", "sweeps=1", *options)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes: how work is split among threads decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_twice(run, elsewhere: Path, one_thread: None) -> None:
    for layers in (3, 9):
        broken_off("--eval-data", DIGITS, after_layers=layers)
    done = run(*command_line("--eval-data", DIGITS))
    assert done.code == 0
    assert "Going on where an earlier run was broken off" in done.err
    assert "Measuring the pruned model" in done.err
    assert "Measuring the dense" not in done.err and "Measuring the masked" not in done.err
    assert os.listdir() == ["out"]
    prune(str(VIT), "2:4", output="whole", **QUICK)
    assert weights(Path("out")) == weights(Path("whole"))


def records_of_masks() -> dict[str, int]:
    """Names of the records of single layers' masks, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(WORK).glob("choice-layer-*.safetensors")}


def test_masks_of_layers_are_not_chosen_again(elsewhere: Path, small_vit: Path) -> None:
    layers = 0
    found: dict[str, int] = {}
    said: list[str] = []

    def break_off(progress: Progress) -> None:
        if progress.stage == "Layers of alps masks" and progress.done == 5:
            raise BrokenOffError

    def watch(progress: Progress) -> None:
        nonlocal layers
        if progress.stage == "Layers of alps masks":
            layers = progress.total
            found.update(records_of_masks())

    prune(small_vit, "2:4", output="whole", mask="alps", **QUICK)
    with pytest.raises(BrokenOffError):
        prune(small_vit, "2:4", output="out", mask="alps", on_progress=break_off, on_stage=said.append, **QUICK)
    kept = records_of_masks()
    assert len(kept) == 5 and "is kept in" in said[-1]
    prune(small_vit, "2:4", output="out", mask="alps", on_progress=watch, on_stage=said.append, **QUICK)
    assert "Going on where an earlier run was broken off, with masks of 5 layers" in said
    assert kept.items() <= found.items()  # untouched
    assert len(found) == layers > 5  # the others alone were chosen anew
    assert weights(Path("out")) == weights(Path("whole"))


@pytest.mark.slow
def test_killed_while_masks_are_chosen(run, elsewhere: Path, one_thread: None) -> None:
    broken_off("--mask", "obc", records="choice-layer")
    kept = len(records_of_masks())
    done = run(*command_line("--mask", "obc"))
    assert done.code == 0 and f"with masks of {kept} layers" in done.err
    prune(str(VIT), "2:4", output="whole", mask="obc", **QUICK)
    assert weights(Path("out")) == weights(Path("whole"))


@pytest.mark.slow
def test_ctrl_c_while_masks_are_chosen_says_what_is_kept(run, elsewhere: Path) -> None:
    code, error = broken_off("--mask", "obc", "--no-update", records="choice-layer", by=signal.SIGINT)
    assert code == 130 and "Traceback" not in error
    assert f"is kept in {elsewhere / WORK}: the same command goes on from there" in " ".join(error.split())
    assert f"with masks of {len(records_of_masks())} layers" in run(*command_line("--mask", "obc", "--no-update")).err


def keep_three_layers(model: Path, **settings: object) -> None:
    with pytest.raises(BrokenOffError):
        prune(str(model), "2:4", output="out", on_progress=after(8), **(QUICK | settings))
    assert len(list(Path(WORK).glob("layer-*"))) >= 3


def test_what_is_different_is_refused(run, elsewhere: Path, tmp_path: Path, small_vit: Path) -> None:
    model = copy_of(small_vit, tmp_path / "model")
    keep_three_layers(model)
    before = sorted(Path(WORK).iterdir())
    tensors = tensors_of(model)
    tensors["classifier.bias"][0] += 1e-6
    other = write_tensors(copy_of(small_vit, tmp_path / "other"), tensors)
    for options, changed in (
        (command_line("--k", 2, model=model), "settings.k was 1 and is 2"),
        (command_line("--seed", 1, model=model), "calibration images was"),
        (command_line("--dtype", "float64", model=model), "dtype was 'float32' and is 'float64'"),
        (command_line("--mask", "wanda", model=model), "settings.mask was 'alps' and is 'wanda'"),
        (command_line(model=other), "model was"),
    ):
        result = run(*options)
        assert (result.code, result.out) == (1, "")
        assert changed in result.err and "--restart" in result.err and "Traceback" not in result.err
        assert sorted(Path(WORK).iterdir()) == before
    again = run(*command_line("--k", 2, "--restart", "--quiet", model=model))
    assert again.code == 0
    assert os.listdir() == ["out"]


def test_another_budget_of_memory_is_no_other_run(elsewhere: Path, small_vit: Path) -> None:
    keep_three_layers(small_vit)
    assert prune(small_vit, "2:4", output="out", memory=100.0, **QUICK).output == Path("out")


def test_killed_while_the_result_moves_to_its_place(elsewhere: Path, small_vit: Path) -> None:
    """Half of the files are there, and the same command still succeeds; a stranger's are refused as ever."""
    prune(small_vit, "2:4", output="whole", **QUICK)
    keep_three_layers(small_vit)
    shutil.copytree("whole", "out")
    with pytest.raises(Exception, match="exists and is not empty"):
        prune(small_vit, "2:4", output="out", **QUICK)
    (Path(WORK) / "placing").touch()
    Path("out/model.safetensors").unlink()
    prune(small_vit, "2:4", output="out", **QUICK)
    assert weights(Path("out")) == weights(Path("whole"))
    assert sorted(os.listdir()) == ["out", "whole"]


def test_an_empty_folder_that_exists(elsewhere: Path, small_vit: Path) -> None:
    Path("out").mkdir()
    with pytest.raises(BrokenOffError):
        prune(small_vit, "2:4", output="out", on_progress=after(8), **QUICK)
    assert os.listdir("out") == [WORK]
    prune(small_vit, "2:4", output="out", **QUICK)
    assert WORK not in os.listdir("out") and "model.safetensors" in os.listdir("out")


def test_weights_of_a_criterion_are_kept_too(elsewhere: Path, small_vit: Path) -> None:
    """Masks and weights are read back in place of being computed again."""
    settings = {"mask": "sparsegpt", "layers": ("*.0.*",)}
    prune(small_vit, "2:4", output="whole", **(QUICK | settings))
    said: list[str] = []
    with pytest.raises(BrokenOffError):
        prune(small_vit, "2:4", output="out", on_progress=after(2), **(QUICK | settings))
    prune(small_vit, "2:4", output="out", on_stage=said.append, **(QUICK | settings))
    assert weights(Path("out")) == weights(Path("whole"))
    assert not any("Choosing masks" in line for line in said)


def test_a_mask_file_that_has_changed_is_refused(elsewhere: Path, small_vit: Path) -> None:
    name = "vit.layers.1.mlp.fc1.weight"
    weight = torch.randn(96, 48, generator=torch.Generator().manual_seed(0))
    save_file({name: NM(2, 4).mask(weight.abs())}, "m.safetensors")
    with pytest.raises(BrokenOffError):
        prune(small_vit, "2:4", output="out", on_progress=after(1), mask="m.safetensors", **QUICK)
    save_file({name: NM(2, 4).mask(-weight.abs())}, "m.safetensors")
    with pytest.raises(ConfigError, match=r"settings\.mask was"):
        prune(small_vit, "2:4", output="out", mask="m.safetensors", **QUICK)
