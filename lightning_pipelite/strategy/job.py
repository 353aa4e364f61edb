"""The job as seen by each of its processes: how others are started, how all are watched, and what is cleaned up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment

from lightning_pipelite.shared.protocol import Loss, PipelineLayers
from lightning_pipelite.strategy.before_launch import check_launch
from lightning_pipelite.strategy.empty_logs import EmptyLogs
from lightning_pipelite.strategy.launcher import PipeLiteLauncher
from lightning_pipelite.strategy.watchdog import Watchdog


class Job:
    """Launches, watches and ends the job; removes the log directories of a run that ended before it logged anything.

    Args:
        environment: Knows this process's rank, and whether something else has launched the ranks.
        num_processes: The number of ranks on this node.
        num_nodes: The number of nodes.
        cutter: Called when the job is about to begin; returns what cuts layers into stages, or into pieces of stages.

    Attributes:
        launcher: The launcher for the strategy.
    """

    def __init__(
        self,
        environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        cutter: Callable[[], Callable[[PipelineLayers], list[int]]],
    ) -> None:
        self._environment, self._cutter = environment, cutter
        self.launcher = PipeLiteLauncher(
            environment,
            num_processes,
            num_nodes,
            before_launch=self._before_launch,
            after_launch=self._remove_empty_logs,  # by then the loggers have been finalized
        )
        self._handed: tuple[PipelineLayers, Loss] | None = None
        self._empty_logs: EmptyLogs | None = None
        self._watchdog: Watchdog | None = None

    def _before_launch(self, trainer: pl.Trainer | None, arguments: dict[str, Any]) -> None:
        assert trainer is not None
        self._handed, self._empty_logs = check_launch(
            trainer, arguments, cut=self._cutter(), starts_the_job=self._environment.global_rank() == 0
        )

    def take_layers(self) -> tuple[PipelineLayers, Loss] | None:
        """Return, once, the layers and the loss that the module handed out before the launch, or None."""
        handed, self._handed = self._handed, None
        return handed

    def watch(self, stage: int, timeout: timedelta) -> None:
        """Start the watchdog, which takes over from the launcher. Collective.

        Args:
            stage: This rank's stage, for messages.
            timeout: How long a rank may work on one activity before it counts as hung.

        Raises:
            ConfigurationError: If a rank cannot reach rank 0.
        """
        environment = self._environment
        self._watchdog = Watchdog.connect(
            rank=environment.global_rank(),
            world_size=environment.world_size(),
            local_rank=environment.local_rank(),
            stage=stage,
            host=environment.main_address,
            children=self.launcher.procs,
            timeout=timeout,
            last_act=self._remove_empty_logs,
        )
        self.launcher.stop_watching()

    def progress(self, activity: str, waits: bool, piece: str = "") -> None:
        """Report what this rank does next, whether it may wait for others, and for which piece of its stage."""
        if self._watchdog is not None:
            self._watchdog.progress(activity, waits=waits, piece=piece)

    def keep_logs(self) -> None:
        """Note that the run has got far enough for its log directories to be kept."""
        self._empty_logs = None

    def fail(self, exception: BaseException) -> None:
        """End the job because of what this rank has raised."""
        if self._watchdog is not None:
            self._watchdog.fail(exception)

    def give_up_logs(self) -> None:
        """Remove empty log directories at the end of an interrupted run; the launcher sees the end of other runs."""
        if self._empty_logs is not None and self._empty_logs.trainer.state.status == "interrupted":
            self._remove_empty_logs()

    def leave(self) -> None:
        """Stop the watchdog; if the job has failed, this process ends here."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _remove_empty_logs(self) -> None:
        if self._empty_logs is not None:
            self._empty_logs.remove()
