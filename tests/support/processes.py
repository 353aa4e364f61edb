"""Persistent worker processes, one for each rank: a new process group costs a second, a new process ten.

To Lightning, the workers look as if torchrun had started them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from ports import free_port


class WorkerError(RuntimeError):
    """A worker ended instead of answering."""


class Workers:
    """A pool of ranks.

    Args:
        size: The maximum number of ranks of a job; processes start when first needed.
        one_gpu: Whether the ranks share the first GPU; they then act as nodes of one process each.
    """

    def __init__(self, size: int, one_gpu: bool = False) -> None:
        self._size = size
        self._one_gpu = one_gpu
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """Call ``function(*args)`` in ranks 0 to ``world_size - 1`` with the variables that torchrun sets.

        Args:
            world_size: The number of ranks.
            function: A function of an importable module.
            timeout: Seconds until the job counts as hung.

        Returns:
            What each rank returned.

        Raises:
            RuntimeError: With the first rank's traceback, if one raised. All workers are then replaced.
            WorkerError: If one ended, or took too long. All workers are then replaced.
        """
        assert world_size <= self._size
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        port = free_port()
        try:
            for rank, (_, connection) in enumerate(self._workers[:world_size]):
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0}
                if self._one_gpu:
                    ranks = {"RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
                variables = {**ranks, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                connection.send((variables, function, args))
            answers = [self._answer(rank, timeout) for rank in range(world_size)]
        except BaseException:  # Ctrl-C or a test's timeout: a late answer would count as the next job's
            self.close(patience=0)
            raise
        errors = [error for _, error in answers if error]
        if errors:
            self.close()
            told = [error for error in errors if "Traceback" in error]
            raise RuntimeError(told[0]) if told else WorkerError(errors[0])
        return [result for result, _ in answers]

    def _answer(self, rank: int, timeout: float) -> tuple[Any, str | None]:
        """Return what a rank has returned, or the reason why it has not."""
        process, connection = self._workers[rank]
        try:
            if not connection.poll(timeout):
                raise EOFError
            return connection.recv()
        except (EOFError, ConnectionResetError):
            return None, f"rank {rank}: no answer (exit code {process.exitcode})"

    def close(self, patience: float = 5) -> None:
        """End all workers, killing those that have not exited after ``patience`` seconds."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(patience)
            process.kill()
            process.join()
        self._workers.clear()


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    while True:
        try:
            variables, function, args = connection.recv()
        except EOFError:
            return
        variables = {name: str(value) for name, value in variables.items()}
        try:
            # What a job sets in the environment, such as a seed, does not outlive it.
            with _no_output(), mock.patch.dict(os.environ, variables, TORCHELASTIC_RUN_ID="workers"):
                connection.send((function(*args), None))
        except BaseException:
            connection.send((None, f"rank {variables['RANK']}: {traceback.format_exc()}"))
        finally:
            _leave_process_group()


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    if os.environ.get("PIPELITE_VERBOSE_WORKERS"):
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _leave_process_group() -> None:
    import gc
    import sys

    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:  # it keeps the old group in module variables
        import deepspeed.comm.comm
        import deepspeed.utils.groups

        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups.mpu = None
