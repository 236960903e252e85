"""Damages packed files and config files in every way it can think of: each must be read, or refused with a LoadError.

    python benchmarks/fuzz_packed.py --files 10000

Fails on any other exception, on a file that takes more than ten seconds, and on an allocation beyond twice the honest
size: that of all tensors unpacked. (All that the reader allocates of any size is numpy's, which tracemalloc sees.)
"""

import argparse
import json
import random
import signal
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from snows_hf.errors import LoadError
from snows_hf.hub.folder import library_of, read_config
from snows_hf.hub.packed import PACKED_FILE, read_packed, write_packed
from snows_hf.patterns import NM


HEADER = {"snows_packed": '{"version": 1, "metadata": null}'}
NUMBERS = [0, 1, -1, 3, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 8]
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "quantization_config": {"quant_method": "snows"},
    "id2label": {"0": "a", "1": "b"},
    "hidden_size": 48,
}


def honest() -> dict[str, torch.Tensor]:
    """Tensors of every layout and type."""
    generator = torch.Generator().manual_seed(0)

    def sparse(shape: tuple[int, ...], pattern: NM) -> torch.Tensor:
        weight = torch.randn(shape, generator=generator)
        return torch.where(pattern.mask(weight.abs()), weight, 0)  # a product would leave -0.0, which is not zero

    return {
        "linear": sparse((64, 96), NM(2, 4)),
        "conv": sparse((16, 16, 3, 3), NM(2, 4)),
        "quarter": sparse((64, 64), NM(1, 4)),
        "half": sparse((32, 64), NM(2, 4)).half(),
        "brain": sparse((32, 64), NM(1, 8)).bfloat16(),
        "dense": torch.randn(64, 64, generator=generator),
        "bias": torch.randn(96, generator=generator),
        "count": torch.tensor(7),
    }


def flip(data: bytearray, low: int, high: int) -> bytearray:
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        data[random.randrange(low, high)] = random.randrange(256)
    return data


