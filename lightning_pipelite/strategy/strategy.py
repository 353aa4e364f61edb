"""The Lightning strategy that runs a LightningModule's layers as a pipeline."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.shared.local_path import refuse_remote
from lightning_pipelite.shared.protocol import PipelineLayers
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy import lightning_compat
from lightning_pipelite.strategy.checks import check_loaders, check_trainable, checked_pair
from lightning_pipelite.strategy.collect import collect_stages
from lightning_pipelite.strategy.deepspeed_compat import load_deepspeed
from lightning_pipelite.strategy.device_speeds import check_speeds, speeds_of_stages
from lightning_pipelite.strategy.evaluation import PipelineEvaluation
from lightning_pipelite.strategy.job import Job
from lightning_pipelite.strategy.known_callbacks import check_callbacks
from lightning_pipelite.strategy.option_ranges import check_timeout, check_virtual_stages
from lightning_pipelite.strategy.partition import partition
from lightning_pipelite.strategy.precision import PipelinePrecision
from lightning_pipelite.strategy.run import PipelineRun
from lightning_pipelite.strategy.stage_timer import busy_and_waiting
from lightning_pipelite.strategy.transfers import let_streams_run_beside
from lightning_pipelite.strategy.watchdog.parent_death import guard_against_parent_death

_SECONDS_TO_WRITE = 60.0
"""How long the end of the job waits for a checkpoint that is being written when a rank fails."""


class PipeLiteStrategy(DDPStrategy):
    """Pipeline parallelism, and data parallelism over the remaining devices, on DeepSpeed's pipeline engine.

    The module must have a method ``pipeline_layers()`` that returns ``(layers, loss)``; micro-batches are pairs
    ``(inputs, targets)``. Its ``training_step``, ``validation_step`` and ``test_step`` are not called: the strategy
    itself logs ``train/loss``, ``train/grad_norm`` and ``eval/loss`` (``test/loss`` in ``Trainer.test``), the same
    values on every rank. A module with a method ``log_evaluation(total, count, dataloader_idx)`` logs its evaluations
    itself. :mod:`lightning_pipelite.shared.protocol` describes what else a module may have.
    ``Trainer(accumulate_grad_batches=N)`` sets the number of micro-batches per step.

    Example::

        class Model(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))

            def pipeline_layers(self):
                return list(self.layers), nn.functional.cross_entropy

            def training_step(self, batch, batch_idx):  # for every other strategy
                return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        strategy = PipeLiteStrategy(pipeline_stages=3)
        trainer = L.Trainer(strategy=strategy, devices=3, accumulate_grad_batches=8, max_epochs=1)
        trainer.fit(Model(), loader)  # yields pairs (inputs, targets)

    Args:
        pipeline_stages: The number of stages; it must divide the number of devices.
        partition_method: ``uniform`` (equal numbers of layers), ``parameters`` (equal numbers of parameters, including
            frozen ones), ``type:REGEX`` (equal numbers of layers whose class name matches), ``layers:9,7`` (the numbers
            themselves, as recommended by ``pipelite plan``) or ``auto`` (the slowest stage as fast as possible, where
            all fit their device; for PipeLiteModule by its plan, and for modules whose layers report their costs).
        use_column_major_topology: Put the stages of one pipeline on neighbouring devices, so that hidden states use the
            links within a node and gradients the network; otherwise the other way round.
        timeout: How long a rank may make no progress before the job is ended, in seconds.
        process_group_backend: ``nccl`` or ``gloo``; chosen by the device if not given.
        cluster_environment: Lightning's cluster environment, for special clusters.
        virtual_stages: The number of pieces of the model on each stage, by which the pipeline's bubble is divided: of 2
            stages with 2 pieces each, the first has the first and the third quarter of the layers.
        speeds: How fast each device is, in the order of their ranks and in any unit, for ``partition_method`` auto. If
            not given, a PipeLiteModule's plan measures GPUs, and other layers use the speeds in their costs.

    Raises:
        ConfigurationError: By ``Trainer.fit``, before any process is started, if the configuration is invalid.
    """

    strategy_name = "pipelite"
    _job: Job  # set when the Trainer is created

    def __init__(
        self,
        pipeline_stages: int = 1,
        partition_method: str = "uniform",
        use_column_major_topology: bool = False,
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        virtual_stages: int = 1,
        speeds: list[float] | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
    ) -> None:
        guard_against_parent_death()
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            process_group_backend=process_group_backend,
            # Longer than the watchdog's, which can name the rank that is stuck; NCCL would only abort.
            timeout=timedelta(seconds=timeout + 60),
        )
        check_timeout(timeout)
        self.timeout = timedelta(seconds=timeout)
        check_virtual_stages(pipeline_stages, virtual_stages)
        self.pipeline_stages = pipeline_stages
        self.virtual_stages = virtual_stages
        self.partition_method = partition_method
        self.use_column_major_topology = use_column_major_topology
        check_speeds(speeds, partition_method)
        self.speeds = speeds
        self.measure_stage_times = False
        """Whether the next step is to be measured."""
        self.instruction_times: dict[str, float] | None = None
        """Seconds of the last step by DeepSpeed's names of the instructions; None if it was not measured."""
        self._run: PipelineRun | None = None  # the last one; its stage and checkpointing outlive it
        self._end = contextlib.ExitStack()  # undone at the end of a run, in reverse order

    # The place of this rank

    @property
    def topology(self) -> Topology:
        """Which rank is which stage of which replica."""
        return Topology(self.num_nodes * self.num_processes, self.pipeline_stages, self.use_column_major_topology)

    def cutter(self, method: str | None = None) -> Callable[[PipelineLayers], list[int]]:
        """Return the function that cuts layers into stages, or into their pieces, by this strategy's options.

        Args:
            method: Replaces its ``partition_method``.

        Raises:
            ConfigurationError: If there is not one speed per device. The function returned raises it if layers cannot
                be cut so.
        """
        return partial(
            partition,
            stages=self.pipeline_stages,
            method=method or self.partition_method,
            virtual_stages=self.virtual_stages,
            speeds=speeds_of_stages(self.speeds, self.topology),
        )

    @property
    def stage_id(self) -> int:
        """The number of this rank's stage."""
        return self.topology.stage_of(self.global_rank)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline see the same data, so a sampler counts pipelines, not processes."""
        return {"num_replicas": self.topology.replicas, "rank": self.topology.replica_of(self.global_rank)}

    @property
    def stage(self) -> nn.Module | None:
        """The layers of this rank, once a run has been set up."""
        return None if self._run is None else self._run.stage

    @property
    def stage_times(self) -> tuple[float, float] | None:
        """Seconds that this rank computed and waited for others in the last step; None if not measured."""
        return None if self.instruction_times is None else busy_and_waiting(self.instruction_times)

    # Before and while the processes start

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._job = Job(self.cluster_environment, self.num_processes, self.num_nodes, self.cutter)
        self._launcher = self._job.launcher

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module.trainer)  # now including the module's own
        if self.virtual_stages > 1:
            let_streams_run_beside()
        gc.collect()  # a former trainer is part of reference cycles: its optimizer's state would stay beside this one's
        super().setup_environment()
        load_deepspeed(self.root_device, self.local_rank)
        self._job.watch(self.stage_id, self.timeout)
        self._end.callback(self._job.leave)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._run = None
        self._run = run = PipelineRun(
            trainer,
            self._job.take_layers(),
            topology=self.topology,
            cut=self.cutter(),
            timeout=self.timeout,
            progress=self._job.progress,
            end=self._end,
        )
        self._end.callback(setattr, self, "precision_plugin", self.precision_plugin)
        self.precision_plugin = PipelinePrecision(run.training)
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainable(run.training.parameters, self.root_device)
            self.setup_optimizers(trainer)
            run.checkpointing.optimizer_made(self.optimizers[0])

    @property
    def _running(self) -> PipelineRun:
        assert self._run is not None
        return self._run

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self._running.training.take_optimizer(self.optimizers)

    # Training

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a micro-batch to the device; middle stages only need its shapes, and keep it on the host."""
        if 0 < self.stage_id < self.pipeline_stages - 1:
            device = torch.device("cpu")
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, batch: Any, *_: Any) -> Tensor:
        """Collect the micro-batches of a step; on the last one, run them all forward and backward."""
        assert self.lightning_module is not None
        training = self._running.training
        loss = training.take(checked_pair(batch), measure=self.measure_stage_times)
        if not self.lightning_module.trainer.fit_loop._should_accumulate():
            self.instruction_times = training.instruction_times
            self._job.keep_logs()
        return loss

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Do nothing: gradients are reduced only once a step anyway."""
        yield

    # Evaluation

    @override
    def validation_step(self, batch: Any, *indices: int) -> None:
        self._running.evaluation.take(checked_pair(batch), indices)
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.sanity_checking:
            self._job.keep_logs()

    @override
    def test_step(self, batch: Any, *indices: int) -> None:
        self.validation_step(batch, *indices)

    @property
    def evaluation(self) -> PipelineEvaluation:
        """Runs micro-batches through the stages without gradients; available once a run has been set up."""
        return self._running.evaluation

    def on_validation_end(self) -> None:
        """Note the end of an evaluation; the callbacks have been called by then."""
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._running.checkpointing.last_step.evaluation_ended()

    # The trained weights

    def collect_stages(self, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Bring tensors of every stage to rank 0, one stage at a time, to be written. Collective.

        Args:
            tensors: The tensors of this rank's stage; only the first replica's are sent.

        Returns:
            On rank 0 an iterator over the stages, with their tensors in host memory, which must be exhausted; elsewhere
            an empty one.
        """
        return collect_stages(tensors, self.topology, self.global_rank, self.root_device)

    # Checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is in no layer: all else is saved per stage."""
        return {} if self._run is None else self._run.checkpointing.outside_layers()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # saved per stage

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        refuse_remote(filepath, "save_checkpoint: filepath")
        error = sys.exc_info()[1]
        trainer: Any = getattr(self.lightning_module, "_trainer", None)
        if error is not None and (trainer is None or self._run is None):
            raise error  # it was raised before training began: there is nothing to save
        if self.world_size > 1 and trainer.interrupted and not isinstance(error, SIGTERMException):
            # Callers then report the checkpoint as written and synchronise with the other ranks, perhaps forever.
            rank_zero_warn(f"{filepath} is not written: this rank has failed, and the others cannot write their part.")
            assert error is not None
            self.on_exception(error)
            raise error
        self._job.progress("copying the state for a checkpoint", True)
        optimizer = self.optimizers[0] if self.optimizers else None
        self._running.checkpointing.save(checkpoint, Path(filepath), optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self._running.checkpointing.open(Path(checkpoint_path))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._running.checkpointing.load_model(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        self._running.checkpointing.load_optimizer(self.optimizers[0], checkpoint)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self._running.checkpointing.remove(Path(filepath))

    def on_train_start(self) -> None:
        """Start, once the data loaders have been created."""
        assert self.lightning_module is not None
        check_loaders(self.lightning_module.trainer.fit_loop._combined_loader, self.lightning_module)
        self._running.checkpointing.training_starts()

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._run is not None:
            together = isinstance(exception, SIGTERMException)  # all ranks have agreed to stop
            if isinstance(exception, SIGTERMException):
                self._run.sigterm.completes(exception)
            # After fail() the ranks have only a few seconds.
            self._run.store.wait(None if together else _SECONDS_TO_WRITE)
        self._job.fail(exception)

    @override
    def teardown(self) -> None:
        """Restore everything but the trained weights to its state before the run, even if the run has failed."""
        self._job.give_up_logs()
        self._end.close()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="Pipeline parallelism on DeepSpeed's engine")


PipeLiteStrategy.register_strategies(StrategyRegistry)
lightning_compat.install()
