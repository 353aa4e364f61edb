"""What strategy, module, data and callbacks ask of each other, besides Lightning's own interfaces.

Each protocol below is one question. Whatever is optional is a separate protocol, which says what applies without it;
the caller checks by ``isinstance`` whether the other side implements it. So any LightningModule that provides its
layers trains under PipeLiteStrategy, and the callbacks work under any strategy.

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

It returns either a scalar, the mean over the micro-batch (all micro-batches then have the same weight), or a pair
``(total, count)``: the sum of the losses and the number of terms in it (tokens, for example). With the pair, the
training loss is exactly the sum of all totals over the sum of all counts in the global batch. A loss may be a
:class:`NamesSums`.
"""


@runtime_checkable
class NamesSums(Protocol):
    """A loss that returns, after the pair ``(total, count)``, one more scalar for each of these names.

    The strategy logs ``train/NAME``, the sum of these scalars over the sum of all counts.
    """

    logged: tuple[str, ...]


def names_of_sums(loss: Loss) -> tuple[str, ...]:
    """Return the names of what is logged besides the loss; none, unless it is a :class:`NamesSums`."""
    return tuple(loss.logged) if isinstance(loss, NamesSums) else ()


@runtime_checkable
class PipelineLayers(Protocol):
    """Layers that are built a stage at a time, so that no process ever holds those of another stage."""

    names: Sequence[str]
    """The class name of each layer, in order; ``partition_method="type:REGEX"`` searches these."""

    def parameter_counts(self) -> Sequence[int]:
        """Return the number of parameters of each layer, including frozen ones."""
        ...

    def build_stage(self, start: int, stop: int, device: torch.device) -> nn.Module:
        """Build layers ``start`` to ``stop`` (exclusive) on ``device``, as one module from inputs to outputs.

        Its parameter names must not depend on the partition. A parameter that has the same name in several stages is
        tied: its gradients are summed over them. With virtual stages this is called for each piece of a stage.
        """
        ...


@runtime_checkable
class MayBeWhole(Protocol):
    """Layers that cannot always be split into stages; others always can."""

    one_stage_only: str | None
    """Why they cannot, worded to follow "because"; None if they can."""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer costs, for balancing stages.

    Embedding and the like count towards the first layer, head and loss towards the last.

    Attributes:
        seconds: The time of a micro-batch, forward and backward; in any unit.
        held: Bytes that a layer takes at all times: weights, gradients, optimizer state.
        retained: Bytes that a layer keeps of each micro-batch in flight for its backward pass.
        micro_batches: Their number per step.
        memory: Bytes that a device has for all of a stage's layers, or those of each stage's device; None for no limit.
        speeds: Speed of each stage's device, in any unit; empty if all are alike.
    """

    seconds: Sequence[float]
    held: Sequence[int]
    retained: Sequence[int]
    micro_batches: int
    memory: int | Sequence[int] | None = None
    speeds: Sequence[float] = ()

    def memory_of(self, stage: int) -> float:
        """Return the memory of a stage's device in bytes; infinity if there is no limit."""
        if self.memory is None:
            return math.inf
        return self.memory if isinstance(self.memory, int) else self.memory[stage]

    def speed_of(self, stage: int) -> float:
        """Return the speed of a stage's device; 1 if all are alike."""
        return self.speeds[stage] if self.speeds else 1.0


@runtime_checkable
class KnowsCosts(Protocol):
    """Layers that support ``partition_method="auto"``, which is refused for others."""

    def layer_costs(self) -> LayerCosts | None:
        """Return what the layers cost, or None if that is unknown."""
        ...


# What the strategy asks of a LightningModule


@runtime_checkable
class HandsOutLayers(Protocol):
    """A module that can be trained in stages; the only protocol that every module must implement."""

    def pipeline_layers(self) -> tuple[PipelineLayers | Sequence[nn.Module], Loss]:
        """Return the layers, each mapping the previous one's output to its own, and the loss on the last one's."""
        ...


@runtime_checkable
class LogsEvaluation(Protocol):
    """A module that logs evaluations itself; else ``eval/loss`` (``test/loss``) is logged, the mean of each set."""

    def log_evaluation(self, total: float, count: float, dataloader_idx: int) -> None:
        """Log the sum of an evaluation set's losses and the number of terms in it; the same on every rank."""
        ...


@runtime_checkable
class EvaluatesTogether(Protocol):
    """A module that sets how many micro-batches of an evaluation run through the pipeline at once."""

    @property
    def eval_micro_batches(self) -> int | None:
        """The number; None for the default, four per stage."""
        ...


@runtime_checkable
class KnowsMetrics(Protocol):
    """A module that knows all logged metrics; otherwise a monitor that nothing logs is noticed only after an epoch."""

    def logs(self, name: str) -> bool:
        """Tell whether a metric of that name comes from the module, the strategy or this package's callbacks."""
        ...


@runtime_checkable
class IdentifiesItself(Protocol):
    """A module that resumes only from checkpoints of the same model; otherwise names and shapes must match."""

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what a checkpoint must match to be resumed from."""
        ...


@runtime_checkable
class AllowsAnother(Protocol):
    """A module that allows parts of its identity to differ; otherwise all must match."""

    @property
    def checkpoint_may_differ(self) -> Mapping[str, tuple[bool, str]]:
        """The parts of the identity that may differ: whether that has been allowed, and by which option it is."""
        ...


# What is asked of callbacks, and what they ask


@runtime_checkable
class KeepsResults(Protocol):
    """A callback that replaces what it finds; for others, nothing is checked before the launch."""

    def former_result(self) -> str | None:
        """Return what a training that starts from scratch would replace, in words, if anything."""
        ...


@runtime_checkable
class MayOverwrite(KeepsResults, Protocol):
    """A callback that ``pipelite fit --overwrite`` tells to replace what it finds."""

    overwrite: bool


@runtime_checkable
class TimesStages(Protocol):
    """A strategy with stages; under others, each rank counts as a stage whose times are unknown."""

    measure_stage_times: bool
    """Whether the next step is to be measured; set by a callback."""

    @property
    def stage_id(self) -> int:
        """The stage of this rank."""
        ...

    @property
    def stage_times(self) -> tuple[float, float] | None:
        """Seconds that this rank computed, and waited for others, in the last step; None if not measured."""
        ...


@runtime_checkable
class SavesTrained(Protocol):
    """A module that writes what it has trained; required by SaveTrained, used by TimedCheckpoint if there is one."""

    def save_trained(self, directory: Path) -> None:
        """Write what was trained, replacing what is there. Collective."""
        ...


@runtime_checkable
class ChecksSaving(Protocol):
    """A module that refuses before training what :class:`SavesTrained` would refuse after it."""

    def check_save(self, directory: Path) -> None:
        """Refuse a directory that cannot be written."""
        ...


@runtime_checkable
class WritesText(Protocol):
    """A module that continues a prompt during training; required by Samples."""

    def write_text(self, prompt: str, max_new_tokens: int) -> str:
        """Return what follows the prompt. Collective."""
        ...


# Data


@runtime_checkable
class DealsData(Protocol):
    """A strategy whose ranks read different data, as Lightning's for several processes do; others read all of it."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` for a sampler."""
        ...


@runtime_checkable
class ChecksVocabulary(Protocol):
    """Data that knows its tokens; of other data, each batch is checked."""

    def check_vocabulary(self, rows: int) -> None:
        """Refuse tokens that an embedding with this many rows does not have."""
        ...
