"""One rank of a small gloo job for test_lifeline.py: ``lifeline_rank.py FOLDER WHAT VICTIM``.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torchrun's. With LAUNCH=1 local rank 0 starts
the other ranks of its node, as Lightning does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PACKAGE = Path(__file__).parents[2] / "lightning_pipelite"
for name in (
    "lightning_pipelite",
    "lightning_pipelite.strategy",
):  # without what their __init__ imports: Lightning, DeepSpeed
    module = types.ModuleType(name)
    module.__path__ = [str(PACKAGE.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = module

from lightning_pipelite.strategy import lifeline as room  # noqa: E402

FOLDER, WHAT, VICTIM = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LOCAL_RANK, LOCAL_WORLD_SIZE = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def start_others() -> list[subprocess.Popen[bytes]]:
    launch = os.environ.pop("LAUNCH", "")
    if not launch or LOCAL_RANK != 0:
        return []
    return [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={
                **os.environ,
                "RANK": str(RANK + index),
                "LOCAL_RANK": str(index),
                room.LAUNCHER_PID: str(os.getpid()),
            },
        )
        for index in range(1, LOCAL_WORLD_SIZE)
    ]


def hold_sockets_in_a_fork() -> None:
    """As a data loader worker does: gloo's sockets stay open when this rank is killed, and gloo tells nobody."""
    if os.fork() == 0:
        for descriptor in (1, 2):
            os.close(descriptor)
        time.sleep(12.0)
        os._exit(0)


def wait_for_victim() -> None:
    """Blocks in a receive from the victim, which never sends."""
    dist.recv(torch.zeros(1), src=VICTIM if RANK != VICTIM else (RANK + 1) % WORLD_SIZE)


def train(lifeline: room.Lifeline) -> None:
    lifeline.progress("first step", waits=True)
    dist.barrier()
    if WHAT == "clean":
        time.sleep(0.2 * RANK)  # all leave at other times, rank 0 first
        return
    if RANK != VICTIM or WHAT == "wait":
        lifeline.progress("receive", waits=True)
        wait_for_victim()
    lifeline.progress("forward")
    time.sleep(0.3)
    if WHAT in ("raise", "catch"):
        raise ValueError("the\n  message")
    if WHAT == "leave":
        raise SystemExit(0)
    if WHAT == "kill":
        hold_sockets_in_a_fork()
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT == "kill-plainly":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0)


def dial_as_strangers(host: str, port: int, rank: int) -> room._Link:
    """Before the rank itself: one that lies, one that talks nonsense, one that says nothing and stays."""
    for words in (b'{"token": "wrong", "rank": 1, "stage": 1, "launched": false}\n', b"\xff\n[]\n{}\n", b""):
        stranger = socket.create_connection((host, port))
        stranger.sendall(words)
        strangers.append(stranger)
    return dial(host, port, rank)


strangers: list[socket.socket] = []
dial = room._dial
torch.set_num_threads(1)
(FOLDER / f"pid{RANK}").write_text(str(os.getpid()))
children = start_others()
if WHAT == "clean":
    room._dial = dial_as_strangers
if WHAT in ("leave", "catch"):
    room._UNWIND = 1.0
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
lifeline = room.Lifeline.connect(
    rank=RANK,
    world_size=WORLD_SIZE,
    local_rank=LOCAL_RANK,
    stage=RANK,
    host=os.environ["MASTER_ADDR"],
    children=children,
    timeout=timedelta(seconds=2),
)
try:
    train(lifeline)
except BaseException as exception:
    lifeline.fail(exception)
    lifeline.close()
    if WHAT != "catch" or RANK != VICTIM:
        raise
    time.sleep(3.0)  # the user has a plan
    (FOLDER / "went on").touch()
else:
    lifeline.close()
for child in children:
    child.wait()
