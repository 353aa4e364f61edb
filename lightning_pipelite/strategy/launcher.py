"""Launches the other ranks of a node, and ends them all if one dies before the watchdog takes over."""

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

    It differs in how it handles a rank that dies. Lightning's observer kills the main process with SIGKILL, so no
    message gets out. Here, until the :class:`~lightning_pipelite.strategy.watchdog.Watchdog` is connected, a thread
    watches the children. When one dies, the thread ends all of them and this process, and reports which rank died. If
    the main process raises, it ends the children first, so that its own traceback comes last. A child also ends when
    its launcher dies.

    Args:
        cluster_environment: Provides this process's rank, and whether something else has launched the ranks.
        num_processes: The number of ranks on this node.
        num_nodes: The number of nodes.
        before_launch: Called in every process before any child is started, with the trainer and the launched function's
            arguments by name, which it may change. If it raises, there is nothing to clean up.
        after_launch: Called after the function has returned.
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
        self._relieved: threading.Event | None = None  # set when the watchdog takes over or the main thread raises

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Check the configuration, start the node's other ranks unless something else does, and call ``function``.

        Args:
            function: Called in every rank with ``args`` and ``kwargs``.
            *args: See ``function``.
            trainer: Passed to ``before_launch``.
            **kwargs: See ``function``.
        """
        bound = inspect.signature(function).bind(*args, **kwargs)
        self._before_launch(trainer, bound.arguments)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            self._relieved = threading.Event()  # only now, so that a Trainer that has not started can be copied
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
        """Stop watching the children, once the watchdog is connected."""
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
            if not relieved.wait(timeouts.STATUS):  # else the main thread, which raised first, reports
                leave(f"rank {rank} {describe_exit(code)} before training began")
