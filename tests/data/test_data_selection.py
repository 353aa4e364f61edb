"""Which documents are kept, and whether they are for training or evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipelite.data.selection import choose_evaluation, class_of, within_tokens, within_weights


@given(digests=st.lists(st.integers(0, 12), max_size=40), fraction=st.floats(0, 1, exclude_max=True, allow_nan=False))
def test_evaluation_share(digests: list[int], fraction: float) -> None:
    held_out = choose_evaluation(np.array(digests, np.uint64), fraction)
    inside = {digest for digest, out in zip(digests, held_out, strict=True) if out}
    outside = {digest for digest, out in zip(digests, held_out, strict=True) if not out}
    assert not inside & outside
    if fraction == 0 or len(set(digests)) < 2:
        assert not inside
    else:
        assert inside
        assert outside


def test_evaluation_share_is_exact_where_documents_differ() -> None:
    digests = np.arange(1000, dtype=np.uint64)
    assert choose_evaluation(digests, 0.25).sum() == 250
    assert choose_evaluation(digests, 1e-6).sum() == 1
    assert choose_evaluation(digests, 0.9999).sum() == 999


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (1, 0), (4, 0), (5, 1), (8, 2), (9, 2), (100, 4)])
def test_within_tokens_takes_whole_documents(limit: int | None, count: int) -> None:
    assert within_tokens(np.array([5, 3, 4, 1]), limit) == count


def test_classes_are_about_half_each_and_free_of_the_split() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    classes = class_of(digests)
    assert set(classes.tolist()) == {-1, 1}
    assert abs(classes.mean()) < 0.05
    assert np.array_equal(class_of(digests[::-1]), classes[::-1])
    held_out = choose_evaluation(digests, 0.2)
    assert abs(classes[held_out].mean()) < 0.1


@pytest.mark.parametrize(
    ("tokens", "weights", "limits"),
    [
        ([100, 100], [1.0, 1.0], [100, 100]),
        ([100, 50], [1.0, 1.0], [50, 50]),
        ([100, 50], [3.0, 1.0], [100, 33]),
        ([1000, 10, 500], [1.0, 0.1, 4.0], [100, 10, 400]),
    ],
)
def test_weights(tokens: list[int], weights: list[float], limits: list[int]) -> None:
    assert within_weights(tokens, weights) == limits
