"""What strategy, module, data and callbacks ask of each other; nothing else passes between them but Lightning's own.

Each protocol below is one question. What is optional is a protocol of its own, with what holds without it: who asks
sees by ``isinstance`` whether the other has an answer. So any LightningModule that hands out its layers trains under
PipeLiteStrategy, and the callbacks work under any strategy.

===================  ==================================================  =============================================
asks                 whom, for what                                      where
===================  ==================================================  =============================================
the strategy         the module, for its layers and loss                 :class:`HandsOutLayers`,
                                                                         :class:`PipelineLayers`
the strategy         layers and loss, for more (optional)                :class:`KnowsCosts`, :class:`MayBeWhole`,
                                                                         :class:`NamesSums`
the strategy         the module (optional)                               :class:`LogsEvaluation`, :class:`KnowsMetrics`,
                                                                         :class:`EvaluatesTogether`,
                                                                         :class:`IdentifiesItself`,
                                                                         :class:`AllowsAnother`
the strategy         callbacks (optional)                                :class:`KeepsResults`
the command line     callbacks (optional)                                :class:`MayOverwrite`
callbacks            the strategy (optional)                             :class:`TimesStages`
callbacks            the module                                          :class:`SavesTrained`, :class:`ChecksSaving`,
                                                                         :class:`WritesText`
the data module      the strategy (optional)                             :class:`DealsData`
the module           its data (optional)                                 :class:`ChecksVocabulary`
===================  ==================================================  =============================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Layers and loss

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, ...]"]
"""``loss(outputs, targets)`` of one micro-batch.

It returns either a scalar, the mean over the micro-batch (every micro-batch then weighs the same), or a pair
``(total, count)``: the sum of the losses and the number of terms in it (tokens, say). With the pair, what is trained
on is exactly the sum of all totals over the sum of all counts in the global batch. A loss may be a :class:`NamesSums`.
"""


@runtime_checkable
class NamesSums(Protocol):
    """A loss that returns after the pair ``(total, count)`` one more scalar for each of these names.

    The strategy logs ``train/NAME``, the sum of these scalars over the sum of all counts.
    """

    logged: tuple[str, ...]


def names_of_sums(loss: Loss) -> tuple[str, ...]:
    """Return what a loss wants logged besides itself; nothing, unless it is a :class:`NamesSums`."""
    return tuple(loss.logged) if isinstance(loss, NamesSums) else ()


@runtime_checkable
class PipelineLayers(Protocol):
    """Layers that are built a stage at a time, so that no process ever holds those of another stage."""

    names: Sequence[str]
    """The class name of each layer, in order; ``partition_method="type:REGEX"`` looks at these."""

    def parameter_counts(self) -> Sequence[int]:
        """Return the number of parameters of each layer, frozen ones too."""
        ...

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        """Build layers ``start`` to ``stop`` (exclusive) on ``device``, as one module from inputs to outputs.

        Its parameter names must not depend on the partition. A parameter that stands under one name in several
        stages is tied: its gradients are summed over them. With virtual stages it is called for each piece of a stage.
        """
        ...


@runtime_checkable
class MayBeWhole(Protocol):
    """Layers that cannot always be dealt out; others always can."""

    one_stage_only: str | None
    """Why they cannot, as what follows "because"; None if they can."""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer costs, so that stages can be balanced.

    Embedding and the like count in the first layer, head and loss in the last.

    Attributes:
        seconds: The time of a micro-batch, forward and backward; in any unit.
        held: Bytes that a layer takes at all times: weights, gradients, optimizer state.
        retained: Bytes that a layer keeps of each micro-batch in flight for its backward pass.
        micro_batches: Of a step.
        memory: Bytes of a device for all of a stage's layers, or of each stage's device; None for no limit.
        speeds: Of each stage's device, in any unit; empty if they are alike.
    """

    seconds: Sequence[float]
    held: Sequence[int]
    retained: Sequence[int]
    micro_batches: int
    memory: int | Sequence[int] | None = None
    speeds: Sequence[float] = ()

    def memory_of(self, stage: int) -> float:
        """Return the bytes of a stage's device, infinitely many if there is no limit."""
        if self.memory is None:
            return math.inf
        return self.memory if isinstance(self.memory, int) else self.memory[stage]

    def speed_of(self, stage: int) -> float:
        """Return how fast a stage's device is, 1 if they are alike."""
        return self.speeds[stage] if self.speeds else 1.0


