"""Commands as processes of their own that start warm: forks of one that has loaded torch, which takes seconds.

What reads the environment when it is imported (huggingface_hub, and all that imports it) is left to the fork. Where
there is no fork, commands are started cold.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory


LOADED = (
    "torch", "torch.distributed.checkpoint", "torch.export", "torch.utils.flop_counter", "torchvision.transforms.v2",
    "scipy.stats", "pandas", "pyarrow.dataset", "pyarrow.parquet", "multiprocess", "networkx", "pydantic",
    "rich.console", "rich.progress", "typer", "jinja2",
)  # fmt: skip


def run(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] = os.environ, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` does in a folder and an environment; it begins with ``-m MODULE`` or ``-c CODE``."""
    command, cwd = [*map(str, arguments)], cwd or Path.cwd()
    if not hasattr(os, "fork"):
        cold = [sys.executable, *command]
        return subprocess.run(cold, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout)
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        order = {"command": command, "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err)}
        code = int(_asked(json.dumps(order | {"timeout": timeout})))
        return subprocess.CompletedProcess(command, code, out.read_text("utf-8"), err.read_text("utf-8"))


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)
    atexit.register(server.kill)
    return server


def _asked(order: str) -> str:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(order, file=server.stdin, flush=True)
    return server.stdout.readline()


def serve() -> None:
    """One order a line: forks, waits, and answers with the exit code."""
    for name in LOADED:
        import_module(name)
    torch = import_module("torch")  # whose first export loads a hundred modules more
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), strict=False)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(**order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(command: list[str], cwd: str, env: dict[str, str], out: str, err: str, timeout: float) -> None:
    """The process that was asked for, from its environment to its exit code."""
    for path, stream in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    signal.alarm(int(timeout))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = ""
    kind, what, *sys.argv[1:] = command
    code = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = "-c"
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
