"""Records that outlive their process, and who may read them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snows_hf.errors import ConfigError, SaveError
from snows_hf.method.cg import CGStatus
from snows_hf.method.newton import NewtonResult, NewtonState, NewtonStatus
from snows_hf.method.records import get_state, put_state
from snows_hf.runtime.files import work_folder
from snows_hf.runtime.journal import Digest, Journal, Record, open_journal


CPU = torch.device("cpu")
RUN = {"model": "m", "settings": {"k": 3, "layers": ()}}


class BrokenOffError(Exception):
    pass


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_a_record_comes_back_bit_for_bit(journal: Journal, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).T
    journal.put("layer-0001", {"w": tensor}, loss=0.1 + 0.2, overflow=float("inf"), text="ä")
    found = journal.get("layer-0001")
    assert found is not None and torch.equal(found.tensors["w"], tensor) and found.tensors["w"].dtype == dtype
    assert found.facts == {"loss": 0.1 + 0.2, "overflow": float("inf"), "text": "ä"}
    assert journal.get("layer-0002") is None


def test_a_new_record_replaces_the_old_one(journal: Journal, tmp_path: Path) -> None:
    for value in (1.0, 2.0, 2.0):
        journal.put("x", {"w": torch.tensor(value)})
    assert len(records(tmp_path)) == 1 and float(journal.get("x").tensors["w"]) == 2.0


def test_tensors_that_share_memory(journal: Journal) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    journal.put("x", {"a": tensor, "b": tensor, "c": tensor.T})
    found = journal.get("x").tensors
    assert torch.equal(found["a"], tensor) and torch.equal(found["b"], tensor) and torch.equal(found["c"], tensor.T)


def test_once_is_once(journal: Journal) -> None:
    for value in (1.0, 2.0):
        made = journal.once("x", lambda value=value: Record({"w": torch.tensor(value)}, {"value": value}))
        assert (float(made.tensors["w"]), made.facts) == (1.0, {"value": 1.0})


@pytest.mark.parametrize("damage", ["truncated", "emptied", "one bit", "grown", "other name"])
def test_a_damaged_record_is_none_and_is_removed(journal: Journal, tmp_path: Path, damage: str) -> None:
    journal.put("x", {"w": torch.arange(100.0)}, a=1)
    (path,) = records(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 4
    changed = {"truncated": content[:-7], "emptied": b"", "grown": content + b"x"}.get(damage, content)
    path.write_bytes(changed)
    if damage == "other name":
        path.rename(tmp_path / f"x.{'0' * 64}.safetensors")
    assert journal.get("x") is None
    assert records(tmp_path) == []


def test_half_a_write_is_not_there(journal: Journal, tmp_path: Path) -> None:
    journal.put("x", {"w": torch.arange(100.0)})
    (path,) = records(tmp_path)
    (tmp_path / "y.tmp").write_bytes(path.read_bytes()[:50])
    assert journal.names() == ["x"] and journal.get("y") is None


@pytest.mark.parametrize("best", [True, False], ids=["at its best", "past its best"])
def test_states_of_newton_come_back(journal: Journal, tmp_path: Path, best: bool) -> None:
    w = torch.arange(5.0)
    for steps in range(1, 6):
        counts = {"steps": steps, "rejected": 1, "cg_iterations": 9, "cg_statuses": [CGStatus.MAX_ITER] * steps}
        result = NewtonResult(w if best else w + 1, NewtonStatus.IMPROVED, 3.0, 2.0 / 3, **counts)
        put_state(journal, "layer-0001", NewtonState(w, w if best else w + 2, result, milestone=0.7, stale=2))
    assert len(records(tmp_path)) == 2  # the last one, and the one before it
    found = get_state(journal, "layer-0001", CPU)
    assert (found.result.w is found.w) == best == (found.mean is found.w)
    assert torch.equal(found.mean, w if best else w + 2)
    assert torch.equal(found.w, w) and torch.equal(found.result.w, result.w)
    assert {**found.result.__dict__, "w": 0} == {**result.__dict__, "w": 0}
    assert (found.milestone, found.stale) == (0.7, 2) and found.result.status is NewtonStatus.IMPROVED

    records(tmp_path)[-1].write_bytes(b"torn")
    assert get_state(journal, "layer-0001", CPU).result.steps == 4
    journal.drop("layer-0001-")
    assert get_state(journal, "layer-0001", CPU) is None


def test_it_is_gone_when_the_result_is_whole_or_nothing_is_finished(tmp_path: Path) -> None:
    with open_journal(tmp_path / "out", RUN) as journal:
        journal.put("layer-0000")
        assert journal.folder == tmp_path / ".out.snows-work" and journal.folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BrokenOffError), open_journal(tmp_path / "out", RUN) as journal:
        raise BrokenOffError
    assert list(tmp_path.iterdir()) == []


def broken_off(output: Path) -> None:
    with pytest.raises(BrokenOffError), open_journal(output, RUN) as journal:
        journal.put("layer-0000", a=1)
        raise BrokenOffError


def test_it_is_there_for_the_same_run(tmp_path: Path) -> None:
    broken_off(tmp_path / "out")
    said: list[str] = []
    with open_journal(tmp_path / "out", RUN, say=said.append) as journal:
        assert journal.get("layer-0000").facts == {"a": 1}
    assert said == ["Going on where an earlier run was broken off, with 1 layers finished"]
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_by_what_is_different_and_loses_nothing(tmp_path: Path) -> None:
    broken_off(tmp_path / "out")
    other = {"model": "m", "settings": {"k": 5, "layers": ()}, "device": "cpu"}
    with pytest.raises(ConfigError) as refused, open_journal(tmp_path / "out", other):
        pass
    assert "device was None and is 'cpu'; settings.k was 3 and is 5" in refused.value.message
    assert "--restart" in refused.value.remedy
    with open_journal(tmp_path / "out", RUN) as journal:
        assert journal.get("layer-0000") is not None


def test_restart_forgets(tmp_path: Path) -> None:
    broken_off(tmp_path / "out")
    with open_journal(tmp_path / "out", {"model": "other"}, restart=True) as journal:
        assert journal.get("layer-0000") is None


def test_records_of_an_unknown_run_are_not_believed(tmp_path: Path) -> None:
    broken_off(tmp_path / "out")
    (run,) = (tmp_path / ".out.snows-work").glob("run.*")
    run.write_bytes(b"torn")
    with open_journal(tmp_path / "out", RUN) as journal:
        assert journal.get("layer-0000") is None


def test_an_output_that_exists_has_its_journal_inside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert work_folder(tmp_path / "out") == tmp_path / "out/.out.snows-work"
    (tmp_path / ".new.snows-work").mkdir()
    (tmp_path / "new").mkdir()  # made since: the journal stays where it was
    assert work_folder(tmp_path / "new") == tmp_path / ".new.snows-work"


HOLD = """
import sys
from pathlib import Path
from snows_hf.runtime.journal import open_journal
with open_journal(Path(sys.argv[1]), {"model": "m", "settings": {"k": 3, "layers": ()}}) as journal:
    journal.put("layer-0000")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_exclude_each_other_until_one_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SaveError, match="is being made by another run"), open_journal(tmp_path / "out", RUN):
            pass
        assert records(tmp_path / ".out.snows-work")  # the other's, untouched
        other.kill()
        other.wait()
    with open_journal(tmp_path / "out", RUN) as journal:
        assert journal.get("layer-0000") is not None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"), open_journal(tmp_path / "file/out", RUN):
        pass


def test_a_record_that_cannot_be_written_keeps_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone")
    with pytest.raises(SaveError, match="Finished work cannot be kept"):
        journal.put("x", {"w": torch.zeros(3)})
    assert not shutil.os.listdir(tmp_path)


def test_digests_see_names_types_shapes_and_bits() -> None:
    def digest(tensor: torch.Tensor, name: str = "") -> str:
        made = Digest()
        made.add(tensor, name)
        return made.text()

    x = torch.tensor([[0.0, 1.0]])
    variants = [x, x.T, x.double(), -x, torch.nextafter(x, x + 1), torch.tensor(0.0)]
    assert len({digest(tensor) for tensor in variants} | {digest(x, "a")}) == len(variants) + 1
    assert digest(x) == digest(x.clone()) == digest(torch.stack([x, x])[0])
    assert digest(x.bfloat16()) != digest(x)
