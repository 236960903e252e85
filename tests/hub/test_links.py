"""Links that lead out of a model's folder: what they point to is not copied, packed or published."""

import json
from pathlib import Path

import pytest
from embedded import VIT, copy_of, pruned

from snows_hf import load, pack, push, unpack
from snows_hf.errors import LoadError
from snows_hf.hub.folder import leads_out


SECRET = "my private key"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of(VIT, tmp_path / "m")


def texts_of(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_a_licence_elsewhere_is_left_out_and_named(folder: Path, secret: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").symlink_to(secret)
    (folder / "LICENSE.own").write_text("Do good.")
    (folder / "LICENSE.too").symlink_to("LICENSE.own")
    stages: list[str] = []
    result = pruned(folder, tmp_path / "out", on_stage=stages.append)
    assert stages[-1] == "Left out, since they are links to files elsewhere: LICENSE"
    assert SECRET not in texts_of(result.folder)
    assert (result.folder / "LICENSE.own").read_text() == (result.folder / "LICENSE.too").read_text() == "Do good."
    assert result.report["left_out"] == ["LICENSE"]
    assert json.loads((result.folder / "snows_config.json").read_text())["left_out"] == ["LICENSE"]
    assert "Not copied from it, since they are links to files elsewhere: LICENSE." in texts_of(result.folder)


def test_a_card_elsewhere_is_not_asked_for_the_licence(folder: Path, secret: Path, tmp_path: Path) -> None:
    secret.write_text(f"---\nlicense: {SECRET}\n---\n")
    (folder / "README.md").symlink_to(secret)
    assert SECRET not in texts_of(pruned(folder, tmp_path / "out").folder)


@pytest.mark.parametrize("name", ["LICENSE", "notes/a.txt", "notes", "README.md", "config.json"])
@pytest.mark.parametrize("how", ["pack", "unpack"])
def test_a_copy_with_a_link_to_elsewhere_is_refused(
    how: str, name: str, folder: Path, secret: Path, tmp_path: Path
) -> None:
    if how == "unpack":
        pack(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if name == "config.json":
        path.rename(secret.parent / "config.json")
    path.symlink_to({"notes": secret.parent, "config.json": secret.parent / "config.json"}.get(name, secret))
    with pytest.raises(LoadError, match=r"is a link to .*elsewhere/.*, which is no part of the checkpoint"):
        (pack if how == "pack" else unpack)(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_checkpoint_that_is_elsewhere_is_not_pushed(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    load(folder)  # to read it is no harm
    with pytest.raises(LoadError, match=f"{name} is a link to .*, and is not copied"):
        push(folder, "me/new")


def test_snapshots_of_the_hubs_cache_are_links(tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "hub/models--me--vit/snapshots/0123"
    blobs = snapshot.parents[1] / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for source in VIT.iterdir():
        (blobs / f"of-{source.name}").write_bytes(source.read_bytes())
        (snapshot / source.name).symlink_to(f"../../blobs/of-{source.name}")
    (blobs / "licence").write_text("Do good.")
    (snapshot / "LICENSE").symlink_to("../../blobs/licence")
    pack(snapshot, tmp_path / "packed")
    assert (tmp_path / "packed/LICENSE").read_text() == "Do good."
    assert "left_out" not in pruned(snapshot, tmp_path / "out").report
    (tmp_path / "link").symlink_to(snapshot)  # and a folder may have another name
    pack(tmp_path / "link", tmp_path / "again")
    (snapshot / "NOTICE").symlink_to(secret)
    with pytest.raises(LoadError, match="NOTICE is a link"):
        pack(snapshot, tmp_path / "more")
    other = tmp_path / "hub/models--me--other/blobs"
    other.mkdir(parents=True)
    (other / "x").write_text(SECRET)
    (snapshot / "x").symlink_to(other / "x")
    assert leads_out(snapshot / "x", snapshot) and not leads_out(snapshot / "LICENSE", snapshot)
