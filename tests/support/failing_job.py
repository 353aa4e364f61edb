"""A job that fails on purpose in its third step, and how that looks from outside.

Run as a script, this is one process of the job.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ports import free_port

HANG_TIMEOUT = 8.0


@dataclass(frozen=True)
class Failure:
    """A way to fail.

    Args:
        how: ``raise``, ``kill`` (SIGKILL), ``hang`` or ``nan``.
        rank: The rank that fails; with ``nan``, all ranks notice.
        expected: What the last line must contain.
    """

    how: str
    rank: int
    expected: str


def failures(ranks: int, virtual_stages: int = 1) -> list[Failure]:
    def place(rank: int) -> str:
        """Return how a failing rank is named; of several pieces a stage, each of one layer, the first one fails."""
        return f"rank {rank} (stage {rank}{f', piece {rank}, layer {rank}' if virtual_stages > 1 else ''})"

    raised = [Failure("raise", rank, f"{place(rank)} failed: ValueError: broken on purpose") for rank in range(ranks)]
    killed = [Failure("kill", rank, f"rank {rank} (stage {rank}) died") for rank in (0, ranks - 1)]
    hung = Failure("hang", ranks - 1, f"{place(ranks - 1)} has made no progress")
    return [*raised, *killed, hung, Failure("nan", 0, "step 3: the loss is nan")]


def job(arguments: argparse.Namespace) -> None:
    """Run one process of the job."""
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
            self.layers = nn.ModuleList(Fails(index) for index in range(ranks * arguments.virtual_stages))

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
        strategy=PipeLiteStrategy(
            ranks,
            timeout=HANG_TIMEOUT if arguments.how == "hang" else 600.0,
            virtual_stages=arguments.virtual_stages,
        ),
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


def run(failure: Failure, launcher: str, ranks: int, gpu: bool = False, virtual_stages: int = 1) -> Outcome:
    """Start a job that fails, and wait until all of its processes are gone.

    Args:
        failure: How it fails.
        launcher: ``lightning``, ``torchrun``, ``deepspeed``, or ``nodes`` (Lightning's on as many nodes as ranks).
        ranks: The number of processes, each a stage.
        gpu: Whether to run over NCCL; with ``nodes``, all ranks use the first GPU.
        virtual_stages: Pieces of each stage.
    """
    port = str(free_port())
    python, script = sys.executable, str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as directory:
        marker, log = Path(directory) / "failed", Path(directory) / "log"
        devices, nodes = (1, ranks) if launcher == "nodes" else (ranks, 1)
        options = [
            script, "--how", failure.how, "--rank", str(failure.rank), "--devices", str(devices), "--nodes",
            str(nodes), "--marker", str(marker), "--virtual-stages", str(virtual_stages), *(["--gpu"] if gpu else []),
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
        began = math.nan  # if it ended before the failure
        if marker.exists():
            began = float(marker.read_text()) + (HANG_TIMEOUT if failure.how == "hang" else 0.0)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if line.startswith("pipelite: ") and failure.expected in line]
        if launcher not in ("torchrun", "deepspeed"):
            named = [line for line in named if line == lines[-1]]
        # With several nodes, or a killed rank, any of the processes may be the one that reports it.
        code = max(process.returncode != 0 for process in started)
        shown = named[-1] if named else (lines[-1] if lines else "")
        return Outcome(ended - began, shown, bool(named), int(code), len(left))


def deepspeed_options(ranks: int, port: str) -> list[str]:
    """Return what the `deepspeed` command passes to its launcher on one node."""
    import base64
    import json

    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    return [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={port}", "--no_local_rank"]


def members(sessions: set[int]) -> list[psutil.Process]:
    """Return the live processes of the given sessions."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for text in ("--how", "--marker"):
        parser.add_argument(text)
    for number in ("--rank", "--devices", "--nodes"):
        parser.add_argument(number, type=int)
    parser.add_argument("--virtual-stages", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    job(parser.parse_args())
