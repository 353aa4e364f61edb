"""Ctrl-C ends training after the current step; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_pipelite.callbacks.support.signals import STOPS, Signals
from lightning_pipelite.cli import main as cli
from tiny_job import options, write_job

pytestmark = pytest.mark.process

SLOW = """
import time
import lightning as L

class Slow(L.Callback):
    def on_validation_batch_start(self, trainer, *_):
        open("evaluating", "w").close()
        time.sleep(0.2)
"""


def test_ctrl_c_within_an_evaluation_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """A terminal sends SIGINT to all processes: to the rank that was started, and to the rank that it has launched."""
    job = write_job(tmp_path)
    config = options(job, devices=2, enable_checkpointing=True, accumulate_grad_batches=2, num_sanity_val_steps=0)
    config["trainer"] |= {
        "strategy": {"class_path": "lightning_pipelite.PipeLiteStrategy", "init_args": {"pipeline_stages": 2}},
        "callbacks": [
            {"class_path": "slow.Slow"},
            {"class_path": "lightning_pipelite.callbacks.TimedCheckpoint", "init_args": {"dirpath": "checkpoints"}},
        ],
        "max_steps": 1000,
        "val_check_interval": 4,
    }
    (job / "slow.py").write_text(SLOW)
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    paths = [str(job), str(Path(cli.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_pipelite", "fit", "--config", "config.yaml"], cwd=job, text=True,
        env={**clean, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 150
        while not (job / "evaluating").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out.splitlines()[-1] == "Ctrl-C: training ends after step 2; resume with ckpt_path=last."
    assert err.strip().splitlines()[-1].startswith("Ctrl-C: training ends after this step, or this evaluation")
    assert "rank" not in err
    assert [path.name for path in (job / "checkpoints").iterdir()] == ["step=00000002.ckpt"]


def test_the_second_ends_the_process_at_once() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals = Signals()
        signals.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.write(writer, b"goes on" if STOPS[signals.take()] == signal.SIGINT else b"")
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 100) == b"goes on"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


@pytest.mark.parametrize("again", [False, True])
def test_handlers_are_put_back(again: bool) -> None:
    former = signal.getsignal(signal.SIGINT)
    signals = Signals()
    signals.listen()
    if again:
        os.kill(os.getpid(), signal.SIGINT)
    signals.ignore()
    assert signal.getsignal(signal.SIGINT) is former


def test_a_loaders_worker_leaves_it_to_its_rank() -> None:
    signals = Signals()
    signals.listen()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(signals.take())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        signals.ignore()
