"""A rank that fails, dies or hangs ends the whole job at once; its rank, stage and reason are the last line printed.

Rank 0 holds one TCP connection to every other rank from the start of the job to its end. The kernel closes the
connections of a process that dies, so a death is seen without heartbeats (TCP keepalive covers a lost machine). This
works beside the collectives and not through them: on NCCL nothing tells the survivors that a peer is gone.

How a job ends: whoever notices a failure tells rank 0, the first failure wins, rank 0 tells all. Each rank says "done"
once its own traceback, if it has one, is printed; rank 0 then closes all connections, on which everyone leaves.
"""

from __future__ import annotations

import ctypes
import hmac
import json
import multiprocessing
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import connection
from types import TracebackType
from typing import Any, Literal

import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from lightning_pipelite.errors import ConfigurationError

LAUNCHER_PID = "PIPELITE_LAUNCHER_PID"  # in the environment of a launched process: who launched it

# Seconds. Together they stay below the 30 s in which a job must be gone.
_TICK = 0.1  # between two looks at the children and at the own progress
_ATTACH = 30.0  # for the connections at the start
_PRIMARY = 5.0  # for the cause of an error of communication to arrive
_RELAY = 5.0  # for rank 0 to confirm a failure, before a rank believes that rank 0 hangs and leaves alone
_STATUS = 1.0  # for the exit status of a dead rank to arrive from its parent
_UNWIND = 10.0  # for a main thread that raised to tear down and to print its traceback

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_LINE = 1 << 16  # bytes; what is longer does not come from a rank
_COMMUNICATION = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "timed out waiting",
    "gloo/transport",
    "nccl",
)


@dataclass(frozen=True)
class Failure:
    """What ended the job.

    Args:
        rank: The global rank that failed.
        stage: The pipeline stage of that rank.
        reason: What follows "rank 1 (stage 1) " in the message, in one line.
        when: When it was noticed, in seconds since the epoch.
        kind: Whether the rank raised, died, hung, or left by KeyboardInterrupt or SystemExit.
    """

    rank: int
    stage: int
    reason: str
    when: float
    kind: Literal["raised", "died", "hung", "interrupted"]

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.stage}) {self.reason}"


def announce(message: str) -> None:
    """Writes the last line of a job to stderr, even if a stuck main thread holds the locks of Python's buffers."""
    for stream in (sys.stdout, sys.stderr):
        flush = threading.Thread(target=stream.flush, daemon=True)
        flush.start()
        flush.join(1.0)
    with suppress(OSError):
        os.write(2, f"\npipelite: {message}\n".encode(errors="replace"))  # a progress bar leaves its line open


