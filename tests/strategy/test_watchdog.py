"""Jobs of real processes that fail in every way; all their stderr goes into one pipe, to see who speaks last.

They talk over gloo; WATCHDOG_BACKEND=nccl runs them on the GPUs of a machine.
"""

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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

JOB = str(Path(__file__).parents[1] / "support" / "watchdog_job.py")
RAISED = "failed: ValueError: the message"
SILENT = "died without a word (killed, or out of memory?)"


@dataclass
class Outcome:
    """The end of a job: the ranks' exit statuses (where their parent is not a rank, else the parent's), and stderr."""

    codes: list[int]
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]


@pytest.fixture(scope="module")
def server() -> Iterator[socket.socket]:
    """A process that has imported all that a job needs, and forks one where it is asked to."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, JOB, "serve", str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": str(Path(JOB).parents[2]), "DS_ACCELERATOR": "cpu"}
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment):
        theirs.close()
        yield ours
        ours.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def run(tmp_path: Path, server: socket.socket) -> Callable[..., Outcome]:
    """Runs commands as one job; fails unless every process is gone within 15 s of the failure."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(JOB).parents[2])}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}  # NCCL's process group warns a lot

    def run(*commands: list[str]) -> Outcome:
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as pipe, server.makefile("r") as answers:
            socket.send_fds(server, [json.dumps([commands, environment]).encode()], [writer])
            os.close(writer)
            alarm = threading.Timer(100.0, _kill, json.loads(answers.readline()))
            alarm.start()
            stderr = pipe.read().decode()  # ends with the last process that could write to it
            codes = json.loads(answers.readline())
            alarm.cancel()
        failed = tmp_path / "failed"
        assert not failed.exists() or time.time() - float(failed.read_text()) < 15.0, stderr
        deadline = time.monotonic() + 5.0  # a process closes its files a little before it is gone
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


@pytest.mark.parametrize(("victim", "how"), [(0, "launched"), (2, "launched"), (0, "neutral"), (1, "neutral")])
def test_a_rank_that_raises(tmp_path: Path, run: Callable[..., Outcome], victim: int, how: str) -> None:
    outcome = run([how, str(tmp_path), "raise", str(victim), "3"])
    assert outcome.last_line == f"pipelite: rank {victim} (stage {victim}) {RAISED}"
    assert outcome.stderr.count("pipelite:") == 1
    assert outcome.stderr.count("Traceback") == 1  # the errors of the others are consequences
    assert outcome.codes == [1] * (1 if how == "launched" else 3)
    assert len(list(tmp_path.glob("pid*"))) == 3
    if how == "neutral":
        messages = [json.loads((tmp_path / f"error{rank}.json").read_text())["message"] for rank in range(3)]
        assert messages[victim]["message"] == "ValueError: the\n  message"
        assert "in train" in messages[victim]["extraInfo"]["py_callstack"]
        assert messages[2]["message"] == f"RuntimeError: rank {victim} (stage {victim}) {RAISED}"


@pytest.mark.parametrize(
    ("what", "victim", "how", "died", "speakers"),
    [
        ("kill", 2, "launched", "died: killed by SIGKILL", 1),
        ("kill", 1, "neutral", SILENT, 1),
        ("kill", 0, "neutral", SILENT, 2),
        ("kill plainly", 0, "launched", SILENT, 2),
    ],
)
def test_a_rank_that_is_killed(
    tmp_path: Path, run: Callable[..., Outcome], what: str, victim: int, how: str, died: str, speakers: int
) -> None:
    """With "kill", a fork holds the sockets of the rank for 12 s: as on NCCL, nothing tells the survivors."""
    outcome = run([how, str(tmp_path), what, str(victim), "3"])
    assert time.time() - float((tmp_path / "failed").read_text()) < 10.0
    assert outcome.stderr == f"\npipelite: rank {victim} (stage {victim}) {died}\n" * speakers
    if how == "neutral":
        assert outcome.codes == [-9 if rank == victim else 1 for rank in range(3)]


