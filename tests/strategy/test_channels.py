"""Tensors handed from process to process through channels, over a driver on the CPU, and over a GPU's."""

from __future__ import annotations

import time

import pytest
import torch

import fake_cuda_driver
from channel_jobs import round_trips
from lightning_pipelite.strategy import copy_channels
from lightning_pipelite.strategy.copy_channels import Channel, ChannelEnd
from lightning_pipelite.strategy.links import Link
from processes import Workers

RINGS = {2: [(0, 1, False), (0, 1, True), (1, 0, False), (1, 0, True)]}
RINGS[3] = [(a, b, (b - a) % 3 == 2) for a in range(3) for b in range(3) if a != b]
NO_P2P, NO_SHM = {"NCCL_P2P_DISABLE": "1"}, {"NCCL_SHM_DISABLE": "1"}


@pytest.mark.parametrize("ranks", RINGS)
@pytest.mark.parametrize(
    ("reach", "on_host"), [("each other", False), ("none", True), ("broken", True), ("fails", True)]
)
def test_neighbours_hand_each_other_tensors(workers: Workers, ranks: int, reach: str, on_host: bool) -> None:
    for rank, result in enumerate(workers.run(ranks, round_trips, reach, [], 2)):
        assert result["connected"] == RINGS[ranks]
        assert result["on_host"] == ([link for link in RINGS[ranks] if rank in link[:2]] if on_host else [])
        assert result["right"]
        assert result["files"] == set()


@pytest.mark.parametrize(
    ("variables", "connected", "on_host"),
    [
        ([NO_P2P, NO_P2P], RINGS[2], RINGS[2]),
        ([NO_P2P], RINGS[2], RINGS[2]),  # one of the two
        ([NO_SHM, NO_SHM], [], []),
        ([NO_SHM], [], []),
        ([{"HOST": "another host's"}], [], []),
    ],
    ids=["P2P off", "P2P off on one", "SHM off", "SHM off on one", "two hosts"],
)
def test_what_is_left_out(
    workers: Workers, variables: list[dict[str, str]], connected: list[Link], on_host: list[Link]
) -> None:
    for result in workers.run(2, round_trips, "each other", variables):
        assert result["connected"] == connected
        assert result["on_host"] == on_host
        assert result["right"]
        assert result["files"] == set()


def test_there_is_no_channel_where_the_gpu_would_not_compute_while_it_waits(workers: Workers) -> None:
    for result in workers.run(2, round_trips, "one queue", []):
        assert result["connected"] == []
        assert result["files"] == set()


def test_a_ring_over_two_hosts_has_channels_within_each(workers: Workers) -> None:
    hosts = [{"HOST": "one"}, {"HOST": "one"}, {"HOST": "two"}, {"HOST": "two"}]
    for result in workers.run(4, round_trips, "each other", hosts):
        assert result["connected"] == [(0, 1, False), (1, 0, True), (2, 3, False), (3, 2, True)]
        assert result["right"]


@pytest.mark.gpu
@pytest.mark.parametrize(("variables", "on_host"), [({}, []), (NO_P2P, RINGS[2])], ids=["on the GPU", "on the host"])
def test_two_processes_hand_each_other_tensors_of_a_gpu(
    workers: Workers, variables: dict[str, str], on_host: list[Link]
) -> None:
    for result in workers.run(2, round_trips, None, [variables, variables], 2):
        assert result["connected"] == RINGS[2]
        assert result["on_host"] == on_host
        assert result["right"]


@pytest.mark.parametrize("before", [0, 2**32 - 5], ids=["from the start", "where the counts overflow"])
def test_what_is_in_a_slot_is_taken_out_before_it_is_used_again(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_channels, "SLOT", 64)
    slots = torch.zeros(2 * 64, dtype=torch.uint8)
    counts = torch.full((64,), before, dtype=torch.uint32)
    channel = Channel(slots.data_ptr(), counts.data_ptr(), counts)
    with fake_cuda_driver.installed():
        ends = [ChannelEnd(channel, fake_cuda_driver.Stream()) for _ in range(2)]  # type: ignore[arg-type]
        for end in ends:
            end._count = before
        sent = [torch.rand(50) for _ in range(20)]
        got = [torch.zeros(50) for _ in sent]
        out = [ends[0].send(tensor) for tensor in sent]
        works = [ends[1].receive(tensor) for tensor in got]
        for work in [*out, *works]:
            work.done.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


def test_what_is_sent_and_what_is_received_into_waits_for_the_computation_before() -> None:
    memory, counts = torch.zeros(2 * copy_channels.SLOT, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    channel = Channel(memory.data_ptr(), counts.data_ptr(), counts)
    sent, got = torch.zeros(50), torch.ones(50)

    def compute() -> None:
        time.sleep(0.2)
        sent.fill_(2.0)
        got.zero_()  # the memory's last use by another tensor

    with fake_cuda_driver.installed() as current:
        ends = [ChannelEnd(channel, fake_cuda_driver.Stream()) for _ in range(2)]  # type: ignore[arg-type]
        current.add(compute)
        out, come = ends[0].send(sent), ends[1].receive(got)
        assert not out.is_completed()
        assert not come.is_completed()
        used: list[float] = []
        come.wait()
        current.add(lambda: used.append(float(got.sum())))
        current.record_event().synchronize()
    assert used == [100.0]
