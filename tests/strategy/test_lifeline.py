"""Jobs of real processes over gloo that fail in every way; all their stderr goes into one pipe, to see who speaks last.

That the pipe ends also shows that no process is left: each holds it open.
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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from lightning_pipelite.strategy import lifeline as room

HERE = Path(__file__).parent
AT_MOST = 30.0  # seconds: what the job promises, the start of its processes included
RAISED = "failed: ValueError: the message"


@dataclass
class Outcome:
    """The end of a job: the exit statuses of the processes that the test started, stderr, and the seconds from the failure."""

    codes: list[int]
    stderr: str
    pids: list[int]

    @property
    def last_line(self) -> str:
        return self.stderr.rstrip("\n").rpartition("\n")[2]


@pytest.fixture
def environment() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")},
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(HERE.parents[1]),
    }


def run(
    folder: Path, environment: dict[str, str], what: str, victim: int, *, launched: bool, ranks: int = 3
) -> Outcome:
    """Runs a job: the ranks are children of rank 0 (``launched``), or all children of a neutral parent, this test."""
    jobs = []
    for rank in [0] if launched else range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        own |= {"LAUNCH": "1"} if launched else {"TORCHELASTIC_ERROR_FILE": str(folder / f"error{rank}.json")}
        jobs.append((environment | own, [str(HERE / "lifeline_rank.py"), str(folder), what, str(victim)]))
    return finish(folder, jobs)


def finish(folder: Path, jobs: list[tuple[dict[str, str], list[str]]]) -> Outcome:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        processes = [
            subprocess.Popen([sys.executable, *command], env=env, stdout=writer, stderr=writer) for env, command in jobs
        ]
        os.close(writer)
        alarm = threading.Timer(AT_MOST, lambda: [process.kill() for process in processes])
        alarm.start()
        stderr = pipe.read().decode()  # until the last process is gone
        codes = [process.wait() for process in processes]
        assert alarm.is_alive(), f"the job did not end in time: {stderr}"
        alarm.cancel()
    return Outcome(codes, stderr, [int(path.read_text()) for path in folder.glob("pid*")])


@pytest.fixture(autouse=True)
def _no_process_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = []
    for path in tmp_path.glob("pid*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
            left.append(path.name)
        except ProcessLookupError:
            pass
    assert left == []


@pytest.mark.parametrize(("victim", "launched"), [(0, True), (2, True), (0, False), (1, False)])
def test_a_rank_that_raises(tmp_path: Path, environment: dict[str, str], victim: int, launched: bool) -> None:
    outcome = run(tmp_path, environment, "raise", victim, launched=launched)
    assert outcome.last_line == f"pipelite: rank {victim} (stage {victim}) {RAISED}"
    assert outcome.stderr.count("pipelite:") == 1
    assert outcome.stderr.count("Traceback") == 1  # the others' errors are consequences
    assert outcome.codes == [1] * len(outcome.codes)
    assert len(outcome.pids) == 3
    if not launched:
        messages = [json.loads((tmp_path / f"error{rank}.json").read_text())["message"] for rank in range(3)]
        assert messages[victim]["message"] == "ValueError: the\n  message"
        assert "in train" in messages[victim]["extraInfo"]["py_callstack"]
        assert messages[2]["message"] == f"RuntimeError: rank {victim} (stage {victim}) {RAISED}"


@pytest.mark.parametrize(
    ("what", "victim", "launched", "how"),
    [
        ("kill", 2, True, "killed by SIGKILL"),
        ("kill", 1, False, "without a word (killed, or out of memory?)"),
        ("kill-plainly", 0, True, "without a word (killed, or out of memory?)"),
    ],
)
def test_a_rank_that_is_killed(
    tmp_path: Path, environment: dict[str, str], what: str, victim: int, launched: bool, how: str
) -> None:
    """ "kill" leaves a fork that holds the rank's sockets, so that, as on NCCL, no collective tells the survivors."""
    started = time.monotonic()
    outcome = run(tmp_path, environment, what, victim, launched=launched)
    assert time.monotonic() - started < 12.0  # while the fork still holds the sockets
    assert outcome.last_line == f"pipelite: rank {victim} (stage {victim}) died: {how}".replace(": without", " without")
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.count("pipelite:") == (2 if victim == 0 else 1)
    assert all(code != 0 for code in outcome.codes)