@runtime_checkable
class KnowsCosts(Protocol):
    """Layers for ``partition_method="auto"``, which is refused without."""

    def layer_costs(self) -> LayerCosts | None:
        """Return what the layers cost, or None if that is not known."""
        ...


# What the strategy asks of a LightningModule


@runtime_checkable
class HandsOutLayers(Protocol):
    """A module that can be trained in stages; the one question that every module must answer."""

    def pipeline_layers(self) -> tuple[PipelineLayers | Sequence[nn.Module], Loss]:
        """Return the layers, of which each maps the former's output to its own, and the loss on the last one's."""
        ...


@runtime_checkable
class LogsEvaluation(Protocol):
    """A module that logs evaluations itself; else ``eval/loss`` (``test/loss``) is logged, the mean of each set."""

    def log_evaluation(self, total: float, count: float, dataloader_idx: int) -> None:
        """Log the sum of an evaluation set's losses and the number of terms in it; the same on every rank."""
        ...


@runtime_checkable
class EvaluatesTogether(Protocol):
    """A module that says how many micro-batches of an evaluation run through the pipeline at once."""

    @property
    def eval_micro_batches(self) -> int | None:
        """The number; None for four a stage, as without."""
        ...


@runtime_checkable
class KnowsMetrics(Protocol):
    """A module that knows all that is logged; without, a monitor that nothing logs is found out after an epoch."""

    def logs(self, name: str) -> bool:
        """Tell whether a metric of that name comes from the module, the strategy or this package's callbacks."""
        ...


@runtime_checkable
class IdentifiesItself(Protocol):
    """A module that resumes only from checkpoints of the same model; without, names and shapes must fit."""

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree in to be resumed from."""
        ...


@runtime_checkable
class AllowsAnother(Protocol):
    """A module that lets a part of its identity be another one; without, all must agree."""

    @property
    def checkpoint_may_differ(self) -> Mapping[str, tuple[bool, str]]:
        """What of that may be another one: whether it has been allowed, and by which option it is."""
        ...


# What is asked of callbacks, and what they ask


@runtime_checkable
class KeepsResults(Protocol):
    """A callback that replaces what it finds; without, nothing of it is looked for before the launch."""

    def former_result(self) -> str | None:
        """Say what a training that begins anew would replace, if anything."""
        ...


@runtime_checkable
class MayOverwrite(KeepsResults, Protocol):
    """A callback that ``pipelite fit --overwrite`` tells to replace what it finds."""

    overwrite: bool


@runtime_checkable
class TimesStages(Protocol):
    """A strategy of stages; under another one a rank counts as a stage, of which no times are known."""

    measure_stage_times: bool
    """Whether the next step is to be measured; a callback sets it."""

    @property
    def stage_id(self) -> int:
        """The stage of this rank."""
        ...

    @property
    def stage_times(self) -> tuple[float, float] | None:
        """Seconds that this rank computed and that it waited for others in the last step; None if not measured."""
        ...


@runtime_checkable
class SavesTrained(Protocol):
    """A module that writes what it has trained; SaveTrained needs one, TimedCheckpoint writes no more without."""

    def save_trained(self, directory: Path) -> None:
        """Write it, in the place of what is there. Collective."""
        ...


@runtime_checkable
class ChecksSaving(Protocol):
    """A module that tells before training what :class:`SavesTrained` would refuse after it."""

    def check_save(self, directory: Path) -> None:
        """Refuse a directory that could not be written."""
        ...


@runtime_checkable
class WritesText(Protocol):
    """A module that writes on from a prompt while it is trained; Samples needs one."""

    def write_text(self, prompt: str, max_new_tokens: int) -> str:
        """Return what follows the prompt. Collective."""
        ...


# Data


@runtime_checkable
class DealsData(Protocol):
    """A strategy whose ranks read different data, as all of Lightning's for several processes; else there is one."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` of a sampler."""
        ...


@runtime_checkable
class ChecksVocabulary(Protocol):
    """Data that knows its tokens; of other data each batch is looked at."""

    def check_vocabulary(self, rows: int) -> None:
        """Refuse tokens that an embedding of so many rows does not have."""
        ...
