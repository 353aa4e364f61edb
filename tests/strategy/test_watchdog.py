"""Jobs of real processes that fail in every way; they share one pipe for stderr, whose last line names the cause.

They use gloo; WATCHDOG_BACKEND=nccl runs them on GPUs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from watched import JOB, Outcome

pytestmark = pytest.mark.process

RAISED = "failed: ValueError: the message"
SILENT = "died without an error message (killed, or out of memory?)"


@pytest.mark.parametrize(("victim", "how"), [(0, "launched"), (2, "launched"), (0, "neutral"), (1, "neutral")])
def test_a_rank_that_raises(tmp_path: Path, run_watched: Callable[..., Outcome], victim: int, how: str) -> None:
    outcome = run_watched([how, str(tmp_path), "raise", str(victim), "3"])
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
    tmp_path: Path, run_watched: Callable[..., Outcome], what: str, victim: int, how: str, died: str, speakers: int
) -> None:
    """With "kill", a fork keeps the rank's sockets open for 12 s: as with NCCL, the survivors get no error."""
    outcome = run_watched([how, str(tmp_path), what, str(victim), "3"])
    assert time.time() - float((tmp_path / "failed").read_text()) < 10.0
    assert outcome.stderr == f"\npipelite: rank {victim} (stage {victim}) {died}\n" * speakers
    if how == "neutral":
        assert outcome.codes == [-9 if rank == victim else 1 for rank in range(3)]


def test_a_rank_that_hangs(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["launched", str(tmp_path), "hang", "1", "3"])
    assert outcome.last_line == (
        'pipelite: rank 1 (stage 1) has made no progress for 2 s in "forward"; '
        "raise the strategy's timeout if that is expected"
    )
    assert "time.sleep(60.0)" in outcome.stderr  # where it hangs
    assert outcome.codes == [1]


def test_ranks_that_wait_for_each_other(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "wait", "0", "2"])
    assert 'has waited for other ranks for 3 s in "receive"' in outcome.last_line
    assert outcome.codes == [1, 1]


def test_a_clean_run_is_silent_and_strangers_are_ignored(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "clean", "0", "3"])
    assert outcome.stderr == ""
    assert outcome.codes == [0, 0, 0]


def test_who_catches_the_exception_goes_on(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "catch", "1", "2"])
    assert outcome.codes == [1, 0]
    assert (tmp_path / "went on").exists()
    assert outcome.stderr == f"\npipelite: rank 1 (stage 1) {RAISED}\n"


def test_who_leaves_ends_the_others(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "leave", "1", "2"])
    assert outcome.codes == [1, 0]
    assert outcome.stderr == "\npipelite: rank 1 (stage 1) exited with SystemExit: 0\n"


def test_two_nodes(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    """Only the second node's launcher knows the exit status of rank 3, but both nodes print it in their last line."""
    outcome = run_watched(*(["launched", str(tmp_path), "kill", "3", "2", first, "4"] for first in ("0", "2")))
    assert outcome.stderr == "\npipelite: rank 3 (stage 3) died: killed by SIGKILL\n" * 2
    assert outcome.codes == [1, 1]


def test_who_closes_after_a_failure_ends_with_it(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "late", "1", "3"])
    assert outcome.last_line == f"pipelite: rank 1 (stage 1) {RAISED}"
    assert outcome.codes == [1, 1, 1]


def test_others_speak_where_rank_0_does_not_answer(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "stop", "0", "2"])
    assert outcome.last_line == f"pipelite: rank 1 (stage 1) {RAISED}"
    assert outcome.codes == [-9, 1]


def test_a_rank_that_cannot_be_reached(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["launched", str(tmp_path), "out of reach", "1", "3"])
    assert outcome.last_line.startswith(
        "pipelite: rank 0 (stage 0) failed: ConfigurationError: ranks [1] did not reach rank 0 at 127.0.0.1 within 1 s;"
    )
    assert outcome.stderr.count("Traceback") == 1
    assert outcome.codes == [1]


def test_a_bug_of_the_watchdog_ends_the_job(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "break", "1", "2"])
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
def test_the_trainer(tmp_path: Path, run_watched: Callable[..., Outcome], what: str, victim: int, reason: str) -> None:
    """The job of test_failures.py, with ranks that are launched externally."""
    outcome = run_watched(["neutral", str(tmp_path), f"trainer {what}", str(victim), "2"])
    assert outcome.last_line.startswith(f"pipelite: rank {victim} (stage {victim}) {reason}")
    assert outcome.stderr.count("pipelite: ") == 1
    assert outcome.stderr.count("Traceback") == (what == "raise")
    assert outcome.codes == [-9 if what == "kill" and rank == victim else 1 for rank in range(2)]


def test_torchrun_names_the_reason(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    outcome = run_watched([*torchrun, JOB, "one", str(tmp_path), "raise", "1", "2"])
    ours, _, report = outcome.stderr.partition(f"pipelite: rank 1 (stage 1) {RAISED}\n")
    assert "Traceback" in ours
    assert "ValueError: the" in report
    assert outcome.codes == [1]


def test_the_reason_is_told_before_a_launcher_that_sees_an_exit_kills_the_rest(
    tmp_path: Path, run_watched: Callable[..., Outcome]
) -> None:
    outcome = run_watched(["neutral", str(tmp_path), "impatient", "1", "2"])
    assert f"pipelite: rank 1 (stage 1) {RAISED}\n" in outcome.stderr
    assert outcome.codes == [-9, 1]


def test_one_rank_is_watched(tmp_path: Path, run_watched: Callable[..., Outcome]) -> None:
    outcome = run_watched(["launched", str(tmp_path), "hang", "0", "1"])
    assert outcome.last_line.startswith('pipelite: rank 0 (stage 0) has made no progress for 2 s in "forward"')
    assert outcome.codes == [1]


def test_one_rank_needs_no_network_and_lets_exceptions_be() -> None:
    from lightning_pipelite.strategy.watchdog import Watchdog

    hook = sys.excepthook
    alone = Watchdog.connect(
        rank=0, world_size=1, local_rank=0, stage=0, host="nowhere.invalid", timeout=timedelta(minutes=5)
    )
    alone.progress("forward")
    alone.fail(ValueError())
    assert sys.excepthook is hook
    alone.close()
    alone.close()
    alone._thread.join(5.0)
    assert not alone._thread.is_alive()


# The launched children do not import Lightning, which takes seconds.
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
        ("child", 1, "\npipelite: rank 2 died with exit code 7 before training began\n"),
        ("launcher", -9, ""),
        ("main", 1, "ValueError: the message\n"),
        ("both", 1, "ValueError: the message\n"),
    ],
)
def test_launcher_before_the_watchdog(
    tmp_path: Path, run_watched: Callable[..., Outcome], what: str, code: int, stderr: str
) -> None:
    script = tmp_path / "job.py"
    script.write_text(LAUNCH)
    outcome = run_watched(["script", str(script), str(tmp_path), what])
    assert outcome.stderr.endswith(stderr)
    assert outcome.stderr.count("pipelite: ") == (what == "child")
    assert outcome.stderr.count("Traceback") == (what in ("main", "both"))
    assert outcome.codes == [code]
