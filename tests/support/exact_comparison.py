"""Training through the pipeline compared with a plain loop over the unsplit model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from exact_training import LOSS_LIMIT, WEIGHT_LIMIT, Case, Scale, Split, make_model, train_plain, train_split
from processes import Workers
from routing_ties import TIE, ClosestChoice

DRAWS = 5  # of data, at most


def differences(ours: Any, reference: Any) -> tuple[float, float]:
    """Return the largest difference of a loss, and the largest relative one of a weight, in the 2-norm."""
    (losses, weights), (plain_losses, plain_weights) = ours, reference
    assert len(losses) == len(plain_losses), f"{len(losses)} steps instead of {len(plain_losses)}"
    missing = {name for name in plain_weights.keys() ^ weights.keys() if name != "lm_head.weight"}
    assert not missing, f"not in both: {sorted(missing)}"
    loss = max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True))
    weight = max(float((w - plain_weights[n]).norm() / plain_weights[n].norm()) for n, w in weights.items())
    return loss, weight


def compare(
    workers: Workers, case: Case, splits: Sequence[Split], steps: int, scale: Scale
) -> Iterator[tuple[Split, float, float]]:
    """Train a case in every split, and yield the differences of each from the plain loop."""
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), case, scale)
        yield from compare_with_plain(workers, case, directory, splits, steps, scale)


def compare_with_plain(
    workers: Workers,
    case: Case,
    model_dir: str,
    splits: Sequence[Split],
    steps: int,
    scale: Scale,
    *,
    plain_dir: str | None = None,
    alone: bool = False,
    moves: float = 0.01,
) -> Iterator[tuple[Split, float, float]]:
    """Train the model in every split, and yield the differences of each from the plain loop.

    Where they exceed the limits, and rounding alone decided a choice of the plain loop's routers, the two may have used
    different experts. Then other data are drawn, a few times; what is wrong with any data is wrong with the last, too.

    Args:
        workers: The processes.
        case: The way to train.
        model_dir: Directory of the model.
        splits: How to distribute it.
        steps: Number of steps.
        scale: Sizes of the data, and the seed of those that are drawn first.
        plain_dir: Directory of the model that the plain loop trains, if it is another.
        alone: Run each document separately in the plain loop.
        moves: By how much its loss has to move, at least.

    Raises:
        AssertionError: If it moves less.
    """
    references: dict[int, tuple[Any, float]] = {}
    for split in splits:
        for seed in range(scale.seed, scale.seed + DRAWS):
            drawn = replace(scale, seed=seed)
            if seed not in references:
                plain = partial(_train_plain_observed, alone=alone)
                references[seed] = workers.run(1, plain, case, plain_dir or model_dir, steps, drawn)[0]
                (losses, _), _ = references[seed]
                moved = max(abs(loss - losses[0]) for loss in losses)
                assert moved > moves, f"the loss moves by {moved} only: nothing is compared"
            reference, gap = references[seed]
            ranks = split.stages * split.replicas
            ours = workers.run(ranks, train_split, case, split, model_dir, steps, drawn)[0]
            loss, weight = differences(ours, reference)
            if gap > TIE or (loss <= LOSS_LIMIT and weight <= WEIGHT_LIMIT):
                break
        yield split, loss, weight


def _train_plain_observed(*arguments: Any, alone: bool) -> tuple[Any, float]:
    choice = ClosestChoice()
    return train_plain(*arguments, alone=alone, choice=choice), choice.gap
