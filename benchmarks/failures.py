"""What happens when a rank fails: how long until every process is gone, and what is printed last.

    python benchmarks/failures.py [--write] [--gpu]

Jobs of three stages (with --gpu: two stages over NCCL, on two GPUs if there are, and on one, which NCCL must allow)
fail in the third step, in every way, under every launcher. The seconds count from the failure, for a hang from its
timeout. Exits with 1 if a job takes more than 30 s, leaves a process, exits with 0, does not come to fail, or does not
name the rank and the reason in its last line (torchrun and deepspeed add lines of their own after it).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LIMIT = 30.0
HANG_TIMEOUT = 8.0


@dataclass(frozen=True)
class Failure:
    """A way to fail.

    Args:
        how: ``raise``, ``kill`` (SIGKILL), ``hang`` or ``nan``.
        rank: which rank does; with ``nan`` all notice.
        expected: what the last line must contain.
    """

    how: str
    rank: int
    expected: str


def failures(ranks: int) -> list[Failure]:
    raised = [
        Failure("raise", rank, f"rank {rank} (stage {rank}) failed: ValueError: broken on purpose")
        for rank in range(ranks)
    ]
    killed = [Failure("kill", rank, f"rank {rank} (stage {rank}) died") for rank in (0, ranks - 1)]
    hung = Failure("hang", ranks - 1, f"rank {ranks - 1} (stage {ranks - 1}) has made no progress")
    return [*raised, *killed, hung, Failure("nan", 0, "step 3: the loss is nan")]


def job(arguments: argparse.Namespace) -> None:
    """One process of a job that is going to fail."""
    import lightning as L
    import torch
    from torch import nn

    from lightning_pipelite import PipeLiteStrategy

    ranks = arguments.devices * arguments.nodes
    torch.set_num_threads(1)

    class Fails(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index
            self.linear = nn.Linear(16, 16)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = self.linear(inputs)
            trainer = module.trainer
            if trainer.global_step < 2 or self.index != arguments.rank:
                return outputs
            if not marker.exists():
                marker.write_text(str(time.time()))
            if arguments.how == "raise":
                raise ValueError("broken on purpose")
            if arguments.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if arguments.how == "hang":
                time.sleep(600)
            return outputs * float("nan")

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Fails(index) for index in range(ranks))

        def pipeline_layers(self) -> Any:
            return list(self.layers), nn.functional.mse_loss

        def training_step(self, *_: Any) -> None:
            raise NotImplementedError

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    marker = Path(arguments.marker)
    module = Module()
    data = torch.utils.data.TensorDataset(torch.randn(64, 16), torch.randn(64, 16))
    trainer = L.Trainer(
        strategy=PipeLiteStrategy(ranks, timeout=HANG_TIMEOUT if arguments.how == "hang" else 600.0),
        accelerator="gpu" if arguments.gpu else "cpu", devices=arguments.devices, num_nodes=arguments.nodes,
        accumulate_grad_batches=4, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    seconds: float
    last_line: str
    named: bool
    code: int
    left: int


def run(failure: Failure, launcher: str, ranks: int, gpu: bool = False) -> Outcome:
    """Start a job that fails, and wait until every one of its processes is gone.

    Args:
        failure: how.
        launcher: ``lightning``, ``torchrun``, ``deepspeed``, or ``nodes`` (Lightning's on as many nodes as ranks).
        ranks: the number of processes, each a stage.
        gpu: over NCCL; with ``nodes`` all ranks use the first GPU.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    python, script = sys.executable, str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as directory:
        marker, log = Path(directory) / "failed", Path(directory) / "log"
        devices, nodes = (1, ranks) if launcher == "nodes" else (ranks, 1)
        options = [
            script, "--job", "--how", failure.how, "--rank", str(failure.rank), "--devices", str(devices), "--nodes",
            str(nodes), "--marker", str(marker), *(["--gpu"] if gpu else []),
        ]  # fmt: skip
        environments: list[dict[str, str]] = [{}]
        command = [python, *options]
        if launcher == "torchrun":
            command = [
                python,
                "-m",
                "torch.distributed.run",
                f"--nproc-per-node={ranks}",
                f"--master-port={port}",
                *options,
            ]
        elif launcher == "deepspeed":
            command = [python, "-m", "deepspeed.launcher.launch", *deepspeed_options(ranks, port), *options]
        elif launcher == "nodes":
            environments = [
                {"NODE_RANK": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for n in range(ranks)
            ]
        with log.open("wb") as output:
            started = [
                subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
                )
                for extra in environments
            ]  # fmt: skip
            sessions = {process.pid for process in started}
            deadline = time.time() + 240
            while (left := members(sessions)) and time.time() < deadline:
                time.sleep(0.1)
                for process in started:
                    process.poll()
            ended = time.time()
        for process in left:
            process.kill()
        began = math.nan  # it ended before it came to fail
        if marker.exists():
            began = float(marker.read_text()) + (HANG_TIMEOUT if failure.how == "hang" else 0.0)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if line.startswith("pipelite: ") and failure.expected in line]
        if launcher not in ("torchrun", "deepspeed"):
            named = [line for line in named if line == lines[-1]]
        # One of several nodes, or the rank that was killed, may be told by any of the processes.
        code = max(process.returncode != 0 for process in started)
        shown = named[-1] if named else (lines[-1] if lines else "")
        return Outcome(ended - began, shown, bool(named), int(code), len(left))


def deepspeed_options(ranks: int, port: str) -> list[str]:
    """What the `deepspeed` command passes to its launcher on one node."""
    import base64
    import json

    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    return [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank"]


def members(sessions: set[int]) -> list[psutil.Process]:
    """The living processes of some sessions."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/failures.md")
    parser.add_argument("--gpu", action="store_true", help="two ranks over NCCL")
    for name in ("--how", "--marker"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--rank", "--devices", "--nodes"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(arguments)
        return
    import torch

    from report import Report

    ranks, launchers = 3, ["lightning", "torchrun", "deepspeed", "nodes"]
    if arguments.gpu:
        ranks, launchers = 2, ["lightning", "nodes"] if torch.cuda.device_count() > 1 else ["nodes"]
    name = "failures_nccl" if arguments.gpu else "failures"
    report = Report(
        name, "| launcher | failure | seconds | exit | left | last line |", "| --- | --- | --- | --- | --- | --- |"
    )
    failed = False
    jobs = [(launcher, failure) for launcher in launchers for failure in failures(ranks)]
    # Most of a job is its start. It takes a core for each process, and one for what watches it.
    at_once = max(1, (os.cpu_count() or 1) // (ranks + 1))
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = pool.map(lambda each: run(each[1], each[0], ranks, arguments.gpu), jobs)
        for (launcher, failure), o in zip(jobs, outcomes, strict=True):
            how = f"{failure.how}, rank {failure.rank}"
            report.row(f"| {launcher} | {how} | {o.seconds:.1f} | {o.code} | {o.left} | {o.last_line} |")
            failed |= not o.seconds <= LIMIT or not o.named or o.code == 0 or o.left > 0
    report.line("FAILED" if failed else f"all within {LIMIT:.0f} s, named, and nothing left")
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
