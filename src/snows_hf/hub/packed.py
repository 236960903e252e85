"""The packed file: sparse tensors as a mask and the values that are not zero, without loss, in safetensors.

It has a name of its own, ``model.snows.safetensors``, so that a loader that does not know the format finds no weights
and says so, instead of filling the model with noise. A packed tensor NAME is three tensors:

- ``NAME:values``: what is not zero, in row-major order, in the tensor's own dtype.
- ``NAME:shape``: its dimensions, int64.
- ``NAME:2to4``: where exactly two of every four consecutive weights along dimension 1 are not zero: each group is one
  of six choices, and a byte holds three groups as c0 + 6·c1 + 36·c2 (6³ = 216): 0.67 bits a weight. Otherwise
  ``NAME:bitmask``: one bit a weight, row-major, the first weight in the highest bit.

Zero means all bits zero: -0.0 and every NaN survive. Tensors that would not shrink are stored as they are.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoadError, SaveError, one_line


PACKED_FILE = "model.snows.safetensors"
METHOD = "snows"
"""``quant_method`` in config.json, by which transformers finds hub/quantizer.py."""

SUFFIXES = (":values", ":shape", ":2to4", ":bitmask")

_KEY, _VERSION = "snows_packed", 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_DIMENSIONS = 8
_CHUNK = 1 << 18  # weights expanded at a time: their indices take eight bytes each

_CHOICES = np.array([[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))])
"""(6, 4): which weights of a group each choice keeps."""
_CHOICE_OF = np.full(16, 255, np.uint8)
_CHOICE_OF[_CHOICES @ (1, 2, 4, 8)] = np.arange(6)
_TRIPLES = np.concatenate([_CHOICES[np.arange(216) // 6**i % 6] for i in range(3)], axis=1)
"""(216, 12): which weights of three groups each byte keeps."""


# ---- one tensor


def pack_tensor(tensor: Tensor) -> dict[str, Tensor] | None:
    """The parts of a tensor of any shape by suffix; None where these would be no smaller than the tensor."""
    if tensor.dtype not in _FLOATS or not 1 <= tensor.ndim <= _MAX_DIMENSIONS or tensor.numel() == 0:
        return None
    bits = tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.itemsize])
    kept = bits != 0
    suffix, mask = ":2to4", _encode_2to4(kept)
    if mask is None:
        suffix, mask = ":bitmask", torch.from_numpy(np.packbits(kept.flatten().numpy()))
    shape = torch.tensor(tensor.shape)
    values = bits[kept].view(tensor.dtype)
    if mask.nbytes + values.nbytes + shape.nbytes >= tensor.nbytes:
        return None
    return {":values": values, ":shape": shape, suffix: mask}


def _encode_2to4(kept: Tensor) -> Tensor | None:
    """Bytes of the fixed layout for a boolean mask; None where it is not exactly two of every four."""
    if kept.ndim < 2 or kept.shape[1] % 4:
        return None
    groups = kept.movedim(1, -1).reshape(-1, 4).numpy()
    choices = _CHOICE_OF[groups @ np.array([1, 2, 4, 8], np.uint8)]
    if (choices == 255).any():
        return None
    triples = np.pad(choices, (0, -len(choices) % 3)).reshape(-1, 3)
    return torch.from_numpy(triples @ np.array([1, 6, 36], np.uint8))


def check_parts(name: str, parts: Mapping[str, Tensor]) -> torch.Size:
    """Makes sure that the parts belong together, before anything of the tensor's own size is allocated; the shape,
    whose elements number at most 12 a byte of the mask, whatever ``:shape`` claims.

    Raises:
        LoadError: a part is missing, or has a type, a size or contents that cannot be.
    """

    def expect(condition: bool, fault: str) -> None:
        if not condition:
            raise LoadError(f"Packed tensor {name}: {fault}.", "The file is damaged: download or copy it again.")

    masks = parts.keys() & {":2to4", ":bitmask"}
    expect(parts.keys() == {":values", ":shape", *masks} and len(masks) == 1, "a part is missing, or one too many")
    (suffix,) = masks
    values, shape, mask = parts[":values"], parts[":shape"], parts[suffix]
    expect(all(part.ndim == 1 for part in parts.values()), "its parts must have one dimension each")
    expect(values.dtype in _FLOATS, f"values of type {values.dtype}")
    expect(mask.dtype == torch.uint8, f"a mask of type {mask.dtype}, expected torch.uint8")
    expect(shape.dtype == torch.int64 and 1 <= len(shape) <= _MAX_DIMENSIONS, "its shape is not a list of dimensions")
    sizes = shape.tolist()
    expect(all(size > 0 for size in sizes), f"its shape {sizes} has a dimension below 1")
    numel = math.prod(sizes)  # of Python's integers: a product that lies overflows nothing
    per_byte = 12 if suffix == ":2to4" else 8
    size = -(-numel // per_byte)
    expect(len(mask) == size, f"its mask has {len(mask)} bytes, and its shape {sizes} asks for {size}")
    bytes_ = mask.cpu().numpy()
    rest = numel % per_byte
    if suffix == ":2to4":
        expect(len(sizes) >= 2 and sizes[1] % 4 == 0, f"its shape {sizes} has no groups of four")
        expect(bytes_.max() < 216 and (rest == 0 or bytes_[-1] < 6 ** (rest // 4)), "its mask holds an unknown choice")
        count = numel // 2
    else:
        expect(rest == 0 or bytes_[-1] % (1 << 8 - rest) == 0, "its mask is longer than the tensor")
        count = int(np.bitwise_count(bytes_).sum(dtype=np.int64))
    expect(len(values) == count, f"{len(values)} values for a mask that keeps {count}")
    return torch.Size(sizes)


def unpack_tensor(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor that was packed, bit for bit. ``name`` is for messages.

    Raises:
        LoadError: see :func:`check_parts`.
    """
    shape = check_parts(name, parts)
    values = parts[":values"].cpu().contiguous()
    bits = values.view(_INTEGERS[values.itemsize]).numpy()
    if ":2to4" in parts:
        moved = (shape[0], *shape[2:], shape[1])
        groups = _TRIPLES.take(parts[":2to4"].cpu().numpy(), axis=0).ravel()[: shape.numel()]
        mask = np.moveaxis(groups.reshape(moved), -1, 1).ravel()
    else:
        mask = np.unpackbits(parts[":bitmask"].cpu().numpy(), count=shape.numel()).view(bool)
    dense = np.zeros(len(mask), bits.dtype)
    done = 0
    for start in range(0, len(mask), _CHUNK):
        kept = np.flatnonzero(mask[start : start + _CHUNK])
        dense[start : start + _CHUNK][kept] = bits[done : done + len(kept)]
        done += len(kept)
    return torch.from_numpy(dense).view(values.dtype).view(shape)


