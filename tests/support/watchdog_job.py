"""The jobs of test_watchdog.py: ``watchdog_job.py HOW FOLDER WHAT VICTIM RANKS [FIRST WORLD_SIZE]``.

HOW is the parent of the ranks: "launched" for local rank 0, as with Lightning; "neutral" for a process that is not a
rank, as with torchrun; "one" for a rank that torchrun itself has started. RANKS is the number of ranks on this node,
FIRST the first of them. WHAT is what happens to rank VICTIM; with "trainer WHAT", the ranks run Lightning's Trainer.
HOW may also be a module, which gets the other arguments, or "script" with the path of one.

``watchdog_job.py serve DESCRIPTOR`` waits on a socket for jobs and forks a process for each, so that the imports, which
take longer than any job, happen only once. Each job then runs until the interpreter exits, like a script.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
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

if __name__ == "__main__" and sys.argv[1] != "serve":  # started by torchrun: the packages without Lightning
    for name in ("lightning_pipelite", "lightning_pipelite.strategy"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(__file__).parents[2].joinpath(*name.split(".")))]
        sys.modules[name] = module

from lightning_pipelite.strategy.watchdog import Watchdog, link, network, parent_death, timeouts


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
    """One rank: connects, trains two steps, and fails as requested."""

    def __init__(self, what: str, folder: Path, victim: int, rank: int, local_rank: int, world_size: int) -> None:
        self.what, self.folder, self.victim = what, folder, victim
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size

    def run(self, children: list[Fork]) -> None:
        torch.set_num_threads(1)
        (self.folder / f"pid{self.rank}").write_text(str(os.getpid()))
        backend = os.environ.get("WATCHDOG_BACKEND", "gloo")
        self.device = torch.device("cpu")
        if backend == "nccl":
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=60))
        self._prepare()
        self.watchdog = Watchdog.connect(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            stage=self.rank,
            host=os.environ["MASTER_ADDR"],
            children=children,
            timeout=timedelta(seconds=2 if self.what in ("hang", "wait") else 20),
            last_act=self._be_killed if self.what == "impatient" and self.rank == 0 else lambda: None,
        )
        try:
            self.train()
        except BaseException as exception:  # as Lightning does
            self.watchdog.fail(exception)
            self.watchdog.close()
            if self.what != "catch" or self.rank != self.victim:
                raise
            time.sleep(2.0)  # the user's code handles it
            (self.folder / "went on").touch()
        else:
            self.watchdog.close()
            dist.destroy_process_group()
        for child in children:
            child.wait()

    def _prepare(self) -> None:
        if self.what == "clean":
            network._dial = self._dial_after_strangers
        if self.what in ("leave", "catch", "stop"):
            timeouts.UNWIND = timeouts.RELAY = timeouts.GOODBYE = 0.5
        if self.what == "out of reach":
            timeouts.ATTACH = timeouts.CHILDREN = 1.0
            if self.rank == self.victim:
                network._dial = self._dial_nowhere
        if self.what == "break" and self.rank == self.victim:
            Watchdog._watch_progress = self._break

    def _be_killed(self) -> None:
        """End as by a launcher that has seen another rank exit."""
        os.kill(os.getpid(), signal.SIGKILL)

    def train(self) -> None:
        self.watchdog.progress("first step", waits=True)
        dist.barrier()
        if self.what == "clean":
            time.sleep(0.2 * self.rank)  # rank 0 exits first
            return
        if self.what == "late" and self.rank != self.victim:
            while not self.watchdog._settled.is_set():
                time.sleep(0.01)
            return  # exits cleanly, as if it had not noticed
        if self.what == "stop" and self.rank != self.victim:
            time.sleep(0.5)
            raise ValueError("the\n  message")
        if self.rank != self.victim or self.what in ("wait", "break"):
            self.watchdog.progress("receive", waits=True)
            source = self.victim if self.rank != self.victim else (self.rank + 1) % self.world_size
            never_sent = torch.zeros(1, device=self.device)
            dist.recv(never_sent, src=source)
            never_sent.item()
        self.watchdog.progress("forward")
        time.sleep(0.3)
        (self.folder / "failed").write_text(str(time.time()))
        if self.what in ("raise", "catch", "late", "impatient"):
            raise ValueError("the\n  message")
        if self.what == "leave":
            raise SystemExit(0)
        if self.what == "kill":
            self._hold_sockets_in_a_fork()
        if self.what in ("kill", "kill plainly"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "stop":
            self._stop_for(3.0)
        time.sleep(60.0)

    def _hold_sockets_in_a_fork(self) -> None:
        """Keep gloo's sockets open after this rank is killed, as data loader workers do: gloo reports nothing."""
        if os.fork() == 0:
            for descriptor in (1, 2):
                os.close(descriptor)
            time.sleep(12.0)
            os._exit(0)

    def _stop_for(self, seconds: float) -> None:
        """Stop all threads of this process, as when a library hangs while it holds the GIL."""
        if os.fork() == 0:
            time.sleep(seconds)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _break(self) -> None:
        (self.folder / "failed").write_text(str(time.time()))
        raise AssertionError("a bug of the watchdog itself")

    def _dial_after_strangers(self, host: str, port: int, rank: int) -> link.Link:
        """Connect after strangers: one with a wrong token, one that sends garbage, one that sends nothing and stays."""
        self.strangers = []
        for words in (b'{"token": "wrong", "rank": 1, "stage": 1, "launched": false}\n', b"\xff\n[]\n{}\n", b""):
            self.strangers.append(socket.create_connection((host, port)))
            self.strangers[-1].sendall(words)
        return _dial(host, port, rank)

    def _dial_nowhere(self, host: str, port: int, rank: int) -> link.Link:
        (self.folder / "failed").write_text(str(time.time()))
        self.nowhere = socket.create_server((host, 0))
        return _dial(host, self.nowhere.getsockname()[1], rank)


