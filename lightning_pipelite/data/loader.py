"""A data loader that tracks how much of the epoch has been trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_pipelite.data.sampler import PackedSampler
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.loop_counts import recount


class PackedLoader(DataLoader[dict[str, Tensor]]):
    """Loads a replica's micro-batches, one sequence each, and resumes where training stopped.

    The position is the number of sequences in the epoch's order that all replicas together have trained on. It counts
    neither prefetched micro-batches nor those of an incomplete step, and is valid for any number of stages, replicas
    and micro-batches per step.

    Args:
        dataset: The sequences.
        sampler: Determines which of them are this replica's.
        fingerprint: Identifies the training set.
        trainer: The trainer whose fit loop counts the epoch's micro-batches; None if the loader is used on its own.
        **options: Further arguments of torch's `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Tensor]],
        sampler: PackedSampler,
        *,
        fingerprint: str,
        trainer: pl.Trainer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_size=1, sampler=sampler, **options)
        self._packed = sampler
        self._data: dict[str, int | str] = {"fingerprint": fingerprint, "sequences": sampler.sequences}
        self._data["seed"] = sampler.seed
        self._trainer = trainer
        self._epoch = sampler.epoch
        self._start = 0  # sequences of the epoch that were seen before this iteration
        self._given = 0  # micro-batches that this replica has yielded since
        self._begin = 0  # the fit loop's micro-batch count when the iteration began
        self._resume_epoch: int | None = None

    @override
    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator, because Lightning creates the iterator before it sets the sampler's epoch.
        sampler = self._packed
        if sampler.epoch != self._resume_epoch:
            self._start = 0
        self._resume_epoch = None  # only once, because the epoch may be run again
        self._epoch, self._given, sampler.start = sampler.epoch, 0, self._start
        if self._trainer is not None:
            self._begin = self._progress.ready
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Return the epoch, how many of its sequences have been trained on, and what identifies the data."""
        seen = min(self._start + self._trained() * self._packed.num_replicas, self._packed.sequences)
        return {"epoch": self._epoch, "sequences_seen": seen, **self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position, once, the next time its epoch is iterated.

        Args:
            state: A result of `state_dict`, possibly with a different number of replicas or micro-batches per step.

        Raises:
            ConfigurationError: If it belongs to other data.
        """
        for key, ours in self._data.items():
            if state.get(key) != ours:
                raise ConfigurationError(
                    f"ckpt_path: the checkpoint was made with different training data ({key} {state.get(key)}, now "
                    f"{ours}): use the datasets and data options that it was made with."
                )
        self._epoch = self._resume_epoch = state["epoch"]
        self._start, self._given = state["sequences_seen"], 0
        if self._trainer is not None:
            # Lightning counts the micro-batches of one replica, and the number of replicas may have changed. The count
            # has to end with the epoch, so it is derived from what is left.
            self._begin = len(self) - self._packed.rounds_left(self._start)
            recount(vars(self._progress), self._begin)

    @property
    def _progress(self) -> Any:
        """The fit loop's counters of the epoch's micro-batches."""
        assert self._trainer is not None
        return self._trainer.fit_loop.epoch_loop.batch_progress.current

    def _trained(self) -> int:
        """Return the number of micro-batches in this iteration whose optimizer step is done."""
        if self._trainer is None:
            return self._given
        # `ready`, not `processed`: the strategy also asks during a step's last micro-batch, once the step is done.
        ready = self._progress.ready
        waits = self._trainer.fit_loop._should_accumulate()  # the last step of an epoch may be a short one
        return max(0, ready - (ready % self._trainer.accumulate_grad_batches if waits else 0) - self._begin)
