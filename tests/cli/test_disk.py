"""Disks that are too small, at the start and at the end of a prune."""

import resource
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from embedded import DIGITS, VIT

from snows_hf.hub import save


ARGUMENTS = ("prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--k", 0, "--output")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB: the embedded ViT has 320."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
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
    assert "needs 0.3 MB, and its disk has 0.2 MB left" in result.err
    assert "Pruning" not in result.err
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "."])
def test_a_disk_that_fills_up_in_the_meantime(
    run, small_disk: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    result = run(*ARGUMENTS, small_disk / name)
    assert (result.code, result.out) == (1, "")
    assert f"Error: Output {(small_disk / name).resolve()} cannot be written" in result.err
    assert "No space left" in result.err
    assert "Traceback" not in result.err
    assert list(small_disk.iterdir()) == []


def test_a_file_size_limit(run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = import_module("snows_hf.prune")
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
    assert "Traceback" not in result.err
    assert list(elsewhere.iterdir()) == []