_dial = network._dial


def train_with_lightning(how: str, folder: Path, victim: int, rank: int, ranks: int) -> None:
    """Run a rank of the job that fails on purpose; to Lightning, it looks externally launched."""
    import failing_job

    failing_job.HANG_TIMEOUT = 3.0
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    marker = str(folder / "failed")
    failing_job.job(
        argparse.Namespace(how=how, rank=victim, devices=ranks, nodes=1, marker=marker, gpu=False, virtual_stages=1)
    )


def main() -> None:
    how = sys.argv[1]
    if how == "script":
        sys.argv = sys.argv[2:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    if "." in how:
        sys.argv = sys.argv[1:]
        runpy.run_module(how, run_name="__main__", alter_sys=True)
        return
    folder, what, victim, ranks = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    first, world_size = (int(argument) for argument in (*sys.argv[6:], 0, ranks)[:2])
    if how == "one":
        rank = int(os.environ["RANK"])
        Job(what, folder, victim, rank, int(os.environ["LOCAL_RANK"]), world_size).run([])
        return
    children: list[Fork] = []
    local_rank = 0
    os.environ[parent_death.LAUNCHER_PID] = str(os.getpid())
    for index in range(1 if how == "launched" else 0, ranks):
        children.append(Fork())
        if children[-1].pid == 0:
            local_rank, children = index, []
            break
    in_fork = len(children) == 0 and (how == "neutral" or local_rank > 0)
    if how == "launched" and in_fork:
        parent_death.guard_against_parent_death()
    if how == "neutral" and not in_fork:
        (folder / "codes.json").write_text(json.dumps([child.wait() for child in children]))
        os._exit(0)
    if how == "neutral":
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error{local_rank}.json")
    if what.startswith("trainer "):
        train_with_lightning(what.removeprefix("trainer "), folder, victim, local_rank, ranks)
    else:
        Job(what, folder, victim, first + local_rank, local_rank, world_size).run(children)


def serve(asked: socket.socket) -> bool:
    """Fork the requested processes; return True in a new one, which must run ``main``, and False at the end."""
    while True:
        request, descriptors, *_ = socket.recv_fds(asked, 1 << 16, 1)
        if not request:
            return False
        commands, environment = json.loads(request)
        processes: list[int] = []
        for command in commands:
            processes.append(os.fork())
            if processes[-1] == 0:
                asked.close()
                for stream in (1, 2):
                    os.dup2(descriptors[0], stream)
                os.close(descriptors[0])
                sys.argv[1:] = command
                os.environ.clear()
                os.environ.update(environment)
                return True
        os.close(descriptors[0])
        asked.sendall(json.dumps(processes).encode() + b"\n")
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        asked.sendall(json.dumps(codes).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        main()
    else:
        importlib.import_module("lightning_pipelite.strategy.engine")  # imports Lightning and DeepSpeed
        if serve(socket.socket(fileno=int(sys.argv[2]))):
            main()
