"""Runs `pipelite` many times, each in a separate forked process, which need not import anything.

Run as a program, it is the server: it reads lines of JSON from standard input and answers each on standard output.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAIN = Path(__file__).resolve().parents[2]
SECONDS_TO_LEAVE = 3.0  # for processes that the command has told to exit
SECONDS_AT_MOST = 120.0


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Args:
        code: Its exit status; negative for a signal.
        out: Its standard output.
        err: Its standard error.
        started: The commands of the programs that it started.
        left: The descendant processes that it left behind, which have since been killed.
    """

    code: int
    out: str
    err: str
    started: list[str]
    left: list[str]


class ForkServer:
    """A client that starts the server.

    Args:
        warm_up: Directory of a tiny model; the server builds it once, to import what that needs.
    """

    def __init__(self, warm_up: Path) -> None:
        paths = [str(MAIN), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(warm_up)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # With more threads, those of OpenMP would be missing in a fork, which would wait for them.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(self, here: Path, *arguments: str, **environment: str) -> Ended:
        """Run the command in a directory."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(here), arguments, environment]) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)


def _import_all(warm_up: Path) -> None:
    from lightning_pipelite.shared.verbosity import be_quiet

    be_quiet()
    from lightning_pipelite.adapters import LoRA
    from lightning_pipelite.cli.commands import COMMANDS
    from lightning_pipelite.cli.fit import TrainerCLI  # noqa: F401
    from lightning_pipelite.models import CausalLMLayers

    for command in COMMANDS.values():
        __import__(command.module)
    CausalLMLayers(warm_up, adapter=LoRA(rank=2))


def _run(here: str, arguments: list[str], environment: dict[str, str], answers: int) -> None:
    """Fork, run the command in the child, and answer from the parent."""
    import psutil

    files = [Path(here).parent / f"{Path(here).name}.{name}" for name in ("out", "err", "started")]
    child = os.fork()
    if child == 0:
        os.close(answers)
        os.setsid()
        os.chdir(here)
        os.environ.update(environment)
        for descriptor, path in zip((1, 2), files, strict=False):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        started = files[2].open("w", buffering=1)
        sys.addaudithook(lambda event, told: event == "subprocess.Popen" and started.write(f"{told[1]}\n") and None)
        sys.argv = [str(MAIN / "lightning_pipelite" / "__main__.py"), *arguments]
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
        _exit_as_main_does()
    code = _wait(child)
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        psutil.wait_procs(left, 0.05)
    told = [" ".join(process.cmdline()) or process.name() for process in left if process.is_running()]
    for process in left:
        process.kill()
    psutil.wait_procs(left)
    out, err, started_programs = (path.read_text() for path in files)
    for path in files:
        path.unlink()
    answer = {"code": code, "out": out, "err": err, "started": started_programs.splitlines(), "left": told}
    os.write(answers, (json.dumps(answer) + "\n").encode())


def _exit_as_main_does() -> NoReturn:
    """Run and exit like the interpreter, but without freeing its memory, which takes two seconds."""
    from lightning_pipelite.cli.main import main

    code: Any = 1
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code)


def _wait(child: int) -> int:
    deadline = time.monotonic() + SECONDS_AT_MOST
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve() -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of the commands become its children
    answers = os.dup(1)
    os.dup2(2, 1)
    _import_all(Path(sys.argv[1]))
    requests: Any = os.fdopen(os.dup(0))
    while line := requests.readline():
        _run(*json.loads(line), answers)


if __name__ == "__main__":
    _serve()
