"""Channels pass tensors between processes exactly, with a fake driver on the CPU and with a real GPU's."""

from __future__ import annotations

import time

import pytest
import torch

import fake_cuda_driver
from channel_jobs import round_trips
from lightning_pipelite.strategy import copy_channels
from lightning_pipelite.strategy.copy_channels import Channel, ChannelEnd
from processes import Workers

RINGS = {2: [(0, 1, False), (0, 1, True), (1, 0, False), (1, 0, True)]}
RINGS[3] = [(a, b, (b - a) % 3 == 2) for a in range(3) for b in range(3) if a != b]
NO_SHM = {"NCCL_SHM_DISABLE": "1"}


@pytest.mark.parametrize("ranks", RINGS)
def test_neighbours_hand_each_other_tensors(workers: Workers, ranks: int) -> None:
    for result in workers.run(ranks, round_trips, "", [], 2):
        assert result["connected"] == RINGS[ranks]
        assert result["right"]
        assert result["files"] == set()


@pytest.mark.parametrize(
    "variables",
    [[NO_SHM, NO_SHM], [NO_SHM], [{"HOST": "another host's"}], [{"FAKE_DRIVER": "old"}]],
    ids=["SHM off", "SHM off on one", "two hosts", "an old driver on one"],
)
def test_what_is_left_out(workers: Workers, variables: list[dict[str, str]]) -> None:
    for result in workers.run(2, round_trips, "", variables):
        assert result["connected"] == []
        assert result["files"] == set()


@pytest.mark.parametrize("fault", ["none", "broken", "fails", "one queue"])
def test_there_is_no_channel_that_does_not_work(workers: Workers, fault: str) -> None:
    """With "one queue", the GPU could not compute while a channel waits."""
    for result in workers.run(2, round_trips, fault, []):
        assert result["connected"] == []
        assert result["files"] == set()


def test_a_ring_over_two_hosts_has_channels_within_each(workers: Workers) -> None:
    hosts = [{"HOST": "one"}, {"HOST": "one"}, {"HOST": "two"}, {"HOST": "two"}]
    for result in workers.run(4, round_trips, "", hosts):
        assert result["connected"] == [(0, 1, False), (1, 0, True), (2, 3, False), (3, 2, True)]
        assert result["right"]


@pytest.mark.gpu
def test_two_processes_hand_each_other_tensors_of_a_gpu(workers: Workers) -> None:
    for result in workers.run(2, round_trips, None, [], 2):
        assert result["connected"] == RINGS[2]
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
        got.zero_()  # stands for the last use of this memory by another tensor

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
