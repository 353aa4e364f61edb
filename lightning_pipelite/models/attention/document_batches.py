"""Packed documents as separate rows, for layers whose code does not handle packing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentBatches:
    """Batches of documents of similar length, padded on the right to the longest document of each batch.

    The padding repeats the document's last token: a real token, so nothing becomes infinite, and in a causal layer no
    other token sees it. A batch has at most twice the tokens of its documents.

    Attributes:
        places: For each batch, the index of the token in each place, in the flattened rows: int64 [documents, longest].
        back: The place of each token in the flattened, concatenated batches: int64 [batch * seq].
        shape: Of the packed rows: batch, seq.
    """

    places: list[Tensor]
    back: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, bounds: Tensor, shape: tuple[int, int]) -> DocumentBatches:
        """Group the documents that begin at ``bounds``; its last value, repeated as padding, is the end.

        Reading the bounds synchronises the host, once per micro-batch.
        """
        by_length: dict[int, list[range]] = {}
        for first, after in pairwise(bounds.tolist()):
            if after > first:
                by_length.setdefault((after - first - 1).bit_length(), []).append(range(first, after))
        places, back, used = [], torch.empty(shape[0] * shape[1], dtype=torch.int64), 0
        for documents in by_length.values():
            begins = torch.tensor([document.start for document in documents])[:, None]
            lengths = torch.tensor([len(document) for document in documents])[:, None]
            within = torch.arange(int(lengths.max()))
            place = begins + torch.minimum(within, lengths - 1)
            real = within < lengths
            back[place[real]] = used + torch.arange(place.numel()).view_as(place)[real]
            used += place.numel()
            places.append(place.to(bounds.device))
        return cls(places, back.to(bounds.device), shape)

    def deal(self, value: Any, place: Tensor) -> Any:
        """Return a layer's argument for one batch; per-token tensors and masks are indexed, also inside containers.

        Raises:
            NotImplementedError: A tensor has a token dimension in an unknown position.
        """
        if isinstance(value, (list, tuple)):
            return type(value)(self.deal(each, place) for each in value)
        if isinstance(value, dict):
            return {name: self.deal(each, place) for name, each in value.items()}
        if not isinstance(value, Tensor) or self.shape[1] not in value.shape:
            return value
        rows, seq = self.shape
        if value.ndim == 4 and value.shape[1] == 1 and value.shape[2:] == (seq, seq):
            return self._deal_mask(value.expand(rows, -1, -1, -1), place)
        if value.ndim >= 2 and value.shape[1] == seq and value.shape[0] in (1, rows):
            flat = value.expand(rows, *value.shape[1:]).flatten(0, 1)
            return flat.index_select(0, place.flatten()).view(*place.shape, *value.shape[2:])
        raise NotImplementedError(f"a layer's argument of shape {list(value.shape)} cannot be split into documents")

    def _deal_mask(self, mask: Tensor, place: Tensor) -> Tensor:
        seq = self.shape[1]
        row, token = place[:, :1, None] // seq, place % seq
        dealt = mask[row, 0, token[:, :, None], token[:, None, :]]
        later = torch.ones(place.shape[1], place.shape[1], dtype=torch.bool, device=place.device).triu(1)
        return dealt.masked_fill(later, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)[:, None]

    def gather(self, outputs: list[Any]) -> Any:
        """Merge a layer's outputs for all batches, as if it had been called once.

        Further outputs that are not per token, such as a state for a cache, become None.

        Raises:
            NotImplementedError: The output is not a tensor with one value or vector per token.
        """
        if isinstance(outputs[0], tuple):
            first, *others = (list(each) for each in zip(*outputs, strict=True))
            return (self.gather(first), *(self.gather(each) if self._by_token(each) else None for each in others))
        if not self._by_token(outputs):
            raise NotImplementedError("a layer's output is not per token")
        flat = torch.cat([output.flatten(0, 1) for output in outputs])
        return flat.index_select(0, self.back).view(*self.shape, *outputs[0].shape[2:])

    def _by_token(self, outputs: list[Any]) -> bool:
        return all(
            isinstance(output, Tensor) and output.shape[:2] == place.shape
            for output, place in zip(outputs, self.places, strict=True)
        )
