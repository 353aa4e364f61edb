"""The watchdog that a rank holds from the start of the job to its end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.watchdog import parent_death, timeouts
from lightning_pipelite.strategy.watchdog.client import Client
from lightning_pipelite.strategy.watchdog.coordinator import Coordinator
from lightning_pipelite.strategy.watchdog.failure import Failure, is_communication_error
from lightning_pipelite.strategy.watchdog.network import ADVICE, join
from lightning_pipelite.strategy.watchdog.processes import (
    after_traceback_of,
    announce,
    end_processes,
    leave,
    write_stderr,
)


class Watchdog:
    """Ends the job when a rank fails, dies or hangs; every rank holds one from the start of the job to its end.

    It works beside the collectives, not through them: with NCCL, nothing tells the survivors that a peer is gone. A
    daemon thread does all the work; the methods are for the main thread. In a job of one rank only the detection of
    hangs remains, and exceptions simply propagate.

    Local rank 0 of each node prints the last line. All survivors of a node print it if its local rank 0 has died, and
    those of the first node also if rank 0 does not answer. The ranks of a node are assumed to be contiguous.
    """

    def __init__(
        self,
        network: Coordinator | Client,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        stage: int,
        children: Sequence[subprocess.Popen[Any]],
        timeout: timedelta,
        last_act: Callable[[], None] = lambda: None,
    ) -> None:
        self._network = network
        self._rank, self._world_size, self._local_rank, self._stage = rank, world_size, local_rank, stage
        self._children = {rank + index: child for index, child in enumerate(children, start=1)}
        self._timeout = timeout.total_seconds()
        self._last_act = last_act
        # Set by the main thread
        self._last: tuple[float, str, bool] | None = None  # since when, the activity, whether it may wait
        self._piece = ""  # the piece of the stage, in words
        self._raised: Failure | None = None  # the main thread is unwinding
        self._finished = threading.Event()  # it has printed its traceback, or has none to print
        self._closing = threading.Event()
        # Set by the watchdog's thread
        self._failure: Failure | None = None  # the job's, while this rank is part of it
        self._settled = threading.Event()  # the failure, or that this rank leaves, has been sent
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="pipelite-watchdog", daemon=True)
        self._thread.start()

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        stage: int,
        host: str,
        children: Sequence[subprocess.Popen[Any]] = (),
        timeout: timedelta,
        last_act: Callable[[], None] = lambda: None,
    ) -> Watchdog:
        """Connect the ranks: a collective over the default process group, with any backend.

        Args:
            rank: The global rank of this process.
            world_size: The number of ranks.
            local_rank: The rank of this process on its node.
            stage: The pipeline stage of this rank, for the message.
            host: The name or address at which all ranks reach rank 0, usually the main address of the process group.
            children: The other ranks of this node, in the order of their ranks, if this process has launched them.
            timeout: How long a rank may work on one activity before it counts as hanging.
            last_act: Called before this process is ended, in a thread other than the main one.

        Raises:
            ConfigurationError: If a rank cannot reach rank 0.
        """
        network = join(rank, world_size, stage, host)
        watchdog = cls(
            network,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            stage=stage,
            children=children,
            timeout=timeout,
            last_act=last_act,
        )
        if isinstance(network, Coordinator) and not network.complete.wait(timeouts.ATTACH):
            error = ConfigurationError(
                f"ranks {network.missing} did not reach rank 0 at {host} within {timeouts.ATTACH:g} s; {ADVICE}"
            )
            watchdog.fail(error)
            watchdog.close()
            raise error
        if parent_death.was_launched():  # from here on, it outlives its launcher to report the death
            parent_death.die_with_launcher(False)
        return watchdog

    def progress(self, activity: str, *, waits: bool = False, piece: str = "") -> None:
        """Report that this rank is alive and what it does next; from the first call on, it is watched for hangs.

        Args:
            activity: Its name for the message, such as "forward".
            waits: Whether the activity may wait for other ranks. It then has more time, so that the rank that all wait
                for is the first to be reported.
            piece: The piece of the stage that it concerns, for the message, if there are several.
        """
        self._last = (time.monotonic(), activity, waits)
        self._piece = piece

    def failure_of(self, exception: BaseException) -> Failure:
        """Return the failure to report for an exception that this rank has raised."""
        return Failure.of(exception, self._rank, self._stage, self._piece)

    def fail(self, exception: BaseException) -> None:
        """Tell all ranks that this one has raised; called in its main thread before the exception propagates.

        It returns, so that Python can print the traceback, after which the process ends with the last line and status
        1. If the exception is caught instead, this process continues; the others end all the same. A communication
        error may only be a consequence of another rank's failure: if that is reported within 5 s, the process ends
        here.

        KeyboardInterrupt and SystemExit often reach all ranks at once: the others get 10 s to exit on their own.
        """
        if self._world_size == 1 or self._raised or self._closing.is_set():
            return
        failure = self.failure_of(exception)
        if is_communication_error(exception) and self._settled.wait(timeouts.CAUSE):
            self._leave_it_to_the_thread()
        self._raised = failure
        if failure.kind != "interrupted":
            after_traceback_of(exception, self._leave_it_to_the_thread)
            ErrorHandler().record_exception(exception)
        self._settled.wait(timeouts.RELAY + 1.0)

    def close(self) -> None:
        """Leave the watchdog at a clean end; what the other ranks do then is no longer a failure here.

        Not a collective: it never waits for another rank. If the job has already failed, the process ends here. After
        ``fail`` it only marks the end of the teardown.
        """
        self._closing.set()
        if not self._raised and self._settled.wait(2.0) and self._failure is not None:
            self._leave_it_to_the_thread()

    def _run(self) -> None:
        try:
            self._watch()
            if self._failure is not None:
                self._end(self._failure)
        except BaseException:
            write_stderr(traceback.format_exc())
            leave()  # no rank continues unwatched; to the others it has died
        finally:
            self._network.close()

    def _watch(self) -> None:
        """Return when the job has failed, or when this rank has left and no other rank needs its network."""
        network = self._network
        while network.failure is None:
            network.turn(timeouts.TICK)
            if self._raised:
                network.report(self._raised)
            elif self._closing.is_set() and network.failure is None:
                network.say(bye=True)
                self._settled.set()
                while isinstance(network, Coordinator) and not network.alone:
                    network.turn(timeouts.TICK)  # the others still need a coordinator
                return
            self._watch_children()
            self._watch_progress()
        self._failure = network.failure
        self._settled.set()

    def _watch_children(self) -> None:
        for rank, child in list(self._children.items()):
            code = child.poll()
            if code is not None:
                self._network.report_exit(rank, code)
                del self._children[rank]

    def _watch_progress(self) -> None:
        last = self._last
        if last is None or self._raised:
            return
        since, activity, waits = last
        limit = self._timeout + (min(10.0, self._timeout / 2) if waits else 0.0)
        if time.monotonic() - since <= limit:
            return
        self._last = None
        what = "has waited for other ranks" if waits else "has made no progress"
        reason = f'{what} for {limit:g} s in "{activity}"; raise the strategy\'s timeout if that is expected'
        self._network.report(Failure(self._rank, self._stage, reason, "hung", self._piece))
        stack = "".join(traceback.format_stack(sys._current_frames().get(self._main_thread)))
        write_stderr(f"\nRank {self._rank} is here (most recent call last):\n{stack}")

    def _end(self, failure: Failure) -> None:
        """End this process: let its main thread print, wait until all ranks have printed, then print the last line.

        If something else launched the ranks, that line comes before they part: a launcher that sees one exit may kill
        the others at once. If this process launched them, it comes after they have exited.
        """
        deadline = time.monotonic() + timeouts.UNWIND
        while not self._finished.is_set() and (self._raised or failure.kind == "interrupted"):
            if time.monotonic() > deadline and not self._closing.is_set():
                break  # stuck; but after close() it runs the user's code
            self._network.turn(timeouts.TICK)
        self._network.say(done=True)
        while not self._network.alone and time.monotonic() < deadline + timeouts.GOODBYE:
            self._network.turn(timeouts.TICK)
        last = str(failure) if self._speaks_for_its_node(failure) else None
        if last is not None and not self._children:
            announce(last)
            last = None
        self._network.close()
        try:
            self._last_act()
            end_processes(self._children.values(), timeouts.CHILDREN)
            for worker in multiprocessing.active_children():
                worker.kill()  # data loader workers would take seconds to notice
            if not self._raised:
                ErrorHandler().record_exception(RuntimeError(str(failure)))
        finally:
            leave(last)

    def _speaks_for_its_node(self, failure: Failure) -> bool:
        first = self._rank - self._local_rank
        first_is_silent = (failure.kind == "died" and failure.rank == first) or (self._network.lost and first == 0)
        return self._local_rank == 0 or first_is_silent

    def _leave_it_to_the_thread(self) -> None:
        self._finished.set()
        self._thread.join(30.0)
        os._exit(1)