def describe_exit(code: int | None) -> str:
    """Says how a process ended, given the ``returncode`` of its Popen, or None where nobody knows."""
    if code is None:
        return "died without a word (killed, or out of memory?)"
    if code >= 0:
        return f"died: exit code {code}"
    return f"died: killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def end_processes(processes: Iterable[subprocess.Popen[Any]], patience: float) -> None:
    """Waits ``patience`` seconds for the processes to end by themselves, then sends SIGTERM, and 2 s later SIGKILL."""
    processes = list(processes)
    for signum, seconds in ((None, patience), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + seconds
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            if signum is not None:
                process.send_signal(signum)
        for process in alive:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def _die_with_launcher(yes: bool) -> None:
    """Lets the kernel send SIGKILL to this process when its launcher dies, or no longer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0)


def _guard_orphan() -> bool:
    """Called at import, in a launched process: until the lifeline holds, it must not outlive its launcher."""
    launcher = os.environ.pop(LAUNCHER_PID, None)  # a process that this one starts is none of the launcher's
    if launcher is None:
        return False
    _die_with_launcher(True)
    if os.getppid() != int(launcher):  # it died before the line above
        os._exit(1)
    return True


_LAUNCHED = _guard_orphan()


class _Link:
    """A TCP connection that carries JSON objects, a line each."""

    def __init__(self, sock: socket.socket) -> None:
        self.rank = self.stage = -1  # until the hello
        self.launched = False  # whether a parent can tell its exit status
        self.left = self.done = False
        self._buffer = b""
        self._socket = sock
        sock.settimeout(2.0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", 5),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", 5),
            ("TCP_USER_TIMEOUT", 15000),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # a broken connection shows when it is read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Reads what has arrived. Raises EOFError where the connection has ended, or speaks another language."""
        try:
            data = self._socket.recv(_LONGEST_LINE)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise EOFError from error
        if not data or len(self._buffer) > _LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def close(self) -> None:
        self._socket.close()


class _Hub:
    """Rank 0's end of all connections: it admits the ranks, sees them die, and tells all of the first failure."""

    def __init__(self, world_size: int = 1, listener: socket.socket | None = None, token: str = "") -> None:
        self.failure: Failure | None = None
        self.complete = threading.Event()  # every rank is connected
        self._world_size = world_size
        self._listener = listener
        self._token = token
        self._links: list[_Link] = []  # open, admitted or not
        self._ranks: dict[int, _Link] = {}  # admitted, open or not
        self._deaths: dict[int, float] = {}  # rank: when seen, in this order
        self._exits: dict[int, int] = {}  # rank: exit status, from its parent

    @property
    def alone(self) -> bool:
        return all(link.done for link in self._links)

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(1, self._world_size) if rank not in self._ranks]

    def turn(self, seconds: float) -> None:
        """Waits up to ``seconds`` for something to happen, and deals with it."""
        sources: list[Any] = [*self._links, self._listener] if self._listener else [*self._links]
        for source in connection.wait(sources, seconds):
            if isinstance(source, _Link):
                self._read(source)
            elif self._listener is not None:
                with suppress(OSError):
                    self._links.append(_Link(self._listener.accept()[0]))
        for rank, since in self._deaths.items():
            link, code = self._ranks[rank], self._exits.get(rank)
            if code is None and link.launched and time.monotonic() - since < _STATUS:
                break  # a later death may be a consequence of this one
            self.report(Failure(rank, link.stage, describe_exit(code), time.time(), "died"))

    def report(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self.say(failure=asdict(failure))

    def report_exit(self, rank: int, code: int) -> None:
        """Notes the exit status of a rank; one that ended badly is dead, though a fork may hold its connection."""
        self._exits[rank] = code
        if code != 0 and rank in self._ranks and not self._ranks[rank].left:
            self._deaths.setdefault(rank, time.monotonic())

    def say(self, **message: Any) -> None:
        for link in self._links:
            link.send(**message)

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []
        self._stop_listening()

    def _read(self, link: _Link) -> None:
        try:
            for message in link.receive():
                self._handle(link, message)
        except EOFError:
            link.close()
            if link in self._links:
                self._links.remove(link)
            if link.rank > 0 and not link.left:
                self._deaths.setdefault(link.rank, time.monotonic())

    def _handle(self, link: _Link, message: dict[str, Any]) -> None:
        if link.rank < 0:
            self._admit(link, message)
        elif "failure" in message:
            self.report(Failure(**message["failure"]))
        elif "exit" in message:
            self.report_exit(*message["exit"])
        else:
            link.left |= "bye" in message
            link.done |= "done" in message

    def _admit(self, link: _Link, hello: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            raise EOFError
        link.rank, link.stage, link.launched = hello["rank"], hello["stage"], hello["launched"]
        self._ranks[link.rank] = link
        if self.failure is not None:
            link.send(failure=asdict(self.failure))
        if not self.missing:
            self._stop_listening()
            for stranger in [other for other in self._links if other.rank < 0]:
                stranger.close()
                self._links.remove(stranger)
            self.complete.set()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class _Spoke:
    """The end of another rank: one connection, to rank 0, whose death is a failure as well."""

    def __init__(self, link: _Link, hub_stage: int) -> None:
        self.failure: Failure | None = None
        self._link: _Link | None = link
        self._hub_stage = hub_stage
        self._reported: tuple[Failure, float] | None = None

    @property
    def alone(self) -> bool:
        return self._link is None

    def turn(self, seconds: float) -> None:
        """Waits up to ``seconds`` for something to happen, and deals with it."""
        sources: list[Any] = [self._link] if self._link else []
        for _ in connection.wait(sources, seconds):
            link = sources[0]
            try:
                for message in link.receive():
                    link.left |= "bye" in message
                    if "failure" in message:
                        self.failure = self.failure or Failure(**message["failure"])
            except EOFError:
                self.close()
                if not link.left:
                    died = Failure(0, self._hub_stage, describe_exit(None), time.time(), "died")
                    self.failure = self.failure or (self._reported[0] if self._reported else died)
        if self._reported and (self.alone or time.monotonic() - self._reported[1] > _RELAY):
            self.failure = self.failure or self._reported[0]

    def report(self, failure: Failure) -> None:
        self._reported = self._reported or (failure, time.monotonic())
        self.say(failure=asdict(failure))

    def report_exit(self, rank: int, code: int) -> None:
        self.say(exit=[rank, code])

    def say(self, **message: Any) -> None:
        if self._link is not None:
            self._link.send(**message)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class Lifeline:
    """Ends the job when a rank fails, dies or hangs; every rank holds one from the start of the job to its end.

    A daemon thread does all the work; the methods are for the main thread. In a job of one rank only the watch for a
    hang remains, and exceptions just propagate.

    Local rank 0 of each node prints the last line, or every survivor of a node whose local rank 0 died. The ranks of a
    node are taken to be contiguous.
    """

    def __init__(
        self,
        network: _Hub | _Spoke,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        stage: int,
        children: Sequence[subprocess.Popen[Any]],
        timeout: timedelta,
    ) -> None:
        self._network = network
        self._rank, self._world_size, self._local_rank, self._stage = rank, world_size, local_rank, stage
        self._children = {rank + index: child for index, child in enumerate(children, start=1)}
        self._timeout = timeout.total_seconds()
        self._last: tuple[float, str, bool] | None = None  # since when, in what, waiting for others or not
        self._mail: queue.SimpleQueue[Failure] = queue.SimpleQueue()
        self._settled = threading.Event()  # the job has failed, and all have been told
        self._raised = False  # the main thread is unwinding
        self._finished = threading.Event()  # ... and has printed its traceback, or has none to print
        self._closing = threading.Event()
        self._said_bye = threading.Event()
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="pipelite-lifeline", daemon=True)
        self._thread.start()
        _OPEN.add(self)

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
    ) -> Lifeline:
        """Connects the ranks: a collective over the default process group, of any backend.

        Args:
            rank: The global rank of this process.
            world_size: The number of ranks.
            local_rank: The rank of this process on its node.
            stage: The pipeline stage of this rank, for the message.
            host: The name or address under which all ranks reach rank 0, usually the main address of the process group.
            children: The other ranks of this node in the order of their ranks, where this process has launched them.
            timeout: How long a rank may work on one activity before it counts as hanging.

        Raises:
            ConfigurationError: If a rank cannot reach rank 0.
        """
        network: _Hub | _Spoke = _Hub()
        if world_size > 1:
            listener = _listen(host, world_size) if rank == 0 else None
            shared: list[Any] = [listener.getsockname()[1], secrets.token_hex(16), stage] if listener else [0, "", 0]
            torch.distributed.broadcast_object_list(shared, src=0)
            port, token, hub_stage = shared
            if listener:
                network = _Hub(world_size, listener, token)
            else:
                link = _dial(host, port, rank)
                link.send(token=token, rank=rank, stage=stage, launched=_LAUNCHED)
                network = _Spoke(link, hub_stage)
        lifeline = cls(
            network,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            stage=stage,
            children=children,
            timeout=timeout,
        )
        if world_size > 1 and isinstance(network, _Hub) and not network.complete.wait(_ATTACH):
            raise ConfigurationError(
                f"ranks {network.missing} did not reach rank 0 at {host} within {_ATTACH:g} s; let the nodes open TCP "
                "connections to each other, or set MASTER_ADDR to an address of rank 0 that all of them can reach."
            )
        if _LAUNCHED:
            _die_with_launcher(False)  # from here on, a launched rank outlives its launcher for long enough to say so
        return lifeline

    def progress(self, activity: str, *, waits: bool = False) -> None:
        """Says that this rank is alive and what it does next; from the first call on it is watched.

        Args:
            activity: A name for the message, such as "forward".
            waits: Whether the activity may wait for other ranks. The rank that all wait for then speaks first.
        """
        self._last = (time.monotonic(), activity, waits)

    def suspend(self) -> None:
        """Stops the watch on this rank until the next ``progress``, for work that may last: a callback, a save."""
        self._last = None

    def fail(self, exception: BaseException) -> None:
        """Tells all ranks that this one has raised; called in its main thread before the exception propagates.

        Returns, so that Python can print the traceback, after which the process ends with the last line and status 1.
        If the exception is caught instead, this process goes on; the others end all the same. An error of communication
        may be the mere consequence of another rank's failure: if that is heard of within 5 s, the process ends here.

        KeyboardInterrupt and SystemExit often reach all ranks at once: the others get 10 s to leave by themselves.
        """
        if self._world_size == 1 or self._raised or self._closing.is_set():
            return
        interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
        if not interrupted and _is_communication_error(exception) and self._settled.wait(_PRIMARY):
            self._leave_it_to_the_thread()
        self._raised = True
        reason = f"{'left by' if interrupted else 'failed:'} {_in_one_line(exception)}"
        kind: Literal["raised", "interrupted"] = "interrupted" if interrupted else "raised"
        self._mail.put(Failure(self._rank, self._stage, reason, time.time(), kind))
        if not interrupted:
            ErrorHandler().record_exception(exception)
            self._finish_after_traceback_of(exception)
        self._settled.wait(_RELAY + 1.0)

    def close(self) -> None:
        """Leaves the lifeline at a clean end; what the other ranks do is no longer a failure here.

        Not a collective: it never waits for another rank. After ``fail`` it only marks the end of the teardown.
        """
        self._closing.set()
        if not self._raised:
            self._said_bye.wait(2.0)

    def _run(self) -> None:
        try:
            while self._network.failure is None:
                self._network.turn(_TICK)
                with suppress(queue.Empty):
                    self._network.report(self._mail.get_nowait())
                if self._network.failure is None and self._closing.is_set() and not self._raised:
                    self._network.say(bye=True)
                    self._said_bye.set()
                    while isinstance(self._network, _Hub) and not self._network.alone:
                        self._network.turn(_TICK)  # the others still need a hub
                    return
                self._watch_children()
                self._watch_progress()
            self._settled.set()
            self._end(self._network.failure)
        finally:
            self._network.close()

    def _watch_children(self) -> None:
        for rank, child in list(self._children.items()):
            code = child.poll()
            if code is not None:
                self._network.report_exit(rank, code)
                del self._children[rank]

    def _watch_progress(self) -> None:
        if self._last is None or self._raised:
            return
        since, activity, waits = self._last
        limit = self._timeout + (min(10.0, self._timeout / 2) if waits else 0.0)
        if time.monotonic() - since <= limit:
            return
        self._last = None
        sys.stderr.write(f"\nRank {self._rank} is here (most recent call last):\n")
        traceback.print_stack(sys._current_frames().get(self._main_thread))
        what = "has waited for other ranks" if waits else "has made no progress"
        reason = f'{what} for {limit:g} s in "{activity}"; raise the strategy\'s timeout if that is expected'
        self._network.report(Failure(self._rank, self._stage, reason, time.time(), "hung"))

    def _end(self, failure: Failure) -> None:
        """Ends this process: lets its main thread print, waits until all ranks have printed, speaks the last line."""
        deadline = time.monotonic() + _UNWIND
        while not self._finished.is_set() and (self._raised or failure.kind == "interrupted"):
            if time.monotonic() > deadline and not self._closing.is_set():
                break  # stuck; but once closed, it has left the strategy and is the user's
            self._network.turn(_TICK)
        self._network.say(done=True)
        while not self._network.alone and time.monotonic() < deadline + 1.0:
            self._network.turn(_TICK)
        self._network.close()
        try:
            end_processes(self._children.values(), patience=5.0)
            for worker in multiprocessing.active_children():
                worker.kill()  # data loader workers would notice only after seconds
            if not self._raised:
                ErrorHandler().record_exception(RuntimeError(str(failure)))
            first_of_node = self._rank - self._local_rank
            if self._local_rank == 0 or (failure.kind == "died" and failure.rank == first_of_node):
                announce(str(failure))
        finally:
            os._exit(1)

    def _finish_after_traceback_of(self, exception: BaseException) -> None:
        print_traceback = sys.excepthook

        def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            print_traceback(kind, value, trace)
            cause: BaseException | None = value
            while cause is not None and cause is not exception:
                cause = cause.__cause__ or cause.__context__
            if cause is exception:  # and not one of the user's, after the first was caught
                self._leave_it_to_the_thread()

        sys.excepthook = hook

    def _leave_it_to_the_thread(self) -> None:
        self._finished.set()
        self._thread.join(30.0)
        os._exit(1)

    def _drop_inherited_sockets(self) -> None:
        self._network.close()


