"""Warnings of combinations of model and data that may be intended, but mostly are not."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PretrainedConfig

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.data import PackedDataModule


def warn_of_data(data: Any, config: PretrainedConfig, adapter: Adapter) -> None:
    """Warn of sequences that are longer than the model was made for, and of what cannot be learnt from the data.

    Args:
        data: Anything but a PackedDataModule is ignored.
        config: The model's configuration.
        adapter: What is trained.
    """
    if not isinstance(data, PackedDataModule):
        return
    length, positions = data.sequence_len, most_positions(config)
    if positions is not None and length > positions:
        rank_zero_warn(
            f"data.sequence_len is {length}, but according to its config.json the model was made for {positions:g} "
            "positions: longer documents would train positions that it does not know; if the data has such documents, "
            "set a shorter data.sequence_len."
        )
    classes = data.control_classes
    if "control_classes" in adapter.batch_keys and len(classes) == 1:
        rank_zero_warn(
            f"all training documents have the control_class {min(classes)}: a Control Adapter learns the "
            "difference between two classes; provide datasets of both, with control_class 1 and -1."
        )
    if adapter.trained_tokens and (absent := sorted(data.without(adapter.trained_tokens))):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        rank_zero_warn(
            f"trainable_token_indices has the token {absent[0]} ({data.tokenizer().decode(absent[:1])!r}){more}, which "
            "the training set does not contain: the rows of such tokens stay unchanged in the embedding; add texts "
            "that contain them, or check how the tokenizer splits yours (pipelite preview)."
        )


def most_positions(config: PretrainedConfig) -> float | None:
    """Return how many positions a model was made for, including any RoPE scaling; None for no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    stretched = [positions]
    for each in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        original, factor = each.get("original_max_position_embeddings"), each.get("factor")
        if factor:
            stretched.append((original or positions) * factor)
    return max(stretched)


def embedded_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a model has embeddings for; None if they are rotary, or if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and not getattr(config, "rope_parameters", None) else None
