"""Prunes that are broken off at random moments and go on with the same command, against one that nothing disturbs.

Three faults: `kill` sends SIGKILL; `torn` also damages the newest file that the run has kept; `full` fills the disk (a
small file system in memory, which only root may mount) until the run gives up. Whatever happens, the weights must come
out bit for bit the same, and nothing else may be left behind.

    python benchmarks/kill.py [--model DIR --data DIR] [--fault kill] [--times 50] [-- more options of prune]
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path


EMBEDDED = Path(str(files("snows_hf") / "embedded"))


def digest(output: Path) -> str:
    weights = sorted(output.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def start(command: list[str], output: Path) -> subprocess.Popen[str]:
    words = [*command, "--output", str(output)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kept(output: Path) -> list[Path]:
    """Files that a run has kept, in the order in which they were made."""
    paths = (output.parent / f".{output.name}.snows-work").glob("*.*.safetensors")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def tear(path: Path) -> None:
    """Cuts a file short, or turns one of its bits, or empties it."""
    content = bytearray(path.read_bytes())
    how = random.randrange(3)
    if how == 0:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content if how == 0 else content[: random.randrange(len(content))] if how == 1 else b"")


@contextmanager
def full(place: Path) -> Iterator[None]:
    """No room at all on a file system, for the time of the block."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
    yield
    filler.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED / "vit_digits")
    parser.add_argument("--data", type=Path, default=EMBEDDED / "digits")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--fault", choices=["kill", "torn", "full"], default="kill")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of prune, after --")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "snows_hf", "prune", str(arguments.model), "--pattern", arguments.pattern]
    command += ["--data", str(arguments.data), *arguments.options]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if arguments.fault == "full":
            size = 6 * sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
        try:
            disturb(command, place, arguments.fault, arguments.times)
        finally:
            if arguments.fault == "full":
                subprocess.run(["umount", "--lazy", str(place)], check=True)


def disturb(command: list[str], place: Path, fault: str, times: int) -> None:
    started = time.perf_counter()
    process = start(command, place / "whole")
    first = None
    for _ in process.stderr or ():
        first = first or time.perf_counter() - started
    seconds = time.perf_counter() - started
    if process.wait():
        sys.exit(f"The undisturbed run ended with status {process.returncode}.")
    expected = digest(place / "whole")
    assert first is not None
    print(f"Undisturbed: {seconds:.1f} s, of which {first:.1f} s to start; weights {expected[:16]}")
    print(f"| {fault} | after (s) | kept | outcome |\n|---|---|---|---|")
    output, outcomes, done, results = place / "out", Counter[str](), 0, 0
    while done < times or output.exists() is False:
        disturbed = done < times
        process = start(command, output)
        # Only from when work begins: what was kept shortens the run, so that late moments come after its end.
        delay = random.uniform(first, seconds)
        try:
            _, errors = process.communicate(timeout=delay if disturbed else None)
            outcome = "ended before it" if process.returncode == 0 else f"FAILED: {errors.strip().splitlines()[-1]}"
        except subprocess.TimeoutExpired:
            done += 1
            if fault == "full":
                with full(place):
                    _, errors = process.communicate()
                outcome = "refused" if process.returncode == 1 and "Traceback" not in errors else "ended all the same"
                outcome = "FAILED" if process.returncode not in (0, 1) else outcome
            else:
                process.kill()
                process.communicate()
                outcome = "killed"
                if fault == "torn" and kept(output):
                    tear(kept(output)[-1])
                    outcome = "killed, newest file torn"
            print(f"| {done} | {delay:.1f} | {len(kept(output))} | {outcome} |", flush=True)
        outcomes[outcome] += 1
        if output.exists() and not kept(output):
            same = digest(output) == expected
            left = sorted(path.name for path in place.iterdir() if path.name not in ("whole", "out"))
            results += 1
            print(f"Result {results}: {'the same bits' if same else 'OTHER BITS'}, left behind: {left or 'nothing'}")
            outcomes["the same bits" if same and not left else "WRONG"] += 1
            shutil.rmtree(output)
            if not disturbed:
                break
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())))
    sys.exit(any(word in outcome for outcome in outcomes for word in ("WRONG", "FAILED")))


if __name__ == "__main__":
    main()
