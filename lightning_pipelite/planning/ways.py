"""What would make training fit if it does not, with figures."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from lightning_pipelite.adapters import LoRA
from lightning_pipelite.adapters.lora_targets import lora_targets
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.planning.devices import Devices
from lightning_pipelite.planning.planner import STEP, Planner, Recommended
from lightning_pipelite.planning.settings import gib
from lightning_pipelite.shared.wording import counted

MOST = 64  # the most devices to try
OFFLOAD, DOUBLE_QUANT = "model.offload_optimizer: true", "model.bnb_4bit_use_double_quant: true"
ATTENTION = ("attn", "attention")  # in the names of modules


def ways_to_fit(planner: Planner, sequences: int) -> list[str]:
    """Return changes that are each enough: lighter weights, a LoRA on attention, shorter sequences, more devices etc.

    Only changes that suit the model and the adapter and are not already made, and only if they were planned and fit.

    Args:
        planner: A planner with which nothing fits.
        sequences: Sequences per step.
    """
    ways, most = [], _fewest(planner, sequences)
    fits: set[str] = set()
    for name, variant in _variants(planner):
        if fits & {*name.split(" and ")}:
            continue  # one of the two is enough
        other = variant.of(sequences * planner.stage_counts(sequences)[-1] // planner.devices.count)
        if found := other.recommend(sequences):
            fits.add(name)
            each = other.of(found.micro_batches).stages(found.bounds, found.policy, None, found.virtual_stages)
            ways.append(
                f"{name}: {gib(max(stage.total for stage in each))} per device, in {found.stages} "
                f"stage{'s' * (found.stages > 1)} with activation_memory {found.policy}"
            )
        elif (count := _fewest(other, sequences)) and (most is None or count < most):
            ways.append(f"{name}, and {counted(count, 'device')}")
    ways += [*_fewer_in_flight(planner, sequences), *_shorter(planner, sequences)]
    if most is not None:
        ways.append(f"{counted(most, 'device')}, in {counted(most, 'stage')}")
    return ways


def _variants(planner: Planner) -> Iterator[tuple[str, Planner]]:
    offloads = planner.with_offloaded_optimizer()
    if offloads is not None:
        yield OFFLOAD, offloads
    for name, layers in _other_layers(planner.layers):
        yield name, planner.with_layers(layers)
        if name == DOUBLE_QUANT and offloads is not None:
            yield f"{OFFLOAD} and {DOUBLE_QUANT}", offloads.with_layers(layers)


def _other_layers(layers: CausalLMLayers) -> Iterator[tuple[str, CausalLMLayers]]:
    if layers.load_in_4bit and not layers.double_quant and layers.meta_model.stored is None:
        smaller = _changed(layers)
        smaller.double_quant = True
        yield DOUBLE_QUANT, smaller
    if layers.fp8_transpose_cache:
        yield "model.fp8_transpose_cache: false", _with_transpose_cache(layers, False)
    for name in layers.lighter_weights:
        lighter = _with_transpose_cache(layers, False)
        lighter.load_in_4bit, lighter.load_in_fp8 = name == "load_in_4bit", name == "load_in_fp8"
        instead = [other for other in ("load_in_fp8", "fp8_transpose_cache") if getattr(layers, other)]
        if _goes(lighter):
            yield " and ".join([f"model.{name}: true", *(f"model.{other}: false" for other in instead)]), lighter
    if names := attention_targets(layers):
        narrower = _changed(layers)
        narrower.adapter = copy.copy(layers.adapter)
        narrower.adapter.target_modules = names  # type: ignore[attr-defined]
        if _goes(narrower):
            yield f"the adapter's target_modules: [{', '.join(names)}] (attention only)", narrower


def attention_targets(layers: CausalLMLayers) -> list[str]:
    """Return the names of a LoRA's targets in attention; empty if it has no others, or others share these names."""
    adapter, meta_model = layers.adapter, layers.meta_model
    if not isinstance(adapter, LoRA):
        return []
    linear, fused = lora_targets(meta_model, adapter.target_modules, adapter.layers_to_transform)
    inside = [name for name in linear if any(word in part for part in name.split(".") for word in ATTENTION)]
    names = sorted({name.rpartition(".")[2] for name in inside})
    others = {name.rpartition(".")[2] for name in {*linear, *fused} - {*inside}}
    return names if others and not others & set(names) else []


def other_transpose_cache(planner: Planner, found: Recommended, sequences: int) -> str:
    """Return a sentence if a step would be faster with, or without, transposed copies of weights in FP8, else nothing.

    Args:
        planner: The planner.
        found: What it recommends.
        sequences: Sequences per step.
    """
    cached = planner.layers.fp8_transpose_cache
    if not planner.layers.load_in_fp8 or planner.gpu.fp8 is None:  # nothing would be kept
        return ""
    other = planner.with_layers(_with_transpose_cache(planner.layers, not cached))
    best = other.recommend(sequences)
    if best is None or best.seconds > 0.999 * found.seconds:  # a smaller gain could not be measured
        return ""
    what = "without a second copy" if cached else "with a second, transposed copy"
    return (
        f"{1 - best.seconds / found.seconds:.1%} faster {what} of the weights in FP8, with activation_memory "
        f"{best.policy}: --model.fp8_transpose_cache {str(not cached).lower()}."
    )


def _with_transpose_cache(layers: CausalLMLayers, kept: bool) -> CausalLMLayers:
    other = _changed(layers)
    other.fp8_transpose_cache = kept
    return other


def _changed(layers: CausalLMLayers) -> CausalLMLayers:
    other = copy.copy(layers)
    vars(other).pop("lighter_weights", None)  # cached for the original
    return other


def _goes(layers: CausalLMLayers) -> bool:
    try:
        layers.adapter.check(layers.meta_model, load_in_4bit=layers.load_in_4bit)
    except ConfigurationError:
        return False
    return True


def _most_stages(planner: Planner, sequences: int) -> tuple[Planner, int]:
    stages = planner.stage_counts(sequences)[-1]
    return planner.of(sequences * stages // planner.devices.count), stages


def _fewer_in_flight(planner: Planner, sequences: int) -> Iterator[str]:
    """Suggest the most micro-batches per step that fit, fewer than there are stages, so that fewer are in flight."""
    full, stages = _most_stages(planner, sequences)
    for count in range(min(stages, full.micro_batches) - 1, 0, -1):
        if policy := full.of(count).choose_policy(stages, "auto"):
            yield (
                f"trainer.accumulate_grad_batches: {count} in {counted(stages, 'stage')}, so that fewer micro-batches "
                f"are in flight (activation_memory {policy}; stages idle more)"
            )
            return


def _shorter(planner: Planner, sequences: int) -> Iterator[str]:
    """Suggest the longest sequence that fits."""
    full, stages = _most_stages(planner, sequences)
    policy = full.policies[-1]
    length = full.largest_sequence(full.split(stages, "auto", policy), policy)
    if STEP <= length < full.sequence_len:
        yield (f"data.sequence_len: {length}, in {stages} stage{'s' * (stages > 1)} with activation_memory {policy}")


def _fewest(planner: Planner, sequences: int) -> int | None:
    """Return how many devices like the smallest, more than there are now, would do, one stage each; None if none."""
    most, more = min(MOST, len(planner.layers)), planner.devices.count + 1
    for count in (*range(more, min(most, 12) + 1), *range(max(16, more), most + 1, 8)):
        devices = Devices.alike(count, planner.memory)
        if planner.of(sequences).on(devices).choose_policy(count, "auto"):
            return count
    return None
