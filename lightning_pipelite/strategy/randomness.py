"""Random numbers: the same for the data on every rank, others for the layers of every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.strategies import Strategy
from torch import Tensor


class LayerRandomness:
    """Generators of this rank's own for what its layers draw, such as dropout masks.

    The first stage takes the inputs of a micro-batch and the last one the targets, each from its own data loader. So
    shuffles and augmentations must draw the same numbers on all ranks, whatever the layers draw in between, while
    dropout masks must not repeat from stage to stage or from replica to replica.

    Building it gives rank 0's global generators (torch's, numpy's, Python's) to all ranks. Collective.

    Args:
        strategy: shares rank 0's generators.
        rank: of this process.
        device: where the layers are.
    """

    def __init__(self, strategy: Strategy, rank: int, device: torch.device) -> None:
        _set_rng_states(strategy.broadcast(_collect_rng_states(include_cuda=False)))
        self._on_gpu = device if device.type == "cuda" else None
        if self._on_gpu:
            torch.cuda.manual_seed(torch.initial_seed())
        shared = self._states()
        torch.manual_seed((torch.initial_seed() + 1 + rank) % 2**63)
        self._own = self._states()
        self._set(shared)

    @contextlib.contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Within it torch draws from this rank's own generators, and leaves the global ones as they were."""
        shared = self._states()
        self._set(self._own)
        try:
            yield
        finally:
            self._own = self._states()
            self._set(shared)

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self._on_gpu)] if self._on_gpu else [])]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._on_gpu:
            torch.cuda.set_rng_state(states[1], self._on_gpu)
