"""A training resumed within the second epoch, even with another split, still trains on exactly the dataset."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_jobs import Row, train
from lightning_pipelite.data import DatasetConfig, PackedDataModule, PackedSampler
from lightning_pipelite.data.loader import PackedLoader
from lightning_pipelite.errors import ConfigurationError
from packed_files import write_jsonl
from processes import Workers

CHANCE = random.Random(3)
# Stages, replicas and micro-batches a step, before and after.
CHANGES = [
    ((1, 1, 3), (1, 1, 3)),
    ((1, 1, 3), (2, 1, 3)),
    ((2, 1, 3), (1, 1, 3)),
    ((1, 1, 4), (1, 2, 2)),
    ((1, 2, 2), (1, 1, 4)),
    ((1, 2, 1), (2, 1, 2)),
    ((2, 1, 2), (1, 2, 1)),
]
MOMENTS = [CHANCE.random() for _ in CHANGES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, texts: list[str]) -> dict[str, Any]:
    """Options that give 25 different sequences, an odd number."""
    folder = tmp_path_factory.mktemp("resume")
    source = write_jsonl(folder / "a.jsonl", texts[:20])
    return {
        "datasets": [DatasetConfig(source.dataset_path)],
        "sequence_len": 64,
        "max_sequences": 25,
        "eval_fraction": 0,
        "tokenizer_dir": str(tokenizer_dir),
        "cache_dir": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def dataset(data: dict[str, Any]) -> list[Row]:
    packed = PackedDataModule(**data)
    rows = packed.train_dataloader().dataset
    found = [tuple(rows[index]["input_ids"].tolist()) for index in range(25)]
    assert len(set(found)) == 25
    return found


def of_epoch(ranks: list[list[tuple[int, list[Row]]]], stages: int, epoch: int) -> list[Row]:
    """Return all rows trained on in an epoch; each replica counts once, and its stages must have had the same rows."""
    replicas: dict[str, list[tuple[int, list[Row]]]] = {}
    copies: Counter[str] = Counter()
    for trained in ranks:
        replicas[repr(trained)] = trained
        copies[repr(trained)] += 1
    assert set(copies.values()) == {stages}
    return [row for trained in replicas.values() for at, rows in trained if at == epoch for row in rows]


@pytest.mark.parametrize(("change", "moment"), list(zip(CHANGES, MOMENTS, strict=True)), ids=str)
def test_an_epoch_is_exactly_the_dataset(
    workers: Workers, tmp_path: Path, data: dict[str, Any], dataset: list[Row], change: Any, moment: float
) -> None:
    before, after = change
    path = str(tmp_path / "at.ckpt")
    rounds = -(-25 // before[1])
    stop = int(moment * rounds)
    first = workers.run(before[0] * before[1], train, data, *before, path, stop)
    second = workers.run(after[0] * after[1], train, data, *after, path)
    assert Counter(of_epoch(first, before[0], 0)) == Counter(dataset)
    stopped = [[step for step in trained if step[0] < 2] for trained in first]
    # Micro-batches whose step was unfinished when the checkpoint was saved count as unseen.
    last = of_epoch(stopped, before[0], 1)
    assert len(last) == min(
        25, before[1] * ((stop + 1) // before[2] * before[2] if stop + 1 < -(-25 // before[1]) else 25)
    )
    assert Counter(last) + Counter(of_epoch(second, after[0], 1)) == Counter(dataset)
    assert Counter(of_epoch(second, after[0], 2)) == Counter(dataset)
    assert not of_epoch(second, after[0], 0)


def loader(data: dict[str, Any], **replica: int) -> PackedLoader:
    packed = PackedDataModule(**data)
    packed.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=replica or None))  # type: ignore[assignment]
    found = packed.train_dataloader()
    assert isinstance(found, PackedLoader)
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("taken", [0, 1, 3, 6])
def test_what_follows_is_the_rest_of_the_order(
    data: dict[str, Any], dataset: list[Row], before: int, after: int, taken: int
) -> None:
    def take(replicas: int, state: Any = None, most: int = 99) -> tuple[list[Row], Any]:
        """Return the rows of all replicas in the order in which they are dealt, and the state, which all share."""
        dealt, states = [], []
        for rank in range(replicas):
            one = loader(data, num_replicas=replicas, rank=rank)
            if state is not None:
                one.load_state_dict(state)
            sampler = one.sampler
            assert isinstance(sampler, PackedSampler)
            sampler.set_epoch(1)
            dealt.append(list(itertools.islice(one, most)))
            states.append(one.state_dict())
        assert all(each == states[0] for each in states)
        rounds = [batch for batches in zip(*dealt, strict=True) for batch in batches]
        rows = [tuple(b["input_ids"][0].tolist()) for b in rounds if (b["labels"] != -100).any()]
        return rows, states[0]

    whole, _ = take(1)
    assert Counter(whole) == Counter(dataset)
    assert whole != dataset
    first, state = take(before, most=taken)
    assert first == whole[: before * taken]
    assert state["sequences_seen"] == before * taken
    rest, end = take(after, state)
    assert rest == whole[before * taken :]
    assert end["sequences_seen"] == 25


def test_the_next_epoch_begins_at_its_beginning(data: dict[str, Any], dataset: list[Row]) -> None:
    one = loader(data)
    state = {**one.state_dict(), "epoch": 0, "sequences_seen": 25}
    one.load_state_dict(state)
    assert one.state_dict() == state
    assert isinstance(one.sampler, PackedSampler)
    one.sampler.set_epoch(1)
    assert len(list(one)) == 25
    one.load_state_dict({**state, "epoch": 1, "sequences_seen": 20})
    assert len(list(one)) == 5
    assert len(list(one)) == 25  # the position applies only once


def test_a_process_that_fetches_ahead_does_not_count(data: dict[str, Any], dataset: list[Row]) -> None:
    """The loader is configured as for a GPU, where a persistent worker prefetches."""
    packed = PackedDataModule(**data)
    packed.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))  # type: ignore[assignment]
    options = packed._on_gpu()
    assert options == {"pin_memory": True, "num_workers": 1, "persistent_workers": True}
    rows = packed.train_dataloader().dataset

    def make() -> tuple[PackedLoader, PackedSampler]:
        sampler = PackedSampler(rows, shuffle=True)  # type: ignore[arg-type]
        return PackedLoader(rows, sampler, fingerprint="x", **{**options, "pin_memory": False}), sampler

    one, sampler = make()
    order = [[tuple(batch["input_ids"][0].tolist()) for batch in one]]
    sampler.set_epoch(1)
    begun = iter(one)
    order.append([tuple(next(begun)["input_ids"][0].tolist()) for _ in range(7)])
    state = one.state_dict()
    assert (state["epoch"], state["sequences_seen"]) == (1, 7)
    other, sampler = make()
    other.load_state_dict(state)
    sampler.set_epoch(1)
    order[1] += [tuple(batch["input_ids"][0].tolist()) for batch in other]
    assert Counter(order[0]) == Counter(order[1]) == Counter(dataset)
    assert order[0] != order[1]


def test_a_position_in_other_data_is_refused(data: dict[str, Any], tmp_path: Path, texts: list[str]) -> None:
    state = loader(data).state_dict()
    loader({**data, "isolate_documents": False, "cache_dir": str(tmp_path)}).load_state_dict(state)
    other = write_jsonl(tmp_path / "a.jsonl", [*texts[:19], texts[25]])
    for change in ({"seed": 1}, {"max_sequences": 24}, {"datasets": [other]}, {"sequence_prefix": ""}):
        with pytest.raises(
            ConfigurationError, match=r"ckpt_path: the checkpoint was made with different training data"
        ):
            loader({**data, **change}).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="different training data"):
        loader(data).load_state_dict({"epoch": 0})
