"""Counts with nouns in the singular or plural."""

from __future__ import annotations

import pytest

from lightning_pipelite.data.statistics import SplitStatistics
from lightning_pipelite.shared.wording import counted


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [(0, "stage", "0 stages"), (1, "stage", "1 stage"), (2, "micro-batch", "2 micro-batches"),
     (1234, "bad record", "1,234 bad records")],
)  # fmt: skip
def test_counted(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words


def test_one_of_each_in_a_summary() -> None:
    one = SplitStatistics(documents=1, tokens=1, sequences=1, padding=0.5, dropped_tokens=1)
    assert one.describe(64) == "1 document, 1 token in 1 sequence of 64 (50.0% padding), 1 token dropped"
