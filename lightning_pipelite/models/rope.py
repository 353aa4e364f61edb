"""Rotary embeddings whose frequencies depend on the sequence length: here, on that of each document separately.

transformers computes the frequencies of dynamic and long RoPE from the largest position that it is given, and leaves
them in the module. A short document packed with a long one, or a later micro-batch, would be rotated with frequencies
of tokens that it has nothing to do with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.models.attention.document_mask import starts
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in

# RoPE types of transformers (``modeling_rope_utils``) whose frequencies follow from the configuration alone. A type
# that is not listed, from a later version or a model's own code, is tried out: see ``long_documents.py``. What to watch
# for: ``dynamic_rope_update`` in ``modeling_rope_utils``, which decides what each forward recomputes.
STATIC = {"default", "linear", "yarn", "llama3", "proportional", "ntk_alpha"}


def is_static(model: PreTrainedModel) -> bool:
    """Return whether the rotary angles of a position are known not to depend on other positions."""
    if not type(model).__module__.startswith("transformers."):
        return False
    return all(kind in STATIC for module in model.modules() for kind in _types(module))


def follow_documents(model: nn.Module) -> None:
    """Rotate each document with the frequencies that it has alone, independently of earlier micro-batches."""
    for module in model.modules():
        if any(_follows(kind) for kind in _types(module)):
            mix_in(module, _RopeByDocument)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each token's document.

    Args:
        position_ids: Int64 [.., seq], restarting at 0 where a document starts.
    """
    rows = position_ids.flatten(0, -2)
    numbers = starts(rows).cumsum(dim=1) - 1
    lengths = torch.zeros_like(rows).scatter_reduce(1, numbers, rows + 1, "amax")
    return lengths.gather(1, numbers).view_as(position_ids)


def _types(module: nn.Module) -> list[str]:
    """Return a rotary embedding's RoPE types: one, or one for each type of layer; none for other modules."""
    if not any(name.endswith("inv_freq") for name in module._buffers):
        return []
    kinds = getattr(module, "rope_type", None)
    return [str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]) if kind is not None]


def _follows(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


class _RopeByDocument(Mixin):
    """Mixed into a rotary embedding: runs its code on documents of one length at a time, then restores its state."""

    mixin_place = MixinPlace.COMPUTATION
    rope_type: str | dict[str, str]
    config: Any
    original_max_seq_len: int

    @torch.compiler.disable  # the number of iterations depends on the lengths
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kinds = self.rope_type
        kind = kinds if isinstance(kinds, str) else kinds[layer_type]  # type: ignore[index]
        if not _follows(kind):
            return self._turn(x, position_ids, layer_type)
        lengths = document_lengths(position_ids)
        if kind == "longrope":
            parameters = self.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            is_long = lengths > parameters["original_max_position_embeddings"]
            short, long = (
                self._turn(x, torch.where(chosen, position_ids, 0), layer_type) for chosen in (~is_long, is_long)
            )
            return _choose(is_long, long, short)
        left = torch.where(lengths > self.original_max_seq_len, lengths, 0)
        turned = self._turn(x, torch.where(left > 0, 0, position_ids), layer_type)
        while longest := int(left.max()):
            chosen = left == longest
            alike = self._turn(x, torch.where(chosen, position_ids, 0), layer_type)
            turned, left = _choose(chosen, alike, turned), left.masked_fill(chosen, 0)
        return turned

    def _turn(self, x: Tensor, position_ids: Tensor, layer_type: str | None) -> Any:
        given = () if layer_type is None else (layer_type,)
        with _as_before(self):  # type: ignore[arg-type]
            return super().forward(x, position_ids, *given)  # type: ignore[misc]


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Restore all that a module holds on exit: attributes, buffers, and buffer values, which may change in place."""
    attributes, buffers = dict(vars(module)), dict(module._buffers)
    values = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
    try:
        yield
    finally:
        for held, before in ((vars(module), attributes), (module._buffers, buffers)):
            held.clear()
            held.update(before)
        for name, value in values.items():
            module.get_buffer(name).copy_(value)


def _choose(chosen: Tensor, one: Any, other: Any) -> Any:
    """Select ``one`` where ``chosen`` [.., seq], else ``other``: tensors [.., seq, size], or tuples of cos and sin."""
    if isinstance(one, Tensor):
        return torch.where(chosen[..., None], one, other)
    return type(one)(_choose(chosen, a, b) for a, b in zip(one, other, strict=True))
