"""Validation and test through the pipeline."""

from __future__ import annotations

import math
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.protocol import EvaluatesTogether, LogsEvaluation, Loss
from lightning_pipelite.strategy.checks import check_loaders, checked_pair
from lightning_pipelite.strategy.pipeline import Pipeline


class PipelineEvaluation:
    """Collects the micro-batches of an evaluation set, runs several at a time, and logs their mean loss.

    Args:
        pipeline: The pipeline that runs them.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._trainer, self._engine = pipeline, pipeline.trainer, pipeline.engine
        self._batches: list[Any] = []
        self._sums: Tensor | None = None
        self._seen, self._loader = 0, 0

    def take(self, micro_batch: tuple[Any, Any], indices: tuple[int, ...]) -> None:
        """Take one more micro-batch; after the last one of its set, log the loss.

        Args:
            micro_batch: ``(inputs, targets)``.
            indices: The indices that Lightning passes to the module's own validation_step: only those that it accepts.

        Raises:
            ConfigurationError: If the previous set ended unnoticed, because its data loader has no length.
        """
        self._pipeline.loose_parts.follow()
        trainer = self._trainer
        testing = trainer.state.fn == TrainerFn.TESTING
        loop = trainer.test_loop if testing else trainer.validate_loop
        if trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop.epoch_loop.val_loop
        loader = indices[-1] if loop._is_sequential and loop.num_dataloaders > 1 else 0
        first = loop.batch_progress.current.ready == 1
        if first or loader != self._loader:
            if not first and (self._batches or self._sums is not None):
                raise ConfigurationError(
                    f"data loader {self._loader} of the evaluation has no length, so its end cannot be detected; give "
                    f"it a __len__, or set limit_{'test' if testing else 'val'}_batches to a number."
                )
            check_loaders(loop._combined_loader, trainer.lightning_module)
            self._batches, self._sums, self._seen, self._loader = [], None, 0, loader
        self._batches.append(micro_batch)
        self._seen += 1
        limit = loop.max_batches[loader] if loop._is_sequential else math.inf
        last = loop.batch_progress.is_last_batch or self._seen == limit
        if not last and len(self._batches) < self._at_once:
            return
        place = f"data loader {loader} of the evaluation"
        self._pipeline.agree(f"{place}, up to micro-batch {self._seen} of {limit}", self._batches)
        sums = self._engine.evaluate_on(self._batches)
        self._batches = []
        self._sums = sums if self._sums is None else self._sums + sums
        if last:
            total, count, *_ = self._engine.share_evaluation(self._sums, place)
            self._sums = None
            self._warn_of_repeats(loop, loader)
            self._log(total, count, loader)

    def by(self, loss: Loss, micro_batch: Any, place: str) -> tuple[float, float]:
        """Run a single micro-batch with another loss; nothing is logged. Collective.

        Args:
            loss: Called on the last stage with its outputs and the targets; returns a sum and a count.
            micro_batch: ``(inputs, targets)``, on the device; the same on all ranks.
            place: A description of where this is.

        Returns:
            The sum and the count over all replicas, the same on every rank.
        """
        self._pipeline.loose_parts.follow()
        micro_batches = [checked_pair(micro_batch)]
        self._pipeline.agree(place, micro_batches)
        total, count, *_ = self._engine.share_evaluation(self._engine.evaluate_on(micro_batches, loss), place)
        return total, count

    @property
    def _at_once(self) -> int:
        """How many micro-batches run through the pipeline together."""
        module = self._trainer.lightning_module
        chosen = module.eval_micro_batches if isinstance(module, EvaluatesTogether) else None
        return 4 * self._pipeline.topology.stages if chosen is None else chosen

    @property
    def _kind(self) -> str:
        return "test" if self._trainer.state.fn == TrainerFn.TESTING else "eval"

    def _log(self, total: float, count: float, loader: int) -> None:
        module = self._trainer.lightning_module
        if isinstance(module, LogsEvaluation):
            module.log_evaluation(total, count, loader)
            return
        loss = total / count if count else math.nan
        module.log(f"{self._kind}/loss", loss, batch_size=1, sync_dist=True, prog_bar=True)

    def _warn_of_repeats(self, loop: Any, loader: int) -> None:
        """Warn about samples that Lightning's distributed sampler repeats so that all processes get equally many."""
        sampler: Any = getattr(loop._combined_loader.flattened[loader], "sampler", None)
        if type(sampler) not in (DistributedSampler, DistributedSamplerWrapper):  # perhaps a user's own class
            return
        repeats = sampler.total_size - len(sampler.dataset)
        if repeats > 0 and loop.max_batches[loader] == len(loop._combined_loader.flattened[loader]):
            rank_zero_warn(
                f"{self._kind}/loss counts {repeats} of {len(sampler.dataset)} samples twice, because they cannot be "
                f"divided evenly among {self._pipeline.topology.replicas} replicas; PackedDataModule's sampler repeats "
                "none."
            )
