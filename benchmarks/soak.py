"""Kills a training again and again, resumes it each time, and compares every loss with the undisturbed training's.

    python benchmarks/soak.py [--kills 54] [--stages 2] [--virtual-stages 1] [--seed 0] [--write]

LoRA with dropout on a tiny Llama, with an evaluation every third step and a checkpoint every second step. Each life of
the training is ended at a random moment: while it starts, during a step, or while a checkpoint is being written; by
SIGKILL to one rank, by SIGKILL to all, or by SIGTERM to rank 0. The next life resumes from the newest complete
checkpoint. The processes are forked from one that has imported everything.

Exits with 1 if the loss of a step or an evaluation in any life differs in any bit, if more is lost than the steps since
the last checkpoint (two, and two more while it is being written; none on SIGTERM once training has begun), if a process
is left after 40 s, or if a temporary file is left at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tests_support  # noqa: F401

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import lightning as L
import torch

from exact_training import Case, Scale, make_model, sequences
from lightning_pipelite import PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.adapters import LoRA
from lightning_pipelite.callbacks import TimedCheckpoint
from ports import free_port
from report import Report
from resumable import Deal, batched

SCALE = Scale(vocabulary=64, hidden=32, layers=2, sequence=32, sequences=13)
EVERY, TIMEOUTS = 2, 40.0
STEPS_A_LIFE = 12  # twice what one takes on average, so that the training does not end before its last life
MOMENTS = ("start", "step", "step", "write", "write")
WAYS = ("SIGKILL to one rank", "SIGKILL to all ranks", "SIGTERM to rank 0")


class EverySecondStep(TimedCheckpoint):
    def _wish(self, trainer: L.Trainer) -> int:
        return max(super()._wish(trainer), int(trainer.global_step % EVERY == 0))


class Log(L.Callback):
    """Appends a line ``kind step loss`` for every start, step and evaluation, with the exact bits of the loss."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, trainer: L.Trainer, kind: str, metric: str | None = None) -> None:
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics[metric]).hex() if metric else "-"
            with self._path.open("a") as file:
                file.write(f"{kind} {trainer.global_step} {loss}\n")

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._write(trainer, "start")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._write(trainer, "train", "train/loss")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._write(trainer, "eval", "eval/loss")


def train(folder: Path, steps: int, stages: int, virtual_stages: int, log: Path) -> None:
    """Train as one rank of one life."""
    strategy = PipeLiteStrategy(stages, virtual_stages=virtual_stages)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=stages, max_steps=steps, max_epochs=-1, logger=False,
        accumulate_grad_batches=2, val_check_interval=6, limit_val_batches=2, num_sanity_val_steps=0,
        callbacks=[EverySecondStep(1e6, 3, str(folder / "checkpoints")), Log(log)], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    L.seed_everything(3, verbose=False)
    module = PipeLiteModule(str(folder / "model"), LoRA(4, dropout=0.2), lr=2e-3, dtype="float32")
    items = batched(sequences(SCALE))
    training, held_out = (Deal(items, **strategy.distributed_sampler_kwargs) for _ in range(2))
    trainer.fit(module, training, held_out, ckpt_path="last")


@dataclass(frozen=True)
class Line:
    kind: str
    step: int
    loss: str


