"""Micro-batches of a causal LM, converted to the single form that the stages take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.attention.document_mask import starts

IGNORED = -100
_WANTED = (
    "pass int64 tensors input_ids and labels of shape (batch, sequence), and position_ids that restart at every "
    "document; or batches of transformers' collators for causal LMs"
)
_KNOWN = {"input_ids", "labels", "position_ids", "attention_mask", "token_type_ids", "control_classes"}
# From transformers' DataCollatorWithFlattening: redundant with position_ids.
_SAID_BY_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True)
class BatchForm:
    """Completes batches, and refuses those that training would misinterpret.

    Args:
        embeddings: Rows of the embedding.
        outputs: Rows of the head.
        keys: Further tensors that the adapter needs.
        counts_padding: Whether padding would count in a loss, as it does in that of routers.
    """

    embeddings: int
    outputs: int
    keys: tuple[str, ...] = ()
    counts_padding: bool = False

    def complete(self, batch: Any) -> dict[str, Tensor]:
        """Return the batch with ``position_ids``, and with ``labels`` that hold the next token.

        In batches of transformers' collators, ``labels[t]`` is the token ``input_ids[t]`` itself, and the model shifts.
        Labels that fit only one of the two conventions are read by that one; if both fit, or neither, a batch with
        ``position_ids`` is taken to be in our form.

        Args:
            batch: A mapping; it is not changed.

        Raises:
            ConfigurationError: Something is missing, has no use, or is not a token of the model.
        """
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= {*batch}:
            has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigurationError(f"PipeLiteModule cannot train on batches of {has}: {_WANTED}.")
        known = _KNOWN | {*self.keys} | (_SAID_BY_POSITIONS if "position_ids" in batch else set())
        if unknown := sorted(map(str, {*batch} - known)):
            raise ConfigurationError(
                f"PipeLiteModule does not support {unknown[0]} in batches: leave it out, or {_WANTED}."
            )
        ids = _matrix(batch, "input_ids", None)
        labels = _matrix(batch, "labels", ids.shape)
        if "token_type_ids" in batch and _matrix(batch, "token_type_ids", ids.shape).any():
            raise ConfigurationError(
                "PipeLiteModule does not support token_type_ids other than 0 in batches: leave them out."
            )
        self._check_tokens(ids, labels)
        if _are_of_the_token(ids, labels, ours="position_ids" in batch):
            if self.keys:
                raise ConfigurationError(
                    f"labels of a batch with {self.keys[0]} must hold the next token, not the token itself: {_WANTED}."
                )
            labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)
        if "position_ids" in batch:
            positions = _matrix(batch, "position_ids", ids.shape)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        if "attention_mask" in batch:
            self._check_padding(_matrix(batch, "attention_mask", ids.shape), labels, positions)
        rest = {key: batch[key] for key in self.keys if key in batch}
        return {"input_ids": ids, "labels": labels, "position_ids": positions, **rest}

    def _check_tokens(self, ids: Tensor, labels: Tensor) -> None:
        low, high = (int(each) for each in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= self.embeddings:
            raise ConfigurationError(
                f"a batch has the token {low if low < 0 else high}, but the model's embedding has only "
                f"{self.embeddings} rows, for tokens 0 to {self.embeddings - 1}: use the model's own tokenizer, or add "
                "rows to the model."
            )
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.outputs))]
        if wrong.numel():
            raise ConfigurationError(
                f"a batch has the label {int(wrong[0])}, but the model's head has only {self.outputs} rows, for "
                f"tokens 0 to {self.outputs - 1}; where there is nothing to learn, set the label to {IGNORED}."
            )

    def _check_padding(self, mask: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Accept padding only after a row's tokens: it changes nothing, as no token attends to later ones."""
        if ((mask != 0) & (mask != 1)).any():
            raise ConfigurationError(
                "attention_mask of a batch has values other than 0 and 1: separate documents by position_ids."
            )
        if bool(mask.all()):
            return
        if (mask.diff(dim=1) > 0).any():
            raise ConfigurationError(
                "attention_mask of a batch has a 0 before a 1: pad on the right only (padding_side of the tokenizer)."
            )
        if self.counts_padding:
            raise ConfigurationError(
                "a batch has padding, which would count in the loss of the model's routers: make all sequences "
                "equally long, or set model.router_aux_loss_coef to 0."
            )
        # Labels of padding, in our form (the next token) or in the other (the token itself).
        to_learn = labels != IGNORED
        if (to_learn[:, :-1] & (mask[:, 1:] == 0)).any() or (to_learn & (mask == 0)).any():
            raise ConfigurationError(f"a batch has labels for padding: set them to {IGNORED}.")


def _matrix(batch: Mapping[str, Any], key: str, shape: torch.Size | None) -> Tensor:
    value = batch[key]
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dim() == 2
    if not whole or (shape is not None and value.shape != shape):
        has = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            has = f"{str(value.dtype)[6:]} of shape {tuple(value.shape)}"
        raise ConfigurationError(f"{key} of a batch is {has}: {_WANTED}.")
    return value.long()


def _are_of_the_token(ids: Tensor, labels: Tensor, *, ours: bool) -> bool:
    nothing = labels == IGNORED
    of_the_token = bool(((labels == ids) | nothing).all())
    of_the_next = bool(((labels[:, :-1] == ids[:, 1:]) | nothing[:, :-1]).all())
    return of_the_token if of_the_token != of_the_next else not ours


def count_documents(position_ids: Tensor) -> int:
    """Count the documents in the rows of a batch."""
    return int(starts(position_ids).sum())
