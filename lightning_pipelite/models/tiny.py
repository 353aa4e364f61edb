"""Builds a tiny model of a class, to try out what the class does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lightning_pipelite.models.borrowed_kernels import lend_to_gpus_alone
from lightning_pipelite.models.small_sizes import ROPE, small_sizes
from lightning_pipelite.models.transformers_compat import no_init_weights

# Names that configurations give to the number of positions that a model is made for.
LIMITS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
NOISE = 0.1  # added to every weight: the initial values of norms, biases and gates would hide much


def build_tiny(
    config: PretrainedConfig,
    build: Callable[..., PreTrainedModel],
    known: PreTrainedModel | None = None,
    limit: int | None = None,
) -> PreTrainedModel:
    """Build a tiny model, with the weights of ``known`` if names and shapes agree, which takes half as long.

    Otherwise both are initialised with the same seed. With a ``limit``, it is made for documents of that many tokens.
    """
    # A device context slows down every operation, even for the device that is the default anyway.
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), on_cpu:
        if known is not None:
            torch.manual_seed(0)
            with no_init_weights():
                model = build(tiny_config(config, limit), dtype=torch.float32)
            model.tie_weights(recompute_mapping=False)  # as its initialisation does
            own, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, known))
            if {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}:
                for name, tensor in own.items():
                    tensor.data.copy_(theirs[name])
                return model
        torch.manual_seed(0)
        model = build(tiny_config(config, limit), dtype=torch.float32)
        lend_to_gpus_alone(model)  # before any of its code runs: models are tried before they are trained or planned
        for parameter in model.parameters():
            parameter.data += NOISE * torch.randn_like(parameter)
        return model


def tiny_config(config: PretrainedConfig, limit: int | None = None) -> PretrainedConfig:
    """Return a configuration with small sizes, but with the class, depth and kinds of layers of ``config``.

    Args:
        config: The real model's configuration.
        limit: How many positions the tiny model is made for; if not given, more than any trial has.

    Raises:
        Exception: Whatever the class raises if these sizes do not fit together.
    """
    values = config.to_dict()
    small = small_sizes(config)
    limits = {} if limit is None else {name: limit for name in LIMITS if type(values.get(name)) is int}
    for name in ROPE:
        if isinstance(values.get(name), dict):
            values[name] = _tiny_rope(values[name], values, {**values, **small}, limit)
    return type(config).from_dict({**values, **small, **limits})


def _tiny_rope(rope: dict[str, Any], real: dict[str, Any], tiny: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Shrink the parameters of rotary embeddings, including those for each type of layer."""
    made = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            made[name] = _tiny_rope(value, real, tiny, limit)
        elif name in ("long_factor", "short_factor"):  # one per rotated pair of the head's dimensions
            made[name] = value[: round(len(value) * _head_size(tiny) / _head_size(real))]
        elif name == "mrope_section" and value:  # how many of those pairs are for time, height and width
            made[name] = _tiny_parts(value, round(sum(value) * _head_size(tiny) / _head_size(real)))
        elif name in LIMITS and limit is not None:
            made[name] = limit
    return made


def _tiny_parts(parts: list[int], total: int) -> list[int]:
    """Return parts in about the same ratio whose sum is ``total``; equal ones stay equal where possible."""
    made = [max(1, part * total // sum(parts)) for part in parts]
    for part in sorted(set(parts), key=lambda part: -(part * total % sum(parts))):
        if parts.count(part) <= total - sum(made):
            made = [size + (each == part) for size, each in zip(made, parts, strict=True)]
    made[0] += total - sum(made)
    return made


def _head_size(values: dict[str, Any]) -> float:
    size: float = values.get("head_dim") or values["hidden_size"] / values["num_attention_heads"]
    return size