def test_a_rank_that_hangs(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "hang", 1, launched=True)
    assert outcome.last_line == (
        'pipelite: rank 1 (stage 1) has made no progress for 2 s in "forward"; '
        "raise the strategy's timeout if that is expected"
    )
    assert "time.sleep(60.0)" in outcome.stderr  # where it hangs
    assert outcome.codes == [1]


def test_ranks_that_wait_for_each_other(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "wait", 0, launched=False, ranks=2)
    assert 'has waited for other ranks for 3 s in "receive"' in outcome.last_line
    assert outcome.codes == [1, 1]


def test_a_clean_run_is_silent_and_strangers_are_ignored(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "clean", 0, launched=True)
    assert outcome.stderr == ""
    assert outcome.codes == [0]
    assert len(outcome.pids) == 3


def test_who_catches_the_exception_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "catch", 1, launched=False, ranks=2)
    assert outcome.codes == [1, 0]
    assert (tmp_path / "went on").exists()
    assert outcome.stderr.strip() == f"pipelite: rank 1 (stage 1) {RAISED}"


def test_who_leaves_ends_the_others(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "leave", 1, launched=False, ranks=2)
    assert outcome.codes == [1, 0]
    assert outcome.stderr.strip() == "pipelite: rank 1 (stage 1) left by SystemExit: 0"


def test_two_nodes(tmp_path: Path, environment: dict[str, str]) -> None:
    """Each node has a launcher; the exit status of rank 3 is known to the second one only."""
    jobs = []
    for rank in (0, 2):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LAUNCH": "1"}
        jobs.append((environment | own, [str(HERE / "lifeline_rank.py"), str(tmp_path), "kill", "3"]))
    outcome = finish(tmp_path, jobs)
    assert outcome.stderr.split("\n") == ["", "pipelite: rank 3 (stage 3) died: killed by SIGKILL", ""] * 2
    assert outcome.codes == [1, 1]


def test_torchrun_names_the_reason(tmp_path: Path, environment: dict[str, str]) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", environment["MASTER_PORT"]]
    command += [str(HERE / "lifeline_rank.py"), str(tmp_path), "raise", "1"]
    outcome = finish(tmp_path, [(environment, command)])
    ours, _, report = outcome.stderr.partition(f"pipelite: rank 1 (stage 1) {RAISED}\n")
    assert "Traceback" in ours
    assert "ValueError: the" in report
    assert outcome.codes == [1]


LAUNCH = """
import os, sys, time
from pathlib import Path
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning_pipelite.strategy.launcher import PipeLiteLauncher

folder = Path(sys.argv[1])
def check(trainer, arguments):
    (folder / f"checked{os.environ.get('LOCAL_RANK', '0')}").write_text(str(arguments))

def work(what):
    rank = int(os.environ["LOCAL_RANK"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid*"))) < 3:
        time.sleep(0.05)
    if what == "child" and rank == 2:
        sys.exit(7)
    if what == "launcher" and rank == 0:
        os.kill(os.getpid(), 9)
    time.sleep(60)

PipeLiteLauncher(LightningEnvironment(), 3, 1, before_launch=check).launch(work, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("what", "code", "stderr"),
    [("child", 1, "\npipelite: rank 2 died: exit code 7, before the training began\n"), ("launcher", -9, "")],
)
def test_launcher_before_the_lifeline(
    tmp_path: Path, environment: dict[str, str], what: str, code: int, stderr: str
) -> None:
    script = tmp_path / "job.py"
    script.write_text(LAUNCH)
    outcome = finish(tmp_path, [(environment, [str(script), str(tmp_path), what])])
    assert outcome.stderr == stderr
    assert outcome.codes == [code]
    assert [(tmp_path / f"checked{rank}").read_text() for rank in range(3)] == [f"({what!r},)"] * 3


def test_one_rank_needs_no_network_and_lets_exceptions_be() -> None:
    hook = sys.excepthook
    alone = room.Lifeline.connect(
        rank=0, world_size=1, local_rank=0, stage=0, host="nowhere.invalid", timeout=timedelta(seconds=60)
    )
    alone.progress("forward")
    alone.suspend()
    alone.fail(ValueError())
    assert sys.excepthook is hook
    alone.close()
    alone.close()
    alone._thread.join(5.0)
    assert not alone._thread.is_alive()


def test_one_rank_is_watched(tmp_path: Path, environment: dict[str, str]) -> None:
    outcome = run(tmp_path, environment, "hang", 0, launched=False, ranks=1)
    assert outcome.last_line.startswith('pipelite: rank 0 (stage 0) has made no progress for 2 s in "forward"')
    assert outcome.codes == [1]
