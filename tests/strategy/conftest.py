"""Runs jobs of real processes that share one pipe for stderr, which shows who writes the last line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ports import free_port
from watched import JOB, Outcome


@pytest.fixture(scope="module")
def job_server() -> Iterator[socket.socket]:
    """A process that has imported everything a job needs, and forks its processes on request."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, JOB, "serve", str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": str(Path(JOB).parents[2]), "DS_ACCELERATOR": "cpu"}
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment):
        theirs.close()
        yield ours
        ours.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def run_watched(tmp_path: Path, job_server: socket.socket) -> Callable[..., Outcome]:
    """A function that runs commands as one job, and requires that all its processes end within 15 s of a failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(JOB).parents[2])}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}  # NCCL's process group warns a lot

    def run(*commands: list[str]) -> Outcome:
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as pipe, job_server.makefile("r") as answers:
            socket.send_fds(job_server, [json.dumps([commands, environment]).encode()], [writer])
            os.close(writer)
            alarm = threading.Timer(100.0, _kill, json.loads(answers.readline()))
            alarm.start()
            stderr = pipe.read().decode()  # ends when the last process that can write to it exits
            codes = json.loads(answers.readline())
            alarm.cancel()
        failed = tmp_path / "failed"
        assert not failed.exists() or time.time() - failed.stat().st_mtime < 15.0, stderr
        deadline = time.monotonic() + 5.0  # a process closes its files shortly before it exits
        while (left := [path for path in tmp_path.glob("pid*") if _alive(path)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []
        if (tmp_path / "codes.json").exists():
            codes = json.loads((tmp_path / "codes.json").read_text())
        return Outcome(codes, stderr)

    return run


def _kill(*processes: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _alive(pid_file: Path) -> bool:
    try:
        return Path(f"/proc/{pid_file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
