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
    """The positions of the documents in a micro-batch.

    Attributes:
        numbers: The number of each token's document within its row, int64 [batch, seq].
        bounds: Start of each document in the flattened rows, padded with the total number of tokens: int32 [room + 1].
    """

    numbers: Tensor
    bounds: Tensor

    @cached_property
    def batches(self) -> DocumentBatches:
        """The documents as separate rows."""
        return DocumentBatches.of(self.bounds, (self.numbers.shape[0], self.numbers.shape[1]))


class _Current:
    """The documents of the running stage. Not a ContextVar: the backward pass, in its own thread, would not see it."""

    documents: Documents | None = None


def find_documents(position_ids: Tensor, most: int | None = None) -> Documents | None:
    """Find the documents by where positions restart; None if each row is known to be one document.

    Args:
        position_ids: Int64 [batch, seq], restarting where a document starts.
        most: An upper bound of the number of documents in all rows, which avoids a host synchronisation; None if
            unknown.
    """
    begins = starts(position_ids)
    count = begins.sum()
    if most is None:
        most = room = int(count)
    else:  # in steps, as layers are compiled for each size
        room = max(16, 1 << (most - 1).bit_length())
        # Otherwise bounds of surplus documents could be dropped silently.
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
    """Hide other documents from each token in the attention masks that are built in this context.

    This holds whatever the model passes to transformers' mask builders.

    Args:
        position_ids: Int64 [batch, seq], restarting where a document starts; with None, each row is one document.
        most: See :func:`find_documents`.
    """
    mask_documents(_numbers)
    with _set(None if position_ids is None else find_documents(position_ids, most)):
        yield


def documents_when_recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the recomputation of a layer in the backward pass use the documents of its forward pass.

    This is a ``context_fn`` of ``torch.utils.checkpoint``. Without it the recomputation would see no documents, or
    those of another micro-batch.
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
    """Treat each row as one document within this context, even inside :func:`document_mask`."""
    return _set(None)


def current_documents() -> Documents | None:
    """Return the documents given to :func:`document_mask`; None if each row is one document."""
    return _Current.documents


def _numbers() -> Tensor | None:
    return None if _Current.documents is None else _Current.documents.numbers
