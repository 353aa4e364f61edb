"""A small job for test_lifeline.py: ``lifeline_job.py HOW FOLDER WHAT VICTIM RANKS [FIRST WORLD_SIZE]``.

HOW says whose children the ranks are: "launched", those of local rank 0, as with Lightning; "neutral", those of a
process that is no rank, as with torchrun; "one", a rank that torchrun itself has started. RANKS is the number of them
on this node, FIRST the first of them. The ranks are forks, so that torch is imported once a node.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PACKAGE = Path(__file__).parents[2] / "lightning_pipelite"
for name in ("lightning_pipelite", "lightning_pipelite.strategy"):  # the packages without what they import: Lightning
    module = types.ModuleType(name)
    module.__path__ = [str(PACKAGE.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = module

from lightning_pipelite.strategy import lifeline as room  # noqa: E402


class Fork(subprocess.Popen):  # type: ignore[type-arg]
    """A Popen of a fork: its constructor returns in both processes, with ``pid`` 0 in the new one."""

    def __init__(self) -> None:
        super().__init__(["fork"])

    def _execute_child(self, *arguments: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            self.returncode = 0


class Job:
    """One rank: connects, trains two steps, and fails as it is told to."""

    def __init__(self, what: str, folder: Path, victim: int, rank: int, local_rank: int, world_size: int) -> None:
        self.what, self.folder, self.victim = what, folder, victim
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size

    def run(self, children: list[Fork]) -> None:
        torch.set_num_threads(1)
        (self.folder / f"pid{self.rank}").write_text(str(os.getpid()))
        backend = os.environ.get("LIFELINE_BACKEND", "gloo")
        self.device = torch.device("cpu")
        if backend == "nccl":
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=60))
        if self.what == "clean":
            room._dial = self._dial_after_strangers
        if self.what in ("leave", "catch"):
            room._UNWIND = 1.0
        self.lifeline = room.Lifeline.connect(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            stage=self.rank,
            host=os.environ["MASTER_ADDR"],
            children=children,
            timeout=timedelta(seconds=2),
        )
        try:
            self.train()
        except BaseException as exception:  # as Lightning does
            self.lifeline.fail(exception)
            self.lifeline.close()
            if self.what != "catch" or self.rank != self.victim:
                raise
            time.sleep(3.0)  # the user has a plan
            (self.folder / "went on").touch()
        else:
            self.lifeline.close()
            dist.destroy_process_group()
        for child in children:
            child.wait()

    def train(self) -> None:
        self.lifeline.progress("first step", waits=True)
        dist.barrier()
        if self.what == "clean":
            time.sleep(0.2 * self.rank)  # rank 0 leaves first
            return
        if self.rank != self.victim or self.what == "wait":
            self.lifeline.progress("receive", waits=True)
            source = self.victim if self.rank != self.victim else (self.rank + 1) % self.world_size
            never_sent = torch.zeros(1, device=self.device)
            dist.recv(never_sent, src=source)
            never_sent.item()
        self.lifeline.progress("forward")
        time.sleep(0.3)
        (self.folder / "failed").write_text(str(time.time()))
        if self.what in ("raise", "catch"):
            raise ValueError("the\n  message")
        if self.what == "leave":
            raise SystemExit(0)
        if self.what == "kill":
            self._hold_sockets_in_a_fork()
        if self.what in ("kill", "kill plainly"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60.0)

    def _hold_sockets_in_a_fork(self) -> None:
        """As a data loader worker does: gloo's sockets stay open when this rank is killed, and gloo tells nobody."""
        if os.fork() == 0:
            for descriptor in (1, 2):
                os.close(descriptor)
            time.sleep(12.0)
            os._exit(0)

    def _dial_after_strangers(self, host: str, port: int, rank: int) -> room._Link:
        """Before the rank itself: one that lies, one that talks nonsense, one that says nothing and stays."""
        self.strangers = []
        for words in (b'{"token": "wrong", "rank": 1, "stage": 1, "launched": false}\n', b"\xff\n[]\n{}\n", b""):
            self.strangers.append(socket.create_connection((host, port)))
            self.strangers[-1].sendall(words)
        return _dial(host, port, rank)


_dial = room._dial


def main() -> None:
    how, folder, what, victim, ranks = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    first, world_size = (int(argument) for argument in (*sys.argv[6:], 0, ranks)[:2])
    if how == "one":
        rank = int(os.environ["RANK"])
        Job(what, folder, victim, rank, int(os.environ["LOCAL_RANK"]), world_size).run([])
        return
    children: list[Fork] = []
    local_rank = 0
    for index in range(1 if how == "launched" else 0, ranks):
        os.environ[room.LAUNCHER_PID] = str(os.getpid())
        children.append(Fork())
        if children[-1].pid == 0:
            local_rank, children = index, []
            break
    in_fork = len(children) == 0 and (how == "neutral" or local_rank > 0)
    if how == "launched" and in_fork:
        room._LAUNCHED = room._guard_orphan()
    if how == "neutral" and not in_fork:
        (folder / "codes.json").write_text(json.dumps([child.wait() for child in children]))
        return
    if how == "neutral":
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error{local_rank}.json")
    Job(what, folder, victim, first + local_rank, local_rank, world_size).run(children)


if __name__ == "__main__":
    main()
