"""What is passed between stages when layers take more inputs than hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_families
from given_layers import write_given
from lightning_pipelite.adapters import Full
from lightning_pipelite.cli.split_comparison import compare_split, exact_layers
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.handover import Handover, LeaveStage
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.planning.simulation import Simulation
from tiny_models import CPU

LENGTH = 12


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> CausalLMLayers:
    """Gemma 4 with per-layer inputs, where the last layer uses the keys and values of the second."""
    directory = tmp_path_factory.mktemp("gemma4")
    tiny_families.write(tiny_families.tiny("gemma4_text"), directory)
    return CausalLMLayers(directory, dtype=torch.float32, adapter=Full())


def test_inputs_of_later_layers_travel(layers: CausalLMLayers) -> None:
    meta_model = layers.meta_model
    assert meta_model.groups == [0, 1, 4]
    assert all(len(places) == 1 for places in meta_model.start_inputs)
    first, last = layers.build_stage(0, 1, CPU), layers.build_stage(1, 2, CPU)
    tokens, positions = torch.arange(3, 3 + LENGTH)[None], torch.arange(LENGTH)[None]
    handed_on, _ = first((tokens, positions))
    config = meta_model.config
    assert handed_on.shape == (LENGTH * (config.hidden_size + 3 * config.hidden_size_per_layer_input),)
    like = last.received_like(positions)
    assert (like.shape, like.dtype) == (handed_on.shape, handed_on.dtype)
    logits = last((handed_on, positions))
    moved = handed_on.detach().clone()
    moved[-1] += 1  # part of the last layer's input
    assert not torch.equal(last((moved, positions)), logits)
    logits.sum().backward()
    embedding = first.causal_lm.get_submodule("model.embed_tokens_per_layer").weight
    assert embedding.grad[3 : 3 + LENGTH].ne(0).any(dim=0).reshape(4, -1).any(dim=1).all()  # in each layer's part


def test_what_is_planned_to_travel_travels(layers: CausalLMLayers) -> None:
    simulation = Simulation(layers, CausalLMLoss(), lambda trained: torch.optim.SGD(trained, lr=0.1))
    handed_on, positions = layers.build_stage(0, 1, CPU)((torch.zeros(1, LENGTH, dtype=torch.int64),) * 2)
    assert simulation.trial(0, "keep", LENGTH).hidden == handed_on.nbytes + positions.nbytes
    assert simulation.trial(1, "keep", LENGTH).item.parameters > 0


def depart(handover: Handover, number: int, first: bool, *args: Tensor) -> Tensor:
    with pytest.raises(LeaveStage) as left:
        handover.depart(number, first, (args, {}))
    return left.value.handed_on


def test_what_several_layers_are_given_travels_once() -> None:
    sender, receiver = Handover([[1], [1], [1]]), Handover([[1], [1], [1]])
    hidden, given, other = torch.rand(2, 3), torch.rand(4), torch.rand(5)
    sender.begin(None)
    sender.depart(1, True, ((hidden, given), {}))
    packed = depart(sender, 2, False, torch.zeros(0), given)
    assert packed.shape == (10,)
    receiver.begin(packed)
    made = torch.zeros(4)
    (a, b), _ = receiver.arrive(1, ((torch.zeros(2, 3), made), {}), entry=True)
    (_, c), _ = receiver.arrive(2, ((a, made), {}), entry=False)
    assert torch.equal(a, hidden)
    assert torch.equal(b, given)
    assert c is b
    assert receiver.end() == 10
    sender.begin(None)
    sender.depart(1, True, ((hidden, given), {}))
    assert depart(sender, 2, False, torch.zeros(0), other).shape == (15,)


def test_values_keep_their_types() -> None:
    sender, receiver = Handover([[], ["given"]]), Handover([[], ["given"]])
    hidden, given = torch.rand(3).bfloat16(), torch.rand(2)
    sender.begin(None)
    with pytest.raises(LeaveStage) as left:
        sender.depart(1, True, ((hidden,), {"given": given}))
    receiver.begin(left.value.handed_on)
    made = {"given": torch.zeros(2)}
    (a,), kwargs = receiver.arrive(1, ((torch.zeros(3).bfloat16(),), made), entry=True)
    assert a.dtype == torch.bfloat16
    assert torch.equal(a, hidden)
    assert torch.equal(kwargs["given"], given)


def test_what_layers_are_given_may_be_the_first_hidden_states(tmp_path: Path) -> None:
    whole = write_given(tmp_path)
    layers = exact_layers(tmp_path, packed=False, trust_remote_code=True)
    assert layers.meta_model.start_inputs == [[], [], ["given"], ["given"]]
    assert compare_split(layers, whole, [2, 3, 4], train=True) == []


@pytest.mark.parametrize("given", ["embedding", "positions"])
def test_layers_that_pass_on_what_they_are_given_stay_together(tmp_path: Path, given: str) -> None:
    whole = write_given(tmp_path, returns_given=given)
    layers = exact_layers(tmp_path, packed=False, trust_remote_code=True)
    assert layers.meta_model.groups == [0, 4]
    assert compare_split(layers, whole, [1], train=True) == []


def test_values_that_no_layer_is_given_are_an_error() -> None:
    receiver = Handover([[], [1]])
    receiver.begin(torch.rand(11))
    receiver.arrive(1, ((torch.zeros(6), torch.zeros(4)), {}), entry=True)
    with pytest.raises(RuntimeError, match="10 of the 11 values"):
        receiver.check_all_taken()