def test_a_rank_that_hangs(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["launched", str(tmp_path), "hang", "1", "3"])
    assert outcome.last_line == (
        'pipelite: rank 1 (stage 1) has made no progress for 2 s in "forward"; '
        "raise the strategy's timeout if that is expected"
    )
    assert "time.sleep(60.0)" in outcome.stderr  # where it hangs
    assert outcome.codes == [1]


def test_ranks_that_wait_for_each_other(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "wait", "0", "2"])
    assert 'has waited for other ranks for 3 s in "receive"' in outcome.last_line
    assert outcome.codes == [1, 1]


def test_a_clean_run_is_silent_and_strangers_are_ignored(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "clean", "0", "3"])
    assert outcome.stderr == ""
    assert outcome.codes == [0, 0, 0]


def test_who_catches_the_exception_goes_on(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "catch", "1", "2"])
    assert outcome.codes == [1, 0]
    assert (tmp_path / "went on").exists()
    assert outcome.stderr == f"\npipelite: rank 1 (stage 1) {RAISED}\n"


def test_who_leaves_ends_the_others(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "leave", "1", "2"])
    assert outcome.codes == [1, 0]
    assert outcome.stderr == "\npipelite: rank 1 (stage 1) left by SystemExit: 0\n"


def test_two_nodes(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    """The exit status of rank 3 is known to the launcher of the second node only; each node prints the last line."""
    outcome = run(*(["launched", str(tmp_path), "kill", "3", "2", first, "4"] for first in ("0", "2")))
    assert outcome.stderr == "\npipelite: rank 3 (stage 3) died: killed by SIGKILL\n" * 2
    assert outcome.codes == [1, 1]


def test_who_closes_after_a_failure_ends_with_it(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "late", "1", "3"])
    assert outcome.last_line == f"pipelite: rank 1 (stage 1) {RAISED}"
    assert outcome.codes == [1, 1, 1]


def test_others_speak_where_rank_0_does_not_answer(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "stop", "0", "2"])
    assert outcome.last_line == f"pipelite: rank 1 (stage 1) {RAISED}"
    assert outcome.codes == [-9, 1]


def test_a_rank_that_cannot_be_reached(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["launched", str(tmp_path), "out of reach", "1", "3"])
    assert outcome.last_line.startswith(
        "pipelite: rank 0 (stage 0) failed: ConfigurationError: ranks [1] did not reach rank 0 at 127.0.0.1 within 1 s;"
    )
    assert outcome.stderr.count("Traceback") == 1
    assert outcome.codes == [1]


def test_a_bug_of_the_watchdog_ends_the_job(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["neutral", str(tmp_path), "break", "1", "2"])
    assert "AssertionError: a bug of the watchdog itself" in outcome.stderr
    assert outcome.last_line == f"pipelite: rank 1 (stage 1) {SILENT}"
    assert outcome.codes == [1, 1]


@pytest.mark.parametrize(
    ("what", "victim", "reason"),
    [
        ("raise", 0, "failed: ValueError: broken on purpose"),
        ("raise", 1, "failed: ValueError: broken on purpose"),
        ("kill", 0, SILENT),
        ("kill", 1, SILENT),
        ("hang", 1, "has made no progress for 3 s in"),
    ],
)
def test_the_trainer(tmp_path: Path, run: Callable[..., Outcome], what: str, victim: int, reason: str) -> None:
    """The job of test_failures.py with ranks that something else has started."""
    outcome = run(["neutral", str(tmp_path), f"trainer {what}", str(victim), "2"])
    assert outcome.last_line.startswith(f"pipelite: rank {victim} (stage {victim}) {reason}")
    assert outcome.stderr.count("pipelite: ") == 1
    assert outcome.stderr.count("Traceback") == (what == "raise")
    assert outcome.codes == [-9 if what == "kill" and rank == victim else 1 for rank in range(2)]


