"""Starts the other ranks of a node and sees to it that no rank is left over before the watchdog takes over."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_pipelite.strategy.watchdog import timeouts
from lightning_pipelite.strategy.watchdog.failure import is_communication_error
from lightning_pipelite.strategy.watchdog.parent_death import LAUNCHER_PID
from lightning_pipelite.strategy.watchdog.processes import describe_exit, end_processes, leave


class PipeLiteLauncher(_SubprocessScriptLauncher):
    """Launches the script once for each further device of the node, as Lightning's own launcher does.

    It differs in what happens when a rank dies. Lightning's observer kills the main process with SIGKILL, and with it
    every message. Here, until the :class:`~lightning_pipelite.strategy.watchdog.Watchdog` is connected, a thread
    watches the children, and when one dies ends them all and says which; if the main process raises it ends the
    children and its own traceback comes last; a child whose launcher dies ends with it.

    Args:
        cluster_environment: Says which rank this process has, and whether something else has launched the ranks.
        num_processes: The number of ranks on this node.
        num_nodes: The number of nodes.
        before_launch: Called with the trainer and the arguments of the launched function by name, which it may change,
            in every process, before any child is started: what it raises needs no clean-up.
        after_launch: Called when the function has returned.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        before_launch: Callable[[pl.Trainer | None, dict[str, Any]], None],
        after_launch: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._before_launch, self._after_launch = before_launch, after_launch
        self._watcher: threading.Thread | None = None
        self._relieved: threading.Event | None = None  # set if the watchdog holds, or the main thread has raised

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Check the configuration, start the other ranks of this node unless something else does, call ``function``.

        Args:
            function: Called in every rank with ``args`` and ``kwargs``.
            *args: See ``function``.
            trainer: Handed to ``before_launch``.
            **kwargs: See ``function``.
        """
        bound = inspect.signature(function).bind(*args, **kwargs)
        self._before_launch(trainer, bound.arguments)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            self._relieved = threading.Event()  # not before: a Trainer that has not started yet can be copied
            self._watcher = threading.Thread(
                target=self._watch, args=(self._relieved,), name="pipelite-launcher", daemon=True
            )
            self._watcher.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            result = function(*bound.args, **bound.kwargs)
        except BaseException as exception:
            watcher, relieved = self._watcher, self._relieved
            if watcher is not None and relieved is not None and watcher.is_alive() and not relieved.is_set():
                if is_communication_error(exception):
                    watcher.join(timeouts.CAUSE)  # if a child has died, this process ends here
                relieved.set()
                end_processes(self.procs, timeouts.STATUS)
            raise
        self._after_launch()
        return result

    def stop_watching(self) -> None:
        """Hand the watch over, once the watchdog is connected."""
        if self._relieved is not None:
            self._relieved.set()
        self._watcher = self._relieved = None

    @override
    def _call_children_scripts(self) -> None:
        os.environ[LAUNCHER_PID] = str(os.getpid())  # read by guard_against_parent_death
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[LAUNCHER_PID]

    def _watch(self, relieved: threading.Event) -> None:
        while not relieved.wait(timeouts.TICK):
            for local_rank, child in enumerate(self.procs, start=1):
                code = child.poll()
                if code is not None:
                    self._end(local_rank, code, relieved)
                    return

    def _end(self, local_rank: int, code: int, relieved: threading.Event) -> None:
        rank = self.cluster_environment.node_rank() * self.num_processes + local_rank
        try:
            end_processes(self.procs, timeouts.STATUS)
        finally:
            if not relieved.wait(timeouts.STATUS):  # else the main thread speaks: it may have raised the same
                leave(f"rank {rank} {describe_exit(code)}, before the training began")
