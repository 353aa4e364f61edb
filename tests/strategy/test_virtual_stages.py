"""Several pieces of the model per stage train as in a plain torch loop, keep their names, and are named in reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_pipelite import PipeLiteStrategy
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.strategy.pieces import Pieces
from processes import Workers
from stage_jobs import train, train_plainly
from stage_models import DEEP
from virtual_jobs import drop_out, measured, reported_failure

SPLITS = [
    *((name, 2, 1, 2) for name in DEEP),
    ("eight layers", 2, 1, 4),
    ("eight layers", 2, 2, 3),
    ("eight layers", 4, 1, 2),
    ("tied ends", 4, 1, 2),
    ("tied ends", 2, 2, 4),
    ("frozen pieces", 4, 1, 2),
    ("deep sides", 4, 1, 2),
]


@pytest.mark.parametrize(("name", "stages", "replicas", "pieces"), SPLITS)
def test_training_equals_plain_torch(workers: Workers, name: str, stages: int, replicas: int, pieces: int) -> None:
    results = workers.run(stages * replicas, train, name, stages, replicas, pieces)
    ours, plain = results[0], train_plainly(name, replicas)
    assert ours["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert ours["eval"] == pytest.approx(plain["eval"], abs=1e-6)
    torch.testing.assert_close(ours["weights"], plain["weights"], atol=2e-6, rtol=1e-5)
    for other in results[1:]:
        assert (other["losses"], other["norms"], other["eval"]) == (ours["losses"], ours["norms"], ours["eval"])


def test_dropout_does_not_depend_on_the_pieces(workers: Workers) -> None:
    whole = workers.run(1, drop_out, 1, 1, 1)[0]
    for stages, replicas, pieces in ((2, 1, 2), (2, 2, 4)):
        cut = workers.run(stages * replicas, drop_out, stages, replicas, pieces)[0]
        assert cut["losses"] == pytest.approx(whole["losses"], abs=1e-6)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(cut["weights"][name], weight, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_a_failure_names_rank_piece_and_layers(workers: Workers, backward: bool) -> None:
    told = workers.run(2, reported_failure, backward)
    assert told[0] == "rank 0 (stage 0, piece 2, layers 4 to 5) failed: ValueError: enough"
    assert told[1].startswith("rank 1 (stage 1, piece ")


def test_the_times_of_a_step_have_the_names_of_deepspeeds_instructions(workers: Workers) -> None:
    for times, whole in workers.run(2, measured):
        names = {"ForwardPass", "BackwardPass", "RecvActivation", "RecvGrad", "SendActivation", "SendGrad"}
        assert names <= set(times)
        assert 0 < times["ForwardPass"] + times["BackwardPass"] < sum(times.values()) <= whole


@pytest.mark.parametrize(
    ("stages", "pieces", "message"),
    [(1, 2, r"virtual_stages=2 needs pipeline_stages of 2 or more"), (2, 0, r"must be at least 1, not 0")],
)
def test_what_cannot_be_interleaved_is_refused(stages: int, pieces: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PipeLiteStrategy(stages, virtual_stages=pieces)


class Named(nn.Module):
    """A piece that may have a submodule with the same name in all pieces, such as an embedding tied to the head."""

    def __init__(self, shared: bool, own: str) -> None:
        super().__init__()
        if shared:
            self.embedding = nn.Linear(2, 2)
        self.add_module(own, nn.BatchNorm1d(2))


def test_pieces_have_the_names_that_they_have_alone() -> None:
    pieces = [Named(True, "0"), Named(False, "3"), Named(True, "7")]
    alone: Callable[[str], set[str]] = lambda kind: {  # noqa: E731
        name for piece in pieces for name, _ in getattr(piece, f"named_{kind}")()
    }
    names = {kind: alone(kind) for kind in ("parameters", "buffers")}
    together = Pieces(pieces, [(0, 1), (3, 4), (7, 8)])
    parent = nn.Module()
    parent.stage = together
    for kind, expected in names.items():
        found = [name for name, _ in getattr(together, f"named_{kind}")()]
        assert sorted(found) == sorted(expected)
        assert sorted(name for name, _ in getattr(parent, f"named_{kind}")()) == sorted(f"stage.{n}" for n in expected)
    assert pieces[0].embedding.weight is pieces[2].embedding.weight
    assert len(list(together.parameters())) == len({id(p) for p in itertools.chain(*(x.parameters() for x in pieces))})
