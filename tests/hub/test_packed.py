"""The packed file: lossless, small, refused by stock loaders, and safe to read whoever wrote it."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from embedded import DIGITS, VIT, Pruned, copy_of, edit_config, pruned, tensors_of
from hypothesis import given, settings, strategies as st
from quick import slow
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from snows_hf import load, prune
from snows_hf.errors import ConfigError, LoadError, SaveError
from snows_hf.hub.packed import (
    PACKED_FILE,
    SUFFIXES,
    check_packed,
    pack_tensor,
    read_packed,
    unpack_tensor,
    write_packed,
)
from snows_hf.hub.repack import pack, unpack
from snows_hf.patterns import NM


INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
DTYPES = list(INTEGERS)
ROOT = Path(__file__).resolve().parents[2]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit patterns that are not zero: NaNs with payloads, infinities, denormals and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGERS[dtype])
    bits = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=INTEGERS[dtype])
    bits[bits == 0] = 1
    bits.flatten()[0] = limits.min  # -0.0
    return bits.view(dtype)


def masked(shape: tuple[int, ...], dtype: torch.dtype, pattern: str, seed: int) -> Tensor:
    """Random bits with the zeros of a pattern."""
    tensor = random_bits(shape, dtype, seed)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        mask = NM(n, m).mask(scores)
    else:
        mask = scores >= float(pattern)
    return torch.where(mask, tensor.view(INTEGERS[dtype]), 0).view(dtype)


def round_trip(tensor: Tensor) -> Tensor:
    parts = pack_tensor(tensor)
    return tensor if parts is None else unpack_tensor("w", parts)


@given(
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "1:2", "4:8", "2:8", "1:16", "0", "0.1", "0.5", "0.7", "0.99", "1"]),
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 3)]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_every_bit_survives(dtype, pattern, rows, groups, kernel, seed) -> None:
    m = int(pattern.split(":")[1]) if ":" in pattern else 3
    tensor = masked((rows, m * groups, *kernel), dtype, pattern, seed)
    assert same_bits(round_trip(tensor), tensor)
    assert same_bits(round_trip(tensor.flatten()), tensor.flatten())


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_pattern_of_zeros_survives(data) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape))))
    tensor = torch.where(kept.view(shape), random_bits(shape, dtype, 0).view(INTEGERS[dtype]), 0).view(dtype)
    assert same_bits(round_trip(tensor), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_and_nan_payloads_are_values(dtype: torch.dtype) -> None:
    bits = torch.zeros(8, 64, dtype=INTEGERS[dtype])
    limits = torch.iinfo(INTEGERS[dtype])
    bits[0, 0], bits[1, 5], bits[2, 7] = limits.min, limits.max, -1  # -0.0, and two NaNs
    tensor = bits.view(dtype)
    assert len(pack_tensor(tensor)[":values"]) == 3
    assert same_bits(round_trip(tensor), tensor)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    tensor = masked((16, 32), torch.float32, "2:4", 0)
    other = tensor.T.contiguous().T if layout == "transposed" else torch.stack([tensor, tensor], -1)[..., 0]
    assert not other.is_contiguous()
    assert same_bits(round_trip(other), tensor)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 0.54), (torch.float16, 0.57), (torch.bfloat16, 0.57)])
def test_size_of_2_to_4(dtype: torch.dtype, limit: float, kernel: tuple[int, ...]) -> None:
    tensor = masked((64, 96, *kernel), dtype, "2:4", 3)
    parts = pack_tensor(tensor)
    assert parts.keys() == {":values", ":shape", ":2to4"}
    size = sum(part.nbytes for part in parts.values())
    assert size <= limit * tensor.nbytes
    # Two of four values, a byte for twelve weights, and the shape.
    assert size == tensor.nbytes / 2 + tensor.numel() / 12 + 8 * tensor.ndim


@pytest.mark.parametrize("pattern, kept", [("1:4", 1 / 4), ("0.7", 0.3)])
def test_size_of_other_patterns(pattern: str, kept: float) -> None:
    tensor = masked((256, 256), torch.float32, pattern, 3)
    parts = pack_tensor(tensor)
    assert parts.keys() == {":values", ":shape", ":bitmask"}
    assert sum(part.nbytes for part in parts.values()) / tensor.nbytes == pytest.approx(kept + 1 / 32, abs=0.01)


def test_what_does_not_shrink_is_stored_as_it_is(tmp_path: Path) -> None:
    tensors = {
        "dense": torch.randn(8, 8),
        "count": torch.zeros(100, dtype=torch.int64),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0, 4),
        "sparse": masked((32, 32), torch.float32, "2:4", 0),
    }
    write_packed(tmp_path / "m", tensors, {"format": "pt", "a": "b"})
    with safe_open(tmp_path / "m", "pt") as file:
        names = set(file.keys())
    assert names == {"dense", "count", "scalar", "empty", "sparse:values", "sparse:shape", "sparse:2to4"}
    read, metadata = read_packed(tmp_path / "m")
    assert metadata == {"format": "pt", "a": "b"}
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensors[name]) for name in tensors)


def test_names_that_would_be_mistaken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="a:values cannot be packed"):
        write_packed(tmp_path / "m", {"a:values": torch.zeros(4)}, None)


# ---- hostile files

HEADER = {"snows_packed": '{"version": 1, "metadata": null}'}
BITMASK, FIXED = masked((6, 10), torch.float32, "0.8", 0), masked((6, 12), torch.float32, "2:4", 0)


def int64(*sizes: int) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64)


@pytest.mark.parametrize("tensor", [BITMASK, FIXED], ids=["bitmask", "2to4"])
@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda p, mask: p.pop(":values"), "a part is missing"),
        (lambda p, mask: p.pop(":shape"), "a part is missing"),
        (lambda p, mask: p.pop(mask), "a part is missing"),
        (lambda p, mask: p.update({":2to4": p[mask].clone(), ":bitmask": p[mask].clone()}), "one too many"),
        (lambda p, mask: p.update({":shape": int64(2**62, 2**62)}), "its mask has"),
        (lambda p, mask: p.update({":shape": int64(2**32, 2**32, 4)}), "its mask has"),  # 0 in 64 bits
        (lambda p, mask: p.update({":shape": int64(0, 2**62)}), "a dimension below 1"),
        (lambda p, mask: p.update({":shape": int64(-6, -12)}), "a dimension below 1"),
        (lambda p, mask: p.update({":shape": int64()}), "not a list of dimensions"),
        (lambda p, mask: p.update({":shape": int64(*[1] * 9)}), "not a list of dimensions"),
        (lambda p, mask: p.update({":shape": torch.tensor([6.0, 12.0])}), "not a list of dimensions"),
        (lambda p, mask: p.update({":shape": torch.tensor(12)}), "one dimension each"),
        (lambda p, mask: p.update({mask: torch.cat([p[mask], p[mask]])}), "its mask has"),
        (lambda p, mask: p.update({mask: p[mask][:-1]}), "its mask has"),
        (lambda p, mask: p.update({mask: p[mask].to(torch.int8)}), "a mask of type torch.int8"),
        (lambda p, mask: p.update({mask: p[mask][None]}), "one dimension each"),
        (lambda p, mask: p.update({mask: torch.full_like(p[mask], 255)}), "unknown choice|longer than the tensor"),
        (lambda p, mask: p.update({":values": p[":values"][:-1]}), "values for a mask that keeps"),
        (lambda p, mask: p.update({":values": p[":values"].repeat(2)}), "values for a mask that keeps"),
        (lambda p, mask: p.update({":values": p[":values"].to(torch.int32)}), "values of type torch.int32"),
        (lambda p, mask: p.update({":values": p[":values"].to(torch.complex64)}), "values of type torch.complex64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tensor: Tensor, change, fault: str, tmp_path: Path) -> None:
    parts = pack_tensor(tensor)
    change(parts, next(suffix for suffix in parts if suffix in (":2to4", ":bitmask")))
    save_file({f"w{suffix}": part for suffix, part in parts.items()}, tmp_path / "m", HEADER)
    for read in (check_packed, read_packed):
        with pytest.raises(LoadError, match=rf"Packed tensor w: .*({fault})"):
            read(tmp_path / "m")


def test_bits_past_the_end_are_refused() -> None:
    for tensor in (masked((5, 5), torch.float32, "0.8", 0), masked((5, 4), torch.float32, "2:4", 0)):
        parts = pack_tensor(tensor)
        mask = next(suffix for suffix in parts if suffix in (":2to4", ":bitmask"))
        parts[mask][-1] += 1 if mask == ":bitmask" else 36
        with pytest.raises(LoadError, match=r"longer than the tensor|unknown choice"):
            unpack_tensor("w", parts)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"format": "pt"},
        *(
            {"snows_packed": text}
            for text in (
                "",
                "no JSON",
                "[1]",
                '{"version": 2, "metadata": null}',
                '{"version": 1}',
                '{"version": 1, "metadata": [1]}',
                '{"version": 1, "metadata": {"a": 1}}',
                "[" * 100_000,
            )
        ),
    ],
)
def test_metadata_that_lie_are_refused(header: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "m", header)
    with pytest.raises(LoadError, match=r"m is not a packed file of version 1"):
        read_packed(tmp_path / "m")


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    parts = {f"w{suffix}": part for suffix, part in pack_tensor(FIXED).items()}
    save_file({**parts, "w": FIXED}, tmp_path / "m", HEADER)
    with pytest.raises(LoadError, match="holds w twice"):
        check_packed(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    write_packed(tmp_path / "m", {"w": FIXED}, None)
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:keep])
    with pytest.raises(LoadError, match="corrupt or truncated"):
        check_packed(tmp_path / "m")


@pytest.mark.slow
def test_mutated_files_are_refused_or_read() -> None:
    """The whole of the fuzz benchmark, on fewer files."""
    script = ROOT / "benchmarks" / "fuzz_packed.py"
    run = warm.run("-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", "--files", 150)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- folders


@pytest.fixture(scope="session")
def packed(results: dict[str, Pruned], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pruned models of every family, packed."""
    folder = tmp_path_factory.mktemp("packed")
    for name, result in results.items():
        pack(result.folder, folder / name)
    return {name: folder / name for name in results}


