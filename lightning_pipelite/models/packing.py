"""Keeps packed documents apart in every attention mask that transformers builds during a stage's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)

_documents: ContextVar[Tensor | None] = ContextVar("documents", default=None)


@contextmanager
def documents_apart(position_ids: Tensor | None) -> Iterator[None]:
    """Let no token see another document in the masks that are built in this context.

    Models hand the positions to transformers' mask builders, or forget to: gpt-oss and others then attend across
    documents without a word. Here the positions reach the masks whatever the model does.

    Args:
        position_ids: int64 [batch, seq], starting again where a document starts; None changes nothing.
    """
    with _set(None if position_ids is None else find_packed_sequence_indices(position_ids)):
        yield


def documents_when_recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a layer that is recomputed in the backward pass see the documents that it saw before.

    A ``context_fn`` of ``torch.utils.checkpoint``: without it the recomputation would see no documents, or those of
    another micro-batch.
    """
    return nullcontext(), _set(_documents.get())


@contextmanager
def _set(documents: Tensor | None) -> Iterator[None]:
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)


def current_documents() -> Tensor | None:
    """Return which document each token is in, int64 [batch, seq], inside :func:`documents_apart`; None if in one."""
    return _documents.get()


def _document_mask(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mask builder that is ``build`` outside of :func:`documents_apart`."""

    def build_apart(*args: Any, **kwargs: Any) -> Any:
        documents = _documents.get()
        lengths = {kwargs.get("q_length"), kwargs.get("kv_length")}
        if documents is None or lengths != {documents.shape[1]}:
            return build(*args, **kwargs)
        kwargs["mask_function"] = and_masks(
            kwargs.get("mask_function", causal_mask_function), packed_sequence_mask_function(documents)
        )
        kwargs["allow_is_causal_skip"] = False
        return build(*args, **kwargs)

    return build_apart


for _implementation in ("sdpa", "eager"):
    AttentionMaskInterface.register(_implementation, _document_mask(ALL_MASK_ATTENTION_FUNCTIONS[_implementation]))
