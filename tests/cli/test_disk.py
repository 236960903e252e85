"""Disks that are too small, at the start and at the end of a prune."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from embedded import DIGITS, VIT
from quick import slow

from snows_hf import prune
from snows_hf.errors import SaveError
from snows_hf.hub import save


ARGUMENTS = ("prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--k", 0, "--output")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 200 kB, or whatever the test says: the embedded ViT has 320."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '200k')}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_without_room_is_refused_before_the_work(run, small_disk: Path) -> None:
    result = run(*ARGUMENTS, small_disk / "out")
    assert (result.code, result.out) == (1, "")
    assert "needs 1.0 MB, and its disk has 0.2 MB left" in result.err
    assert "Pruning" not in result.err
    assert list(small_disk.iterdir()) == []


SETTINGS = {"data": str(DIGITS), "samples": 8, "k": 0, "sweeps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that a disk with room would have."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    prune(str(VIT), "2:4", output=folder, **SETTINGS)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["out", slow(".")])
@pytest.mark.parametrize("when", [slow("Pruning"), "Saving"])
@pytest.mark.parametrize("small_disk", ["2400k"], indirect=True)
def test_a_disk_that_fills_up_in_the_meantime(small_disk: Path, when: str, name: str, whole: bytes) -> None:
    """What was finished is kept, and when there is room again the same call gives the result."""
    output, filler = small_disk / name, small_disk.resolve() / "filler"
    if name == ".":
        filler = small_disk / f".{small_disk.name}.snows-work/filler"  # a mount point must be empty

    def fill(stage: str) -> None:
        if stage.startswith(when):
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(SaveError, match="No space left") as refused:
        prune(str(VIT), "2:4", output=output, on_stage=fill, **SETTINGS)
    assert ("Finished work cannot be kept" if when == "Pruning" else "cannot be written") in refused.value.message
    filler.unlink()
    assert all("snows-work" in path.name for path in small_disk.iterdir())
    prune(str(VIT), "2:4", output=output, **SETTINGS)
    assert not any("snows-work" in path.name for path in small_disk.iterdir())
    assert (output / "model.safetensors").read_bytes() == whole


def test_a_file_size_limit(run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = import_module("snows_hf.jobs.prune")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_checkpoint(*arguments: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save.save_checkpoint(*arguments)

    monkeypatch.setattr(job, "save_checkpoint", save_checkpoint)
    try:
        result = run(*ARGUMENTS, "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result.code, result.out) == (1, "")
    assert "out cannot be written" in result.err
    assert "is kept in" in result.err and "Traceback" not in result.err
    assert [path.name for path in elsewhere.iterdir()] == [".out.snows-work"]
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    assert run(*ARGUMENTS, "out").code == 0
    assert [path.name for path in elsewhere.iterdir()] == ["out"]
