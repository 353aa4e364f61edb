"""Mixins join a module's class in a fixed order, only once, and show in its name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_pipelite.adapters import ControlAdapter
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in, own_class, take_out
from lightning_pipelite.strategy.layer_rng import LayerRNG
from tiny_models import CPU, POSITIONS, write_model


class Memory(Mixin):
    mixin_place = MixinPlace.MEMORY

    def __call__(self, x: Any) -> Any:
        return super().__call__(2 * x)  # type: ignore[misc]


class _RNG(Mixin):
    mixin_place = MixinPlace.RNG

    def __call__(self, x: Any) -> Any:
        return super().__call__(x + 1)  # type: ignore[misc]


class Double(nn.Identity):
    """A module with a class of its own."""


def test_what_is_further_out_is_called_first_and_the_name_tells_it() -> None:
    module = mix_in(mix_in(Double(), Memory), _RNG)
    assert module(torch.tensor(3)) == 8
    assert type(module).__name__ == "Double[Memory, RNG]"
    assert repr(module) == "Double[Memory, RNG]()"
    assert isinstance(module, Double)
    assert own_class(module) is Double
    with pytest.raises(AttributeError, match=r"'Double\[Memory, RNG\]' object has no attribute 'weight'"):
        module.weight  # noqa: B018
    assert type(mix_in(mix_in(Double(), Memory), _RNG)) is type(module)  # one class for torch.compile


def test_a_copy_has_the_same_parts() -> None:
    module = mix_in(Double(), Memory)
    again = copy.deepcopy(module)
    assert type(again) is type(module)
    assert again(torch.tensor(3)) == 6


def test_a_part_twice_or_in_a_wrong_order_is_an_error() -> None:
    module = mix_in(Double(), Memory)
    with pytest.raises(TypeError, match=r"Memory is already mixed into this Double\[Memory\]"):
        mix_in(module, Memory)
    mix_in(module, _RNG)
    with pytest.raises(TypeError, match=r"Memory is already mixed into this Double\[Memory, RNG\]"):
        mix_in(module, Memory)
    with pytest.raises(TypeError, match="Memory must be mixed in before _RNG: see MixinPlace"):
        mix_in(mix_in(Double(), _RNG), Memory)
    assert type(module).__name__ == "Double[Memory, RNG]"


def test_a_part_is_taken_out_from_wherever_it_stands() -> None:
    module = mix_in(mix_in(Double(), Memory), _RNG)
    take_out(module, Memory)
    assert type(module).__name__ == "Double[RNG]"
    take_out(module, Memory)
    take_out(module, _RNG)
    assert type(module) is Double
    mix_in(module, Memory)
    module.__class__ = type("Foreign", (type(module),), {})
    take_out(module, Memory)
    assert type(module).__name__ == "Foreign"


def test_the_parts_of_a_decoder_layer(tmp_path: Path) -> None:
    class Strategy:
        def broadcast(self, state: Any) -> Any:
            return state

    layers = CausalLMLayers(write_model(tmp_path, "llama"), dtype=torch.float32, adapter=ControlAdapter(2))
    stage = layers.build_stage(2, 4, CPU)
    decoder = stage.causal_lm.model.layers
    rng = LayerRNG(Strategy(), CPU, stage)  # type: ignore[arg-type]
    assert type(decoder[2]).__name__ == "LlamaDecoderLayer[MemoryPolicy, Controlled, StageEntry, OwnRNG]"
    assert type(decoder[2]) is type(decoder[3])
    assert "LlamaDecoderLayer[MemoryPolicy, Controlled, StageEntry, OwnRNG](" in repr(stage)
    order = [place.name for place in MixinPlace]
    assert order == ["QUANTISATION", "COMPUTATION", "RECORD", "MEMORY", "CONTROL", "STAGE_ENTRY", "RNG"]
    copied = copy.deepcopy(decoder[2])
    rng.release()
    assert type(copied) is type(decoder[2])
    assert type(decoder[2]).__name__ == "LlamaDecoderLayer[MemoryPolicy, Controlled, StageEntry]"
    hidden = torch.zeros(*POSITIONS.shape, layers.meta_model.config.hidden_size)
    assert stage((hidden, POSITIONS, torch.ones_like(POSITIONS))).shape[:2] == POSITIONS.shape
