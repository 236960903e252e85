"""Whatever stands in a file or an option: it is read, or refused by an error of ours."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from embedded import RESNET, VIT, copy_of
from hypothesis import example, given, settings, strategies as st

from snows_hf.cli.options import read_settings
from snows_hf.cli.prune import default_output
from snows_hf.data.names import short_name, split_revision
from snows_hf.errors import ConfigError, LoadError, PatternError, SnowsError
from snows_hf.hub.folder import library_of, read_config
from snows_hf.hub.load import load
from snows_hf.patterns import parse_pattern
from snows_hf.runtime.journal import Journal
from snows_hf.settings import PruneConfig


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*PruneConfig("2:4").to_dict(), "damping", "cg_max_iter", "colour"])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.from_regex(r"-?\d*[:.]?-?\d*", fullmatch=True))
@example(".1000000000001")
def test_patterns(text: str) -> None:
    try:
        assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)
    except PatternError as error:
        assert error.message


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60) | st.text().map(str.encode) | st.dictionaries(NAMES, VALUES).map(json.dumps).map(str.encode)
)
def test_settings_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.yaml"
        path.write_bytes(content)
        try:
            PruneConfig("2:4").updated(**read_settings(path, PruneConfig("2:4")))
        except ConfigError as error:
            assert error.message


def test_settings_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("k: 3\naugment: false\npermute: true\ndamping: 1e-3\nmask: wanda\nlayers: ['*.fc1']\n")
    expected = {"k": 3, "augment": False, "permute": True, "damping": 1e-3, "mask": "wanda", "layers": ("*.fc1",)}
    config = PruneConfig("2:4").updated(**read_settings(path, PruneConfig("2:4"))).to_dict()
    assert {name: {**config, **config["solver"]}[name] for name in expected} == expected
    for wrong in ("augment: 1", "permute: 'no'", "k: true", "k: 1.5", "damping: yes", "mask: 3"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="expected"):
            read_settings(path, PruneConfig("2:4"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(json.dumps).map(str.encode))
def test_config_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(content)
        try:
            assert library_of(read_config(Path(folder)), Path(folder)) in ("timm", "transformers")
        except LoadError as error:
            assert error.message


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tiny checkpoints of both libraries."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    timm.models.save_for_hf(model, str(folder / "timm"), {"label_names": ["a"] * 1000}, safe_serialization=True)
    return [copy_of(VIT, folder / "vit"), copy_of(RESNET, folder / "resnet"), folder / "timm"]


# No large numbers: what they ask for would be made.
ODD = st.recursive(
    st.sampled_from([None, True, False, -1, 0, 1, 3, 17, -1.0, 0.5, math.nan, math.inf, "", "x", "17", "float16"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "1", "height"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_configurations(folders: list[Path], data: st.DataObject) -> None:
    """However the configuration of a checkpoint is damaged, it is loaded, or refused."""
    folder = data.draw(st.sampled_from(folders))
    path = data.draw(st.sampled_from(sorted(folder.glob("*config.json"))))
    content = path.read_text()
    config = json.loads(content)
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from([config, *(v for v in config.values() if isinstance(v, dict) and v)]))
        part[data.draw(st.sampled_from([*part, "auto_map", "quantization_config", "attn_implementation"]))] = (
            data.draw(ODD)
        )
    try:
        path.write_text(json.dumps(config))
        load(str(folder))
    except SnowsError as error:
        assert error.message
    finally:
        path.write_text(content)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=20))
def test_names_of_models_and_data(name: str) -> None:
    assert "/" not in str(default_output(name, "2:4"))
    short_name(name)
    split_revision(name)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_records(data: st.DataObject) -> None:
    """However a record is damaged, it comes back as it was or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder))
        journal.put("x", {"w": torch.arange(5.0)}, a=[1, {"b": None}])
        (path,) = Path(folder).iterdir()
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.integers(0, len(content)))
            content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        path.write_bytes(content)
        found = journal.get("x")
        assert found is None or (found.facts == {"a": [1, {"b": None}]} and found.tensors["w"].tolist() == [*range(5)])
