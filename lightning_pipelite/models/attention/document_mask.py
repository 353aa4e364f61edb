"""Keeps packed documents apart in every attention mask that transformers builds during a stage's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_pipelite.models.attention.document_batches import DocumentBatches
from lightning_pipelite.models.transformers_compat import mask_documents


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch are.

    Attributes:
        numbers: Which document of its row each token is in, int64 [batch, seq].
        bounds: Where documents begin in all rows on end, then the end, as often as there is room: int32.
    """

    numbers: Tensor
    bounds: Tensor

    @cached_property
    def batches(self) -> DocumentBatches:
        """The documents as rows of their own."""
        return DocumentBatches.of(self.bounds, (self.numbers.shape[0], self.numbers.shape[1]))


class _Current:
    """What the stage runs on. Not a ContextVar: the backward pass, in its own thread, would not see it."""

    documents: Documents | None = None


def find_documents(position_ids: Tensor, most: int | None = None) -> Documents | None:
    """Find where positions start again; None if each row is one document, as far as that is known.

    Args:
        position_ids: Int64 [batch, seq], starting again where a document starts.
        most: An upper bound of the number of documents in all rows, which spares a GPU that waits for the host; None
            if it is not known.
    """
    begins = starts(position_ids)
    count = begins.sum()
    if most is None:
        most = room = int(count)
    else:  # in steps, as the layers are compiled for each
        room = max(16, 1 << (most - 1).bit_length())
        # They would be seen as one, in silence.
        torch._assert_async(count <= most, "more documents in a micro-batch than were counted before")
    if most <= position_ids.shape[0]:
        return None
    bounds = torch.nonzero_static(begins.flatten(), size=room + 1, fill_value=begins.numel()).flatten().int()
    return Documents(begins.cumsum(dim=1) - 1, bounds)


def starts(position_ids: Tensor) -> Tensor:
    """Return where documents start, bool [batch, seq]."""
    return position_ids.diff(dim=1, prepend=position_ids[:, :1] - 2) != 1


@contextmanager
def document_mask(position_ids: Tensor | None, most: int | None = None) -> Iterator[None]:
    """Let no token see another document in the masks that are built in this context.

    Whatever the model hands to transformers' mask builders.

    Args:
        position_ids: Int64 [batch, seq], starting again where a document starts; None changes nothing.
        most: See :func:`find_documents`.
    """
    mask_documents(_numbers)
    with _set(None if position_ids is None else find_documents(position_ids, most)):
        yield


def documents_when_recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Let a layer that is recomputed in the backward pass see the documents that it saw before.

    A ``context_fn`` of ``torch.utils.checkpoint``: without it the recomputation would see no documents, or those of
    another micro-batch.
    """
    return nullcontext(), _set(_Current.documents)


@contextmanager
def _set(documents: Documents | None) -> Iterator[None]:
    before, _Current.documents = _Current.documents, documents
    try:
        yield
    finally:
        _Current.documents = before


def each_row_a_document() -> AbstractContextManager[None]:
    """Take each row for one document within this context, even inside :func:`document_mask`."""
    return _set(None)


def current_documents() -> Documents | None:
    """Return the documents inside :func:`document_mask`; None if each row is one."""
    return _Current.documents


def _numbers() -> Tensor | None:
    return None if _Current.documents is None else _Current.documents.numbers