class Life:
    """The processes of a training from a start to its end.

    Args:
        folder: Folder of the model, the checkpoints, and a file with all output.
        steps: Total number of steps of the training.
        stages: Number of stages, one a rank.
        virtual_stages: Pieces of each stage.
        log: File to which rank 0 writes its losses.
    """

    def __init__(self, folder: Path, steps: int, stages: int, virtual_stages: int, log: Path) -> None:
        self._log = log
        port = free_port()
        self.alive: dict[int, int] = {}  # the process of each rank
        self.statuses: dict[int, int] = {}
        for rank in range(stages):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, stages, port, folder, lambda: train(folder, steps, stages, virtual_stages, log))
            self.alive[rank] = pid

    def poll(self) -> bool:
        """Return whether a process is still running."""
        for rank, pid in list(self.alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[rank] = os.waitstatus_to_exitcode(status)
                del self.alive[rank]
        return bool(self.alive)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition holds, all processes have ended, or time is up; return whether it holds."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def send(self, signum: signal.Signals, ranks: list[int]) -> None:
        for rank in ranks:
            if rank in self.alive:
                os.kill(self.alive[rank], signum)

    def end_as_torchrun_does(self) -> None:
        """Send SIGTERM to all once one has ended: until they are connected, ranks wait for each other forever."""
        self.wait_for(lambda: bool(self.statuses), TIMEOUTS)
        self.send(signal.SIGTERM, [*self.alive])

    def lines(self) -> list[Line]:
        """Return the complete lines of the log."""
        text = self._log.read_text() if self._log.exists() else ""
        fields = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [Line(kind, int(step), loss) for kind, step, loss in fields]

    def steps(self) -> int:
        return sum(line.kind == "train" for line in self.lines())


def _be_rank(rank: int, stages: int, port: int, folder: Path, function: Callable[[], None]) -> None:
    """Act in the forked process as a rank started by torchrun; does not return."""
    status = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": stages, "LOCAL_WORLD_SIZE": stages, "GROUP_RANK": 0}
        ranks.update(MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["TORCHELASTIC_RUN_ID"] = "soak"
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


@dataclass
class Tally:
    kills: int = 0
    lost: int = 0
    most_lost: int = 0
    differences: int = 0
    orphans: int = 0
    broken: int = 0  # lives that lost more than allowed, or ended in a wrong way


def soak(folder: Path, kills: int, stages: int, virtual_stages: int, seed: int, report: Report) -> Tally:
    """Run the training undisturbed, then kill it ``kills`` times and let it end."""
    drawn, tally, steps = random.Random(seed), Tally(), STEPS_A_LIFE * (kills + 1)
    scale = replace(SCALE, layers=max(SCALE.layers, stages * virtual_stages))
    make_model(folder / "model", Case("untied"), scale)
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "model").symlink_to(folder / "model")
    life = Life(undisturbed, steps, stages, virtual_stages, undisturbed / "log")
    assert not life.wait_for(lambda: False, 600), "the undisturbed training does not end"
    expected = {(line.kind, line.step): line.loss for line in life.lines() if line.kind != "start"}
    assert sum(kind == "train" for kind, _ in expected) == steps, (undisturbed / "output.txt").read_text()[-3000:]
    done: Counter[tuple[str, str]] = Counter()
    reached, orderly, seen = 0, False, set()  # last step logged; whether SIGTERM saved it; all that was logged
    while True:
        life, last = Life(folder, steps, stages, virtual_stages, folder / f"log-{tally.kills}"), tally.kills == kills
        moment, way = drawn.choice(MOMENTS), drawn.choice(WAYS)
        begun = False
        if not last:
            _wait_until(life, moment, folder / "checkpoints", drawn)
            begun = life.steps() > 0
            ranks = {WAYS[0]: [drawn.randrange(stages)], WAYS[1]: [*range(stages)], WAYS[2]: [0]}[way]
            life.send(signal.SIGTERM if way == WAYS[2] else signal.SIGKILL, ranks)
            if not begun:
                life.end_as_torchrun_does()
        life.wait_for(lambda: False, 600 if last else TIMEOUTS)
        if life.alive:
            tally.orphans += len(life.alive)
            life.send(signal.SIGKILL, [*life.alive])
            life.wait_for(lambda: False, 5)
        lines = life.lines()
        for line in lines:
            if line.kind != "start":
                seen.add((line.kind, line.step))
                if (loss := expected.get((line.kind, line.step))) != line.loss:
                    tally.differences += 1
                    print(f"life {tally.kills}: {line}, not {loss}", file=sys.stderr)
            elif tally.kills:
                lost = reached - line.step
                tally.lost, tally.most_lost = tally.lost + lost, max(tally.most_lost, lost)
                tally.broken += not 0 <= lost <= (0 if orderly else 2 * EVERY)
        if lines:
            reached, orderly = lines[-1].step, begun and way == WAYS[2]
        if last:
            tally.broken += any(life.statuses.values())
            break
        tally.broken += not any(life.statuses.values())  # it ended on its own
        tally.broken += begun and way == WAYS[2] and set(life.statuses.values()) != {128 + signal.SIGTERM}
        tally.kills += 1
        done[moment, way] += 1
    if missing := sorted(expected.keys() - seen):
        tally.differences += len(missing)
        print(f"never seen: {missing[:3]}", file=sys.stderr)
    for (moment, way), count in sorted(done.items()):
        report.row(f"| {way} | {moment} | {count} |")
    return tally


def _wait_until(life: Life, moment: str, checkpoints: Path, drawn: random.Random) -> None:
    if moment == "start":
        life.wait_for(lambda: False, drawn.uniform(0.0, 2.0))
        return
    after = drawn.randrange(1, 5)
    life.wait_for(lambda: life.steps() >= after, 60)
    if moment == "step":
        life.wait_for(lambda: False, drawn.uniform(0.0, 0.05))
    else:
        # One is written every second step. It may be complete before it is seen, and training must not end meanwhile.
        life.wait_for(lambda: any(checkpoints.glob(".*partial")) or life.steps() >= after + EVERY, 5)
        life.wait_for(lambda: False, drawn.uniform(0.0, 0.02))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=54)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--virtual-stages", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/soak.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("soak", "| killed by | during | times |", "| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        tally = soak(folder, arguments.kills, arguments.stages, arguments.virtual_stages, arguments.seed, report)
        left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
        failed = bool(tally.differences or tally.orphans or tally.broken or left)
        if failed:
            print(f"left: {left}", file=sys.stderr)
            print((folder / "output.txt").read_text()[-3000:], file=sys.stderr)
    report.line(f"{tally.kills} kills, {tally.lost} steps lost, {tally.differences} differences")
    report.line(
        f"At most {tally.most_lost} steps lost at once; {tally.orphans} processes left, {len(left)} temporaries left, "
        f"{tally.broken} lives that lost too much or ended wrongly: {'FAILED' if failed else 'passed'}."
    )
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