_OPEN: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked data loader worker must not hold the connection open when its rank is killed."""
    for lifeline in list(_OPEN):
        lifeline._drop_inherited_sockets()


os.register_at_fork(after_in_child=_after_fork)


def _listen(host: str, backlog: int) -> socket.socket:
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    # On all interfaces: rank 0 may see its own name as a loopback address (Debian's 127.0.1.1), of no use to others.
    with suppress(OSError, ValueError):
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _dial(host: str, port: int, rank: int) -> _Link:
    try:
        return _Link(socket.create_connection((host, port), timeout=_ATTACH))
    except OSError as error:
        raise ConfigurationError(
            f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}); let the nodes open TCP connections to each "
            "other, or set MASTER_ADDR to an address of rank 0 that all of them can reach."
        ) from error


def _in_one_line(exception: BaseException) -> str:
    message = " ".join(str(exception).split())
    if len(message) > 500:
        message = message[:497] + "..."
    return f"{type(exception).__name__}: {message}" if message else type(exception).__name__


def _is_communication_error(exception: BaseException) -> bool:
    error: BaseException | None = exception
    while error is not None:
        message = str(error).lower()
        if isinstance(error, (torch.distributed.DistError, ConnectionError)):
            return True
        if isinstance(error, RuntimeError) and any(sign in message for sign in _COMMUNICATION):
            return True
        error = error.__cause__
    return False