# ---- one file


def write_packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes a packed file; ``metadata`` is that of the safetensors file that unpacking gives back."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SUFFIXES):
            raise SaveError(f"Tensor {name} cannot be packed: its name ends like a part of a packed tensor.")
        parts = pack_tensor(tensor)
        stored |= {name: tensor} if parts is None else {name + suffix: part for suffix, part in parts.items()}
    # One key, because safetensors writes several in an order that changes from run to run.
    header = {"version": _VERSION, "metadata": None if metadata is None else dict(sorted(metadata.items()))}
    save_file(stored, path, {_KEY: json.dumps(header)})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose faults are a :class:`LoadError`."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise LoadError(f"{path} is corrupt or truncated: {one_line(error)}", "Download or copy it again.") from error


def _parts_of(path: Path, file: Any) -> tuple[dict[str, dict[str, str]], dict[str, str] | None]:
    """Of an open file: keys of the parts of each packed tensor by suffix ({"": name} if not packed), and metadata."""
    try:
        header = json.loads((file.metadata() or {}).get(_KEY, "null"))
        version, metadata = header["version"], header["metadata"]
        sound = metadata is None or all(isinstance(value, str) for value in metadata.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        version, metadata, sound = None, None, False
    if version != _VERSION or not sound:
        fault = f"{path} is not a packed file of version {_VERSION}."
        raise LoadError(fault, "A newer snows-hf may read it, if it is not damaged.")
    tensors: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118  no mapping
        suffix = next(filter(key.endswith, SUFFIXES), "")
        tensors.setdefault(key.removesuffix(suffix), {})[suffix] = key
    for name, parts in tensors.items():
        if "" in parts and len(parts) > 1:
            raise LoadError(f"{path} holds {name} twice, packed and as it is.", "Download or copy it again.")
    return tensors, metadata


def check_packed(path: Path) -> list[str]:
    """Makes sure that everything in a packed file fits together; names of the tensors that are packed.

    Raises:
        LoadError: missing, truncated, or not what it says.
    """
    with opened(path) as file:
        packed = {name: keys for name, keys in _parts_of(path, file)[0].items() if "" not in keys}
        for name, keys in packed.items():
            check_parts(name, {suffix: file.get_tensor(key) for suffix, key in keys.items()})
        return list(packed)


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Every tensor of a packed file in full, by name, and the metadata of the file they came from.

    Raises:
        LoadError: see :func:`check_packed`.
    """
    with opened(path) as file:
        tensors, metadata = _parts_of(path, file)
        read: dict[str, Tensor] = {}
        for name, keys in tensors.items():
            parts = {suffix: file.get_tensor(key) for suffix, key in keys.items()}
            read[name] = parts[""] if "" in parts else unpack_tensor(name, parts)
        return read, metadata
