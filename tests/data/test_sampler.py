"""Every sequence is seen exactly once, in the same order for any number of replicas."""

from __future__ import annotations

from itertools import chain, zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipelite.data import PackedSampler


@given(
    size=st.integers(1, 40),
    replicas=st.integers(1, 7),
    round_to=st.integers(1, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_sequence_once_in_an_order_free_of_replicas(
    size: int, replicas: int, round_to: int, shuffle: bool, seed: int, epoch: int
) -> None:
    def deal(count: int, multiple: int) -> list[list[int | None]]:
        shares = []
        for rank in range(count):
            sampler = PackedSampler(
                range(size), num_replicas=count, rank=rank, shuffle=shuffle, seed=seed, round_to=multiple
            )
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
            assert sampler.total_size == len(sampler) * count
        return shares

    shares = deal(replicas, round_to)
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) % round_to == 0
    assert len(shares[0]) * replicas - size < replicas * round_to  # no more fill than necessary

    dealt = list(
        chain.from_iterable(zip_longest(*shares))
    )  # micro-batch k is number k // replicas of replica k % replicas
    assert sorted(dealt[:size]) == list(range(size))
    assert dealt[size:] == [None] * (len(dealt) - size)
    assert dealt[:size] == deal(1, 1)[0]


@given(size=st.integers(1, 40), replicas=st.integers(1, 7), round_to=st.integers(1, 4), start=st.integers(0, 40))
def test_what_is_left(size: int, replicas: int, round_to: int, start: int) -> None:
    start = min(start, size)
    shares = []
    for rank in range(replicas):
        sampler = PackedSampler(range(size), num_replicas=replicas, rank=rank, shuffle=True, round_to=round_to)
        whole = len(sampler)
        sampler.start = start
        shares.append(list(sampler))
        assert len(sampler) == whole  # that of the whole epoch, whatever is left
        assert len(shares[-1]) == sampler.rounds_left(start) <= whole
        assert len(shares[-1]) % round_to == 0
    dealt = list(chain.from_iterable(zip_longest(*shares)))
    left = list(PackedSampler(range(size), shuffle=True))[start:]
    assert dealt[: len(left)] == left
    assert set(dealt[len(left) :]) <= {None}
    assert len(dealt) - len(left) < replicas * round_to  # no round, or multiple of rounds, is empty


def test_order_changes_with_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> tuple[int | None, ...]:
        sampler = PackedSampler(range(50), shuffle=shuffle, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert order(2, 3) == order(2, 3)
    assert order(0, 1, shuffle=False) == tuple(range(50))


def test_rank_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        PackedSampler(range(5), num_replicas=2, rank=2, shuffle=False)


def test_the_seed_is_zero_unless_given() -> None:
    assert list(PackedSampler(range(40), shuffle=True)) == list(PackedSampler(range(40), shuffle=True, seed=0))
    assert list(PackedSampler(range(40), shuffle=True)) != list(PackedSampler(range(40), shuffle=True, seed=1))
