"""The grid of ranks."""

from __future__ import annotations

import pytest

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("world", "stages"), [(1, 1), (4, 1), (4, 4), (8, 2), (12, 3)])
def test_every_place_of_the_grid_has_one_rank(world: int, stages: int, column_major: bool) -> None:
    topology = Topology(world, stages, column_major)
    places = [(topology.stage_of(rank), topology.replica_of(rank)) for rank in range(world)]
    assert sorted(places) == [(s, r) for s in range(stages) for r in range(world // stages)]
    assert [topology.rank_of(*place) for place in places] == list(range(world))


def test_column_major_puts_the_stages_of_a_pipeline_side_by_side() -> None:
    assert [Topology(4, 2, True).stage_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [Topology(4, 2, False).stage_of(rank) for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("stages", [0, 3, 8])
def test_stages_must_divide_the_devices(stages: int) -> None:
    with pytest.raises(ConfigurationError, match=f"pipeline_stages={stages} must divide the number of devices .4."):
        Topology(4, stages)


@pytest.mark.parametrize(("layout", "least"), [({}, [1.0, 3.0]), ({"column_major": True}, [3.0, 1.0])])
def test_the_least_of_each_stages_ranks(layout: dict[str, bool], least: list[float]) -> None:
    assert Topology(4, 2, **layout).least_of_stages([4.0, 1.0, 3.0, 5.0]) == least
