"""The pieces of a model on one rank, where each rank has several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from typing_extensions import override


class Pieces(nn.ModuleList):
    """Pieces of one model in order; parameters, buffers and modules keep the names that they have in each piece.

    Those names do not depend on the partition. A parameter that occurs in several pieces under one name is tied, as
    across stages: all of them get the first piece's.

    Args:
        pieces: The pieces, as returned by ``PipelineLayers.build_stage``.
        spans: The first layer of each piece and the one after its last.
    """

    def __init__(self, pieces: Sequence[nn.Module], spans: Sequence[tuple[int, int]]) -> None:
        super().__init__(pieces)
        self.spans = tuple(spans)
        first: dict[str, nn.Parameter] = {}
        for piece in pieces:
            for name, parameter in list(piece.named_parameters(remove_duplicate=False)):
                if first.setdefault(name, parameter) is not parameter:
                    owner, _, own = name.rpartition(".")
                    piece.get_submodule(owner)._parameters[own] = first[name]

    @override
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield modules under the pieces' own names, which name parameters and buffers, in a parent too."""
        memo = set() if memo is None else memo
        if self not in memo:
            memo.add(self)
            yield prefix, self
        for piece in self:
            yield from piece.named_modules(memo, prefix, remove_duplicate)


def in_words(span: tuple[int, int]) -> str:
    """Describe a span of layers, for example ``layers 0 to 3``."""
    start, stop = span
    return f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