def header_edited(data: bytes) -> bytes:
    """The JSON header changed in one place and written back, its length corrected or not."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = random.choice(list(header))
    kind = random.randrange(9)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[random.choice([*header, "new", "w:values", "w:2to4", ""])] = header[name]
    elif name == "__metadata__":
        header[name][random.choice(list(header[name]))] = random.choice(
            ["", "[]", '{"version": 2}', '{"version": 1, "metadata": {"a": 1}}', "[" * 9999]
        )
    elif kind == 2:
        header[name]["dtype"] = random.choice(["F64", "F32", "F16", "BF16", "I64", "U8", "I8", "BOOL", "F8_E4M3", "X"])
    elif kind == 3:
        header[name]["shape"] = random.choices(NUMBERS, k=random.randrange(5))
    elif kind == 4:
        header[name]["data_offsets"] = random.choices(NUMBERS, k=2)
    elif kind == 5:  # a consistent lie: another type or form of the same bytes
        begin, end = header[name]["data_offsets"]
        dtype, size = random.choice([("F64", 8), ("F32", 4), ("F16", 2), ("U8", 1), ("I64", 8), ("BF16", 2)])
        header[name] |= {"dtype": dtype, "shape": [(end - begin) // size]}
    elif kind == 6:
        header[name] = random.choice([None, [], 1, "x", {}, {"dtype": "F32"}])
    elif kind == 7:
        other = random.choice(list(header))
        header[name], header[other] = header[other], header[name]
    else:
        suffix = random.choice([":values", ":shape", ":2to4", ":bitmask", ""])
        header[name.partition(":")[0] + suffix] = header.pop(name)
    text = json.dumps(header).encode()
    length = len(text) if random.random() < 0.9 else random.choice(NUMBERS) % 2**64
    return struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def parts_edited(parts: dict[str, torch.Tensor]) -> bytes:
    """A well-formed file whose tensors do not belong together."""
    parts = dict(parts)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(list(parts))
        tensor = parts[name].flatten()
        kind = random.randrange(7)
        if kind == 0:
            parts.pop(name)
        elif kind == 1:
            parts[name] = tensor[: random.randrange(len(tensor) + 1)].clone()
        elif kind == 2:
            parts[name] = tensor.repeat(random.choice((2, 3)))
        elif kind == 3:
            parts[name] = torch.randint(0, 256, (tensor.nbytes,), dtype=torch.uint8)
        elif kind == 4:
            sizes = random.choices([n for n in NUMBERS if n < 2**63], k=random.randrange(5))
            parts[name.partition(":")[0] + ":shape"] = torch.tensor(sizes, dtype=torch.int64)
        elif kind == 5:
            parts[name.partition(":")[0] + random.choice((":values", ":2to4", ":bitmask", ""))] = tensor.clone()
        else:
            parts[name] = torch.zeros_like(tensor)
        if not parts:
            break
    return save({name: tensor.contiguous() for name, tensor in parts.items()}, HEADER)


def damaged(data: bytes, parts: dict[str, torch.Tensor]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    kind = random.randrange(8)
    if kind == 0:
        return bytes(flip(bytearray(data), 0, len(data)))
    if kind == 1:
        return bytes(flip(bytearray(data), 0, 8 + length))
    if kind == 2:
        return data[: random.randrange(len(data))]
    if kind == 3:
        return data + random.randbytes(random.randrange(1, 1000))
    if kind == 4:
        return struct.pack("<Q", random.choice(NUMBERS) % 2**64) + data[8:]
    if kind == 5:
        a, b = sorted(random.sample(range(len(data)), 2))
        return data[:a] + data[b:] if random.random() < 0.5 else data[:b] + data[a:]
    return header_edited(data) if kind == 6 else parts_edited(parts)


def damaged_config() -> bytes:
    text = json.dumps(CONFIG, indent=2).encode()
    kind = random.randrange(5)
    if kind == 0:
        return bytes(flip(bytearray(text), 0, len(text)))
    if kind == 1:
        return text[: random.randrange(len(text))]
    if kind == 2:
        return text.replace(b"48", random.choice([b"9" * 9999, b"1e999", b"NaN", b"[" * 99999, b'"' + b"x" * 99999]))
    if kind == 3:
        return random.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe{}", b"[" * 10**6, b'{"a":' * 10**5])
    return json.dumps({random.choice(list(CONFIG)): random.choice([None, [], {}, 1, "x"])}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    tensors = honest()
    limit = 2 * sum(tensor.nbytes for tensor in tensors.values())
    read, refused, highest, slowest = 0, 0, 0, 0.0

    def too_slow(*_: object) -> None:
        raise TimeoutError("ten seconds are over")

    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        path, config = Path(folder, PACKED_FILE), Path(folder, "config.json")
        write_packed(path, tensors, {"format": "pt"})
        data, parts = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        tracemalloc.start()
        for index in range(arguments.files):
            is_config = index % 5 == 4
            case = config if is_config else path
            case.write_bytes(damaged_config() if is_config else damaged(data, parts))
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
            signal.alarm(10)
            try:
                if is_config:
                    library_of(read_config(Path(folder)), Path(folder))
                else:
                    read_packed(path)
                read += 1
            except LoadError:
                refused += 1
            except BaseException:
                keep = Path(f"fuzz-{arguments.seed}-{index}-{case.name}")
                keep.write_bytes(case.read_bytes())
                print(f"File {index} broke the reader; it is kept as {keep}.")
                raise
            finally:
                signal.alarm(0)
            # json makes Python objects of a config, which are larger than the text.
            allocated = tracemalloc.get_traced_memory()[1] - before
            slowest = max(slowest, time.perf_counter() - started)
            if not is_config:
                highest = max(highest, allocated)
            case.unlink()  # a mapped file must not change: the next one is a new one
    print(f"{arguments.files} files: {refused} refused, {read} read, none broke the reader.")
    print(f"Highest allocation {highest / (limit / 2):.2f} times the honest size; slowest {1e3 * slowest:.0f} ms.")
    if highest > limit:
        raise SystemExit("An allocation was beyond twice the honest size.")


if __name__ == "__main__":
    main()