def test_torchrun_names_the_reason(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    outcome = run([*torchrun, JOB, "one", str(tmp_path), "raise", "1", "2"])
    ours, _, report = outcome.stderr.partition(f"pipelite: rank 1 (stage 1) {RAISED}\n")
    assert "Traceback" in ours
    assert "ValueError: the" in report
    assert outcome.codes == [1]


def test_one_rank_is_watched(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    outcome = run(["launched", str(tmp_path), "hang", "0", "1"])
    assert outcome.last_line.startswith('pipelite: rank 0 (stage 0) has made no progress for 2 s in "forward"')
    assert outcome.codes == [1]


def test_one_rank_needs_no_network_and_lets_exceptions_be() -> None:
    from lightning_pipelite.strategy.watchdog import Watchdog

    hook = sys.excepthook
    alone = Watchdog.connect(
        rank=0, world_size=1, local_rank=0, stage=0, host="nowhere.invalid", timeout=timedelta(seconds=0.3)
    )
    alone.progress("forward")
    alone.suspend()  # else this process would end
    time.sleep(0.6)
    alone.fail(ValueError())
    assert sys.excepthook is hook
    alone.close()
    alone.close()
    alone._thread.join(5.0)
    assert not alone._thread.is_alive()


# The launched children do not import Lightning: it takes seconds.
LAUNCH = """
import os, signal, sys, time, types
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]

def work():
    rank = int(os.environ["LOCAL_RANK"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid*"))) < 3:
        time.sleep(0.05)
    (folder / "failed").write_text(str(time.time()))
    if what == "launcher" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2 and what in ("child", "both"):
        sys.exit(7)
    if rank == 0 and what in ("main", "both"):
        raise ValueError("the message")
    time.sleep(60)

if "LOCAL_RANK" in os.environ:
    for name in ("lightning_pipelite", "lightning_pipelite.strategy", "lightning_pipelite.strategy.watchdog"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(os.environ["PYTHONPATH"]).joinpath(*name.split(".")))]
    from lightning_pipelite.strategy.watchdog.parent_death import guard_against_parent_death
    guard_against_parent_death()
    assert "PIPELITE_LAUNCHER_PID" not in os.environ
    work()
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning_pipelite.strategy.launcher import PipeLiteLauncher
PipeLiteLauncher(LightningEnvironment(), 3, 1, before_launch=lambda *_: None).launch(work)
"""


@pytest.mark.parametrize(
    ("what", "code", "stderr"),
    [
        ("child", 1, "\npipelite: rank 2 died: exit code 7, before the training began\n"),
        ("launcher", -9, ""),
        ("main", 1, "ValueError: the message\n"),
        ("both", 1, "ValueError: the message\n"),
    ],
)
def test_launcher_before_the_watchdog(
    tmp_path: Path, run: Callable[..., Outcome], what: str, code: int, stderr: str
) -> None:
    script = tmp_path / "job.py"
    script.write_text(LAUNCH)
    outcome = run(["script", str(script), str(tmp_path), what])
    assert outcome.stderr.endswith(stderr)
    assert outcome.stderr.count("pipelite: ") == (what == "child")
    assert outcome.stderr.count("Traceback") == (what in ("main", "both"))
    assert outcome.codes == [code]


def test_launcher_checks_before_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    from lightning_pipelite.strategy.launcher import PipeLiteLauncher

    monkeypatch.setenv("LOCAL_RANK", "1")  # someone else has launched
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    calls: list[Any] = []
    launcher = PipeLiteLauncher(LightningEnvironment(), 2, 1, before_launch=lambda *given: calls.append(given))
    assert launcher.launch(lambda a, b: calls.append((a, b)) or "result", 1, b=2) == "result"
    assert calls == [(None, {"a": 1, "b": 2}), (1, 2)]
    assert launcher.procs == []

    def refuse(*given: Any) -> None:
        raise ValueError("no")

    monkeypatch.delenv("LOCAL_RANK")
    launcher = PipeLiteLauncher(LightningEnvironment(), 2, 1, before_launch=refuse)
    with pytest.raises(ValueError, match="no"):
        launcher.launch(lambda: None)
    assert launcher.procs == []
