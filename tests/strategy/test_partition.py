"""Partitioning a sequence of layers into stages."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.partition import balanced_bounds, method_of, partition, spans_of


@dataclass
class Layers:
    names: list[str]
    counts: list[int] = field(default_factory=list)

    def parameter_counts(self) -> list[int]:
        return self.counts


@example([8, 1, 7, 3, 3], 4)  # another cut has the least sum of cubes
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_no_cut_has_a_lighter_heaviest_part_or_then_a_smaller_sum_of_squares(weights: list[int], parts: int) -> None:
    parts = min(parts, len(weights))

    def cost(bounds: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(weights[a:b]) for a, b in itertools.pairwise(bounds)]
        return max(sums), sum(s * s for s in sums)

    inner = itertools.combinations(range(1, len(weights)), parts - 1)
    best = min(cost((0, *cut, len(weights))) for cut in inner)
    bounds = balanced_bounds(weights, parts)
    assert len(bounds) == parts + 1
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert cost(tuple(bounds)) == best


def test_uniform_gives_the_first_stages_the_odd_layers() -> None:
    assert partition(Layers(["L"] * 10), 4) == [0, 3, 6, 8, 10]


def test_there_may_be_as_many_stages_as_layers() -> None:
    assert partition(Layers(["L"] * 4), 4) == [0, 1, 2, 3, 4]


def test_parameters_weighs_frozen_embeddings_too() -> None:
    assert partition(Layers(["L"] * 4, [90, 10, 10, 70]), 2, "parameters") == [0, 1, 4]


def test_type_counts_matching_layers_only() -> None:
    assert partition(Layers(["Dense", "Dense", "Dense", "MoE", "Dense", "MoE"]), 2, "type:moe") in (
        [0, 4, 6],
        [0, 5, 6],
    )


def test_layers_are_dealt_out_as_given() -> None:
    assert partition(Layers(["L"] * 5), 3, "layers:1, 3,1") == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("stages", "method", "message"),
    [
        (5, "uniform", "pipeline_stages=5 is more than the 4 layers"),
        (2, "type:mamba", "'mamba' matches none of the layer types A"),
        (2, "type:(", "is not a regular expression"),
        (2, "layers:3,x", "write layers: and the number of layers of each stage"),
        (2, "layers:4,0", "write layers: and the number of layers of each stage"),
        (2, "layers:3,2", "assigns 5 layers to 2 stages, but the model has 4 layers and pipeline_stages is 2"),
        (3, "layers:3,1", "assigns 4 layers to 2 stages, but the model has 4 layers and pipeline_stages is 3"),
        (2, "best", "must be uniform, parameters, type:REGEX, layers:N,N,... or auto, not 'best'"),
    ],
)
def test_what_cannot_be_cut_is_refused(stages: int, method: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        partition(Layers(["A"] * 4), stages, method)
    assert message in str(caught.value)


def test_the_pieces_of_virtual_stages_are_dealt_out_in_order() -> None:
    bounds = partition(Layers(["L"] * 8), 2, "layers:1,2,3,2", virtual_stages=2)
    assert bounds == [0, 1, 3, 6, 8]
    assert [spans_of(bounds, 2, stage) for stage in (0, 1)] == [[(0, 1), (3, 6)], [(1, 3), (6, 8)]]
    assert partition(Layers(["L"] * 9), 2, virtual_stages=4) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert partition(Layers(["L"] * 4, [90, 10, 10, 70]), 2, "parameters", virtual_stages=2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("uniform", "pipeline_stages=2 times virtual_stages=3 makes 6 pieces, more than the 4 layers"),
        ("uniform", "set virtual_stages to at most 2"),
        ("layers:2,2", "of the model; set virtual_stages to at most 2"),
    ],
)
def test_more_pieces_than_layers_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        partition(Layers(["A"] * 4), 2, method, virtual_stages=3)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["layers:4,4", "layers:2,2,2,1", "layers:2,2,2,2,1"])
def test_other_numbers_of_pieces_than_there_are_are_refused(method: str) -> None:
    with pytest.raises(ConfigurationError, match=r"pipeline_stages=2 times virtual_stages=2 makes 4 pieces"):
        partition(Layers(["A"] * 8), 2, method, virtual_stages=2)


def test_layers_that_must_stay_together_train_in_one_stage() -> None:
    layers = Layers(["A"] * 4)
    layers.one_stage_only = "a layer reads what all before it have left"  # type: ignore[attr-defined]
    assert partition(layers, 1) == [0, 4]
    for pieces in (1, 2):
        with pytest.raises(ConfigurationError, match=r"pipeline_stages=2, but .* because a layer reads what all"):
            partition(layers, 2, virtual_stages=pieces)


def test_a_split_is_written_as_it_is_read() -> None:
    assert method_of([0, 9, 16]) == "layers:9,7"
    assert partition(Layers(["L"] * 16), 2, method_of([0, 9, 16])) == [0, 9, 16]
