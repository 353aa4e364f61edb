"""Planned memory of stages, against stages that run on the CPU."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.planning.meter import BLOCK
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import WORKSPACE, stage_memory
from lightning_pipelite.planning.watched_stage import held_tensors
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.partition import spans_of
from lightning_pipelite.strategy.pieces import Pieces
from lightning_pipelite.strategy.timeline import simulate
from planned_layers import LENGTH, make_adam, make_layers

CPU = torch.device("cpu")
ROUNDING = 64 * BLOCK  # a few dozen tensors, each rounded up to whole blocks of the CUDA allocator
MICRO_BATCHES = 4


def train_on_cpu(layers: CausalLMLayers, start: int, stop: int, micro_batches: int) -> tuple[int, int]:
    """Train a real stage; return the bytes of its weights and its peak memory, as reported by torch's allocator."""
    stage = layers.build_stage(start, stop, CPU)
    size = layers.meta_model.config.hidden_size
    weights = sum({t.untyped_storage().data_ptr(): t.nbytes for t in (*stage.parameters(), *stage.buffers())}.values())
    gc.collect()  # so that no reference cycles of earlier tests are freed while the profiler runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(micro_batches):
            positions = torch.arange(LENGTH)[None]
            extra = [torch.ones_like(positions) for _ in layers.adapter.batch_keys]
            first: Tensor = torch.zeros_like(positions)
            if start:
                first = torch.randn(1, LENGTH, size, requires_grad=True)
            outputs = stage((first, positions, *extra))
            if stop == len(layers):
                outputs = CausalLMLoss()(outputs, torch.zeros_like(positions))[:1]
            root = outputs[0]
            gradient = None if root.ndim == 0 else torch.ones_like(root)
            del outputs, first, positions, extra
            root.backward(gradient)
            del root, gradient
        stage.zero_grad()
    return weights, weights + most_allocated(profiler)


def most_allocated(profiler: profile) -> int:
    """Return the most bytes that were allocated at once while the profiler ran.

    This goes by the profiler's totals, because its timestamps may be out of order on the cores of a virtual machine.
    Everything must be freed while the profiler runs: otherwise, the profiler would mistake memory that the next test
    frees at the same address for it.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    allocated = [event["args"] for event in events if event.get("name") == "[memory]"]
    assert sum(event["Bytes"] for event in allocated) == 0
    first = min(allocated, key=lambda event: event["Ev Idx"])
    return max(each["Total Allocated"] for each in allocated) - (first["Total Allocated"] - first["Bytes"])


def train_pieces_on_cpu(layers: CausalLMLayers, spans: list[tuple[int, int]], stage: int, stages: int) -> int:
    """Train the pieces of a stage in the order of the schedule; return the peak memory in bytes."""
    pieces = Pieces([layers.build_stage(*span, CPU) for span in spans], spans)
    size = layers.meta_model.config.hidden_size
    held: dict[tuple[int, int], Any] = {}
    weights = sum({t.untyped_storage().data_ptr(): t.nbytes for t in held_tensors(pieces)}.values())
    gc.collect()  # so that no reference cycles of earlier tests are freed while the profiler runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for action in interleaved_1f1b(stages, len(spans), MICRO_BATCHES).orders[stage]:
            place, (start, stop) = (action.piece, action.micro_batch), spans[action.piece // stages]
            if action.backward:
                gradient = torch.ones(1, LENGTH, size) if action.piece < stages * len(spans) - 1 else None
                torch.autograd.backward([held.pop(place)], [gradient])
                del gradient
                continue
            positions = torch.arange(LENGTH)[None]
            first = torch.randn(1, LENGTH, size, requires_grad=True) if start else torch.zeros_like(positions)
            outputs = pieces[action.piece // stages]((first, positions))
            if stop == len(layers):
                held[place] = CausalLMLoss()(outputs, torch.zeros_like(positions))[0]
            else:
                held[place] = torch.autograd.graph.get_gradient_edge(outputs[0])
            del outputs, first, positions
        pieces.zero_grad()
    return weights + most_allocated(profiler)


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("stage", [0, 1])
def test_pieces_take_what_is_planned(model_dir: Path, policy: str, stage: int) -> None:
    layers = make_layers(model_dir, LoRA(4))
    spans = spans_of([0, 1, 2, 4, 5], 2, stage)
    planned = stage_memory(
        Simulation(layers, CausalLMLoss(), make_adam), spans,
        stage=stage, stages=2, micro_batches=MICRO_BATCHES, policy=policy, sequence_len=LENGTH,
    )  # fmt: skip
    layers.activation_memory = policy  # type: ignore[assignment]
    peak = train_pieces_on_cpu(layers, spans, stage, 2)
    # Of what is received, only the gradient of the current pass is held here. The plan counts the gradients of all
    # weights from the start, although some pieces have not run backward yet.
    taken = planned.peak - planned.optimizer - planned.exchange + planned.hidden - WORKSPACE
    assert 0.99 * peak <= taken <= 1.05 * peak
    step = simulate(interleaved_1f1b(2, 2, MICRO_BATCHES), [1.0] * 4, [2.0] * 4)
    assert planned.in_flight == step.in_flight[stage]


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("adapter", [LoRA(4), Full(), ControlAdapter(4)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bounds", [(0, 5), (0, 2), (1, 4), (3, 5)])
def test_a_stage_takes_what_is_planned(model_dir: Path, adapter: Adapter, policy: str, bounds: tuple[int, int]) -> None:
    layers = make_layers(model_dir, adapter)
    planned = stage_memory(
        Simulation(layers, CausalLMLoss(), make_adam), [bounds],
        stage=0, stages=1, micro_batches=2, policy=policy, sequence_len=LENGTH,
    )  # fmt: skip
    layers.activation_memory = policy  # type: ignore[assignment]
    weights, peak = train_on_cpu(layers, *bounds, 2)
    assert planned.weights == pytest.approx(weights, abs=ROUNDING)
    assert planned.peak - planned.optimizer - planned.exchange - WORKSPACE == pytest.approx(peak, rel=0.03)


def test_more_micro_batches_in_flight_take_as_much_more_as_is_retained(model_dir: Path) -> None:
    simulation = Simulation(make_layers(model_dir, LoRA(4)), CausalLMLoss(), make_adam)
    one, two = (
        stage_memory(simulation, [(0, 2)], stage=0, stages=stages, micro_batches=8, policy="keep", sequence_len=LENGTH)
        for stages in (1, 2)
    )
    assert (one.in_flight, two.in_flight) == (1, 2)
    assert two.activations == 2 * one.activations
    assert two.peak - one.peak == pytest.approx(one.activations, rel=0.05)