FAMILIES = ["vit", slow("resnet"), slow("timm")]


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_there_and_back(family: str, results, packed, tmp_path: Path) -> None:
    unpack(packed[family], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in results[family].folder.iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after == before
    names = {path.name for path in packed[family].iterdir()}
    assert names == before.keys() - {"model.safetensors"} | {PACKED_FILE}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_says_how_to_load_what_is_packed(family: str, packed) -> None:
    shown = re.sub("<!--.*?-->", "", (packed[family] / "README.md").read_text(), flags=re.DOTALL)
    assert "ordinary checkpoint;" not in shown
    snippets = [code for code in re.findall("```python\n(.*?)```", shown, re.DOTALL) if "accelerate" not in code]
    assert len(snippets) == 1
    names: dict[str, Any] = {}
    exec(snippets[0].replace("THIS_FOLDER", str(packed[family])), names)
    expected = load(str(packed[family])).model.state_dict()
    assert all(same_bits(tensor, expected[name]) for name, tensor in names["model"].state_dict().items())


@pytest.mark.parametrize(
    "card", ["", "# M\nno end of line", "# M\r\n", "\n## How to load it\nSo", "\n## How to load it\n\n## B\n"]
)
def test_any_card_comes_back(card: str, results, tmp_path: Path) -> None:
    source = copy_of(results["vit"].folder, tmp_path / "m")
    (source / "README.md").write_bytes(card.encode())
    before = pack(str(source), str(tmp_path / "packed"))
    after = unpack(str(tmp_path / "packed"), str(tmp_path / "out"))
    assert b"This copy is packed" in (tmp_path / "packed/README.md").read_bytes()
    assert (tmp_path / "out/README.md").read_bytes() == card.encode()
    assert before["bytes_before"] == after["bytes_after"] > before["bytes_after"] == after["bytes_before"]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_matrices_shrink(family: str, results, packed) -> None:
    dense = tensors_of(results[family].folder)
    stored = load_file(packed[family] / PACKED_FILE)
    names = {key.removesuffix(":2to4") for key in stored if key.endswith(":2to4")}
    assert len(names) == sum(len(layer["parameters"]) for layer in results[family].report["layers"])
    small = sum(stored[name + suffix].nbytes for name in names for suffix in SUFFIXES if name + suffix in stored)
    assert small <= 0.54 * sum(dense[name].nbytes for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_gives_the_same_model(family: str, results, packed) -> None:
    expected, got = load(str(results[family].folder)), load(str(packed[family]))
    for (name, a), b in zip(expected.model.state_dict().items(), got.model.state_dict().values(), strict=True):
        assert same_bits(a, b), name
    assert got.config == expected.config
    assert got.class_names == expected.class_names
    images = torch.randn(2, 3, *((16, 16) if family != "resnet" else (32, 32)))
    with torch.no_grad():
        a, b = (checkpoint.model(images) for checkpoint in (expected, got))
    assert torch.equal(getattr(a, "logits", a), getattr(b, "logits", b))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it(family: str, results, packed, tmp_path: Path) -> None:
    """timm models too, through the wrapper that transformers has for them. What it saves then is ordinary."""
    folder = packed[family]
    expected = AutoModelForImageClassification.from_pretrained(results[family].folder)
    got, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for (name, a), b in zip(expected.state_dict().items(), got.state_dict().values(), strict=True):
        assert same_bits(a, b), name
    expected.save_pretrained(tmp_path / "expected")
    got.save_pretrained(tmp_path / "got")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "got" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_casts_it(dtype: torch.dtype, results, packed) -> None:
    expected = AutoModelForImageClassification.from_pretrained(results["vit"].folder, dtype=dtype)
    got = AutoModelForImageClassification.from_pretrained(packed["vit"], dtype=dtype)
    for a, b in zip(expected.state_dict().values(), got.state_dict().values(), strict=True):
        assert same_bits(a, b)


def test_weights_that_transformers_splits_must_be_unpacked_first(tmp_path: Path) -> None:
    """DINOv2 of giant size stores its gated MLP as one matrix."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    model = Dinov2ForImageClassification(Dinov2Config(**sizes, use_swiglu_ffn=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, parameter, 0))
    model.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(LoadError, match=r"splits .*mlp\.weights_in.* unpack"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "packed")


STOCK = {
    "transformers": "from transformers import AutoModelForImageClassification as A; A.from_pretrained(sys.argv[1])",
    "timm": "import timm; timm.create_model('local-dir:' + sys.argv[1], pretrained=True)",
}


@pytest.mark.parametrize("family", ["vit", slow("timm"), slow("resnet")])
def test_stock_loaders_fail_loudly(family: str, packed) -> None:
    libraries = ["timm", "transformers"] if family == "timm" else ["transformers"]
    for library in libraries:
        code = f"import sys; sys.modules['snows_hf'] = None; {STOCK[library]}; print('loaded')"
        run = warm.run("-c", code, packed[family], env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert run.returncode != 0, library
        assert "loaded" not in run.stdout
        assert re.search(r"^(OSError|RuntimeError): ", run.stderr, re.MULTILINE), run.stderr


@pytest.mark.slow
def test_prune_packed_is_prune_and_pack(tmp_path: Path) -> None:
    pruned(VIT, tmp_path / "a" / "out")
    result = pruned(VIT, tmp_path / "b" / "out", format="packed")
    assert result.report["output"] == str(tmp_path / "b" / "out")
    pack(tmp_path / "a" / "out", tmp_path / "c")
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert {path.name for path in (tmp_path / "b" / "out").iterdir()} == names
    for name in (PACKED_FILE, "config.json", "preprocessor_config.json"):
        assert (tmp_path / "b" / "out" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.slow
def test_a_packed_model_can_be_pruned_further(packed, tmp_path: Path) -> None:
    report = prune(str(packed["vit"]), "1:4", data=str(DIGITS), samples=8, k=0, output=tmp_path / "out").report
    assert report["pattern"] == "1:4"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & config.keys()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="Format 'zip': expected one of safetensors, packed"):
        prune(str(VIT), "2:4", format="zip")


def test_shards_become_one_file(results, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(results["vit"].folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pack(tmp_path / "shards", tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").glob("model*")] == [PACKED_FILE]
    unpack(tmp_path / "packed", tmp_path / "out")
    before, after = tensors_of(results["vit"].folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)


def test_what_another_writer_laid_out_keeps_every_tensor_and_all_metadata(tmp_path: Path) -> None:
    """Shards, tensors in an order that safetensors would not write, several keys of metadata."""
    folder = copy_of(VIT, tmp_path / "m", ("model.safetensors",))
    tensors = tensors_of(VIT)
    names = sorted(tensors, reverse=True)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for part, own in parts.items():
        blobs = {name: tensors[name].numpy().tobytes() for name in own}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "part": "kept", part: "kept"}}
        end = 0
        for name, blob in blobs.items():
            offsets = [end, end := end + len(blob)]
            header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        (folder / part).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs.values()))
    index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    after = tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert all(same_bits(tensor, after[name]) for name, tensor in tensors.items())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "part": "kept", **dict.fromkeys(parts, "kept")}


def test_other_files_and_folders_come_along(results, tmp_path: Path) -> None:
    source = copy_of(results["vit"].folder, tmp_path / "m")
    (source / "logs").mkdir()
    (source / "logs" / "run.txt").write_text("kept")
    (source / ".cache").mkdir()
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    for folder in ("packed", "out"):
        assert (tmp_path / folder / "logs" / "run.txt").read_text() == "kept"
        assert (tmp_path / folder / "logs").stat().st_mode & 0o100
        assert not (tmp_path / folder / ".cache").exists()


def test_a_config_written_anew_is_unpacked_too(packed, tmp_path: Path) -> None:
    folder = edit_config(copy_of(packed["vit"], tmp_path / "m"), comment="new")
    unpack(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["comment"] == "new"
    assert "quantization_config" not in config


def test_folders_that_cannot_be_packed_or_unpacked(packed, results, tmp_path: Path) -> None:
    dense = results["vit"].folder
    cases = [
        (pack, packed["vit"], LoadError, "is packed already"),
        (pack, copy_of(dense, tmp_path / "none", ("model.safetensors",)), LoadError, "has no model.safetensors"),
        (pack, edit_config(copy_of(dense, tmp_path / "q"), quantization_config={}), LoadError, "is quantised"),
        (pack, copy_of(dense, tmp_path / "no-config", ("config.json",)), LoadError, "config.json cannot be read"),
        (unpack, dense, LoadError, f"has no {PACKED_FILE}"),
    ]
    for function, source, error, message in cases:
        with pytest.raises(error, match=message):
            function(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(SaveError, match="exists and is not empty"):
        pack(dense, packed["vit"])


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"w": "../../secret.safetensors"}}', "{"])
def test_an_index_that_leads_elsewhere_is_refused(index: str, tmp_path: Path) -> None:
    folder = copy_of(VIT, tmp_path / "m", ("model.safetensors",))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LoadError, match=r"index\.json"):
        pack(folder, tmp_path / "out")


def test_loading_both_kinds_of_weights_is_refused(results, packed, tmp_path: Path) -> None:
    folder = copy_of(packed["vit"], tmp_path / "m")
    (folder / "model.safetensors").write_bytes((results["vit"].folder / "model.safetensors").read_bytes())
    with pytest.raises(LoadError, match=r"holds model\.snows\.safetensors and model\.safetensors"):
        load(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_weights_are_refused_by_every_reader(family: str, packed, tmp_path: Path) -> None:
    folder = copy_of(packed[family], tmp_path / "m")
    tensors = load_file(folder / PACKED_FILE)
    name = next(name for name in tensors if name.endswith(":2to4"))
    tensors[name] = torch.full_like(tensors[name], 255)
    save_file(tensors, folder / PACKED_FILE, HEADER)
    for read in (
        load,
        AutoModelForImageClassification.from_pretrained,
        lambda path: unpack(Path(path), tmp_path / "o"),
    ):
        with pytest.raises(LoadError, match="its mask holds an unknown choice"):
            read(str(folder))
    assert not (tmp_path / "o").exists()
