"""The sums that ranks share, worked out by hand with small numbers, and with all ranks in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.loss_sums import LossSums
from lightning_pipelite.strategy.micro_batches import MicroBatch

CPU = torch.device("cpu")


class Told:
    """A loss that returns its arguments as sum and count, and a third term to be logged."""

    logged = ("third",)

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, ...]:
        return outputs, targets, 10 * targets


def product(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs * targets


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def test_terms_are_added_up_in_float64_and_begin_anew() -> None:
    sums = LossSums(Told(), stage_id=0, stages=1, device=CPU)
    assert sums.tensor.tolist() == [0, 0, 0]
    assert sums.tensor.dtype == torch.float64
    for outputs, count in ((2.0**24, 2**24 + 1), (1.0, 4), (0.5, 0)):  # float32 cannot represent the sums
        leaf = scalar(outputs).requires_grad_()
        assert sums.add(leaf, torch.tensor(count)) is leaf  # the tensor to be differentiated
    terms = [2.0**24 + 1.5, 2**24 + 5, 10 * (2**24 + 5)]
    assert sums.tensor.tolist() == terms
    assert not sums.tensor.requires_grad
    assert sums.require_same_data(terms, "here") == terms
    sums.begin([(scalar(1.0), scalar(2.0))])
    assert sums.tensor.tolist() == [0, 0, 0]


def test_they_are_on_their_way_to_the_host_once_all_micro_batches_have_been_added() -> None:
    micro_batches = [(scalar(1.0), scalar(2.0)), (scalar(3.0), scalar(4.0))]
    first, middle, last = (LossSums(product, stage_id, stages=3, device=CPU) for stage_id in range(3))
    for sums in (first, middle, last):
        sums.begin(micro_batches)
    assert first.on_host is not None
    assert middle.on_host is not None
    assert last.on_host is None
    last.add(scalar(1.0), scalar(2.0))
    assert last.on_host is None
    last.add(scalar(3.0), scalar(4.0))
    assert last.on_host is not None
    *of_first, mark = first.on_host.value()
    assert of_first == [0, 0]
    assert mark > 0
    assert middle.on_host.value() == [0, 0, 0]
    assert last.on_host.value() == [14, 2, -mark]
    last.begin(micro_batches)
    assert last.on_host is None


def test_a_loss_alone_counts_as_one() -> None:
    sums = LossSums(product, stage_id=0, stages=1, device=CPU)
    for outputs in (2.0, 5.0):
        assert sums.add(scalar(outputs), scalar(3.0)) == 3 * outputs
    assert sums.tensor.tolist() == [21, 2]


def test_another_loss_counts_for_a_while() -> None:
    sums = LossSums(Told(), stage_id=1, stages=2, device=CPU)
    with sums.counted_by(product):
        sums.add(scalar(2.0), scalar(3.0))
    assert sums.tensor.tolist() == [6, 1, 0, 0]
    with pytest.raises(KeyError), sums.counted_by(product):
        raise KeyError
    sums.add(scalar(2.0), scalar(3.0))
    assert sums.tensor.tolist() == [8, 4, 30, 0]


def shared(of_first: list[MicroBatch], of_last: list[MicroBatch]) -> list[float]:
    """Return the sums over three stages; the second's data do not count, and the last has a loss of 2 over 3."""
    ranks = [LossSums(Told(), stage_id, stages=3, device=CPU) for stage_id in range(3)]
    for rank, given in zip(ranks, (of_first, batches([9, 9, 9]), of_last), strict=True):
        rank.begin(given)
    ranks[-1].add(scalar(2.0), scalar(3.0))
    return ranks[1].require_same_data(sum(rank.tensor for rank in ranks).tolist(), "step 7")  # type: ignore[union-attr]


def batches(*rows: list[int]) -> list[MicroBatch]:
    return [(torch.tensor(row[:-1]), torch.tensor(row[1:])) for row in rows]


def test_first_and_last_stages_must_have_the_same_data() -> None:
    own = batches([1, 2, 3, 4], [5, 6, 7, 8])
    assert shared(own, batches([1, 2, 3, 4], [5, 6, 7, 8])) == [2, 3, 30]
    others = [[1, 2, 4, 3], [5, 6, 7, 8]], [[5, 6, 7, 8], [1, 2, 3, 4]], [[1, 2, 3, 4]], [[1, 2, 3, 4], [5, 6, 7, 9]]
    for rows in others:
        with pytest.raises(ConfigurationError, match=r"were given different micro-batches in step 7; "):
            shared(own, batches(*rows))
