"""The Lightning strategy that runs a LightningModule's layers as a pipeline."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Generator, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.checkpoint.find import find_checkpoint
from lightning_pipelite.checkpoint.promised import see_promises
from lightning_pipelite.checkpoint.store import CheckpointStore
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.async_scalar import on_host
from lightning_pipelite.shared.local_path import refuse_remote
from lightning_pipelite.shared.topology import Topology
from lightning_pipelite.strategy import lightning_compat
from lightning_pipelite.strategy.agreement import Agreement
from lightning_pipelite.strategy.checkpoint_checks import check_checkpoint_callbacks
from lightning_pipelite.strategy.checkpointing import Checkpointing
from lightning_pipelite.strategy.checks import (
    check_loaders,
    check_optimizers,
    check_trainable,
    check_trainer,
    checked_pair,
)
from lightning_pipelite.strategy.collect import collect_stages
from lightning_pipelite.strategy.deepspeed_compat import forget_engine, load_deepspeed
from lightning_pipelite.strategy.empty_logs import EmptyLogs
from lightning_pipelite.strategy.evaluation import PipelineEvaluation
from lightning_pipelite.strategy.former_results import refuse_former_results
from lightning_pipelite.strategy.gradient_check import GradientCheck
from lightning_pipelite.strategy.gradients import GradientNorms, gradient_norms, scale_gradients
from lightning_pipelite.strategy.known_callbacks import check_callbacks
from lightning_pipelite.strategy.launcher import PipeLiteLauncher
from lightning_pipelite.strategy.layer_rng import LayerRNG
from lightning_pipelite.strategy.layers import (
    LooseParts,
    Loss,
    PipelineLayers,
    build_stage,
    hand_out_layers,
    release_stage,
)
from lightning_pipelite.strategy.micro_batches import all_shapes
from lightning_pipelite.strategy.outside_layers import load_outside_layers, outside_layers
from lightning_pipelite.strategy.partition import partition
from lightning_pipelite.strategy.precision import PipelinePrecision
from lightning_pipelite.strategy.process_groups import JobGroups
from lightning_pipelite.strategy.sigterm import SigtermNotice
from lightning_pipelite.strategy.stage_timer import StageTimer, busy_and_waiting
from lightning_pipelite.strategy.watchdog import Watchdog

_SECONDS_TO_WRITE = 60.0
"""How long the job's end waits for a checkpoint that is being written when a rank fails."""


class PipeLiteStrategy(DDPStrategy):
    """Pipeline parallelism, and data parallelism over the rest of the devices, on DeepSpeed's pipeline engine.

    The module must have a method ``pipeline_layers()`` that returns ``(layers, loss)``, see
    :mod:`lightning_pipelite.strategy.layers`; micro-batches are pairs ``(inputs, targets)``. Its ``training_step``,
    ``validation_step`` and ``test_step`` are not called: the strategy logs ``train/loss``, ``train/grad_norm`` and
    ``eval/loss`` (``test/loss`` in ``Trainer.test``) itself, the same values on every rank; the latter are left to a
    method ``log_evaluation(total, count, dataloader_idx)`` of the module, if it has one.
    ``Trainer(accumulate_grad_batches=N)`` is the number of micro-batches a step.

    Example::

        class Model(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))

            def pipeline_layers(self):
                return list(self.layers), nn.functional.cross_entropy

            def training_step(self, batch, batch_idx):  # under every other strategy
                return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        strategy = PipeLiteStrategy(pipeline_stages=3)
        trainer = L.Trainer(strategy=strategy, devices=3, accumulate_grad_batches=8, max_epochs=1)
        trainer.fit(Model(), loader)  # of pairs (inputs, targets)

    Args:
        pipeline_stages: the number of stages; it must divide the number of devices.
        partition_method: ``uniform`` (equal numbers of layers), ``parameters`` (equal numbers of parameters, frozen
            ones too), ``type:REGEX`` (equal numbers of layers whose class name matches), ``layers:9,7`` (the numbers
            themselves, such as ``pipelite plan`` recommends) or ``auto`` (the slowest stage as fast as possible, where
            all fit their device; for PipeLiteModule by the plan, and for modules whose layers say what they cost).
        use_column_major_topology: put the stages of one pipeline on neighbouring devices, and with that the hidden
            states on a node's own links and the gradients on the network; otherwise the other way round.
        timeout: how long a rank may make no progress before the job is ended, in seconds.
        process_group_backend: ``nccl`` or ``gloo``; chosen by the device if not given.
        cluster_environment: Lightning's, for special clusters.

    Raises:
        ConfigurationError: by ``Trainer.fit``, before any process is started, if the configuration does not fit.
    """

    strategy_name = "pipelite"

    _gradient_check: GradientCheck  # all from setup on
    _loose_parts: LooseParts
    _agreement: Agreement
    _evaluation: PipelineEvaluation
    _checkpointing: Checkpointing
    _sigterm: SigtermNotice

    def __init__(
        self,
        pipeline_stages: int = 1,
        partition_method: str = "uniform",
        use_column_major_topology: bool = False,
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            process_group_backend=process_group_backend,
            # Longer than the watchdog's, which can tell which rank is stuck; NCCL would only abort.
            timeout=timedelta(seconds=timeout + 60),
        )
        if timeout <= 0:
            raise ConfigurationError(f"strategy: timeout must be a positive number of seconds, not {timeout}.")
        self.timeout = timedelta(seconds=timeout)
        self.pipeline_stages = pipeline_stages
        self.partition_method = partition_method
        self.use_column_major_topology = use_column_major_topology
        self.stage: nn.Module | None = None
        self._parameters: list[Tensor] = []
        self._handed: tuple[PipelineLayers, Loss] | None = None
        self._watchdog: Watchdog | None = None
        self._engine: Any = None  # a PipeLiteEngine, which can be imported once the device is known
        self._store: CheckpointStore | None = None
        self._empty_logs: EmptyLogs | None = None  # until something is logged
        self._end = contextlib.ExitStack()  # what the end of a run undoes, the last first
        self._micro_batches: list[Any] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._loss = torch.zeros(())
        self._logged: tuple[str, ...] = ()
        self.eval_micro_batches = 4 * pipeline_stages
        """How many micro-batches of an evaluation run through the pipeline at once."""
        self.measure_stage_times = False
        """Whether the next step is to be measured."""
        self.instruction_times: dict[str, float] | None = None
        """Seconds of the last step by DeepSpeed's names of the instructions, None if it was not measured."""

    # Where this rank stands

    @property
    def topology(self) -> Topology:
        return Topology(self.num_nodes * self.num_processes, self.pipeline_stages, self.use_column_major_topology)

    @property
    def stage_id(self) -> int:
        return self.topology.stage_of(self.global_rank)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline see the same data, so a sampler counts pipelines, not processes."""
        return {"num_replicas": self.topology.replicas, "rank": self.topology.replica_of(self.global_rank)}

    @property
    def stage_times(self) -> tuple[float, float] | None:
        """Seconds that this rank computed and that it waited for others in the last step, None if not measured."""
        return None if self.instruction_times is None else busy_and_waiting(self.instruction_times)

    # Before and while the processes start

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = PipeLiteLauncher(
            self.cluster_environment,
            self.num_processes,
            self.num_nodes,
            before_launch=self._check,
            after_launch=self._remove_empty_logs,
        )

    def _check(self, trainer: pl.Trainer | None, arguments: dict[str, Any]) -> None:
        """Refuse what cannot work, in the process that would start the others; resolve ``ckpt_path="last"``."""
        assert trainer is not None
        topology = self.topology
        module = arguments.get("model") or trainer.lightning_module
        check_trainer(trainer, module, self._layer_sync)
        check_checkpoint_callbacks(trainer)
        if not (is_overridden("setup", module) or is_overridden("configure_model", module)):  # they may make the layers
            self._handed = hand_out_layers(module)
            partition(self._handed[0], topology.stages, self.partition_method)
        arguments["ckpt_path"] = find_checkpoint(trainer, arguments.get("ckpt_path"), checks=self._starts_the_job())
        if self._starts_the_job():
            if trainer.state.fn == TrainerFn.FITTING:
                refuse_former_results(trainer, arguments.get("ckpt_path"))
            self._empty_logs = EmptyLogs(trainer)

    def _remove_empty_logs(self) -> None:
        """When the loggers have been finalized, or never will be."""
        if self._empty_logs is not None:
            self._empty_logs.remove()

    def _starts_the_job(self) -> bool:
        assert self.cluster_environment is not None
        return self.cluster_environment.global_rank() == 0

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        check_callbacks(self.lightning_module.trainer)  # now those of the module, too
        super().setup_environment()
        load_deepspeed(self.root_device, self.local_rank)
        launcher = self._launcher
        assert isinstance(launcher, PipeLiteLauncher)
        assert self.cluster_environment is not None
        self._watchdog = Watchdog.connect(
            rank=self.global_rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            stage=self.stage_id,
            host=self.cluster_environment.main_address,
            children=launcher.procs,
            timeout=self.timeout,
            last_act=self._remove_empty_logs,
        )
        launcher.stop_watching()
        self._end.callback(self._watchdog.close)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        from lightning_pipelite.strategy.engine import PipeLiteEngine

        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        groups = JobGroups()
        self._end.callback(groups.destroy)
        with groups.noted():
            self._agreement = Agreement(self.topology, self.global_rank)
        self._end.callback(self._agreement.close)
        self._sigterm = SigtermNotice(trainer, self._agreement)
        self._end.callback(self._sigterm.release)
        self.precision_plugin = PipelinePrecision(self)
        layers, loss = self._handed or hand_out_layers(self.lightning_module)
        self._handed = None
        bounds = partition(layers, self.pipeline_stages, self.partition_method)
        self.stage = build_stage(self.lightning_module, layers, bounds, self.stage_id, self.root_device)
        self._end.callback(self._release_stage)
        self._loose_parts = LooseParts(self.lightning_module, self.stage)
        self._parameters = list(self.stage.parameters())  # to look for them anew takes 10 ms, of every step
        if isinstance(loss, nn.Module):
            loss.to(self.root_device)
        layer_rng = LayerRNG(self, self.root_device, self.stage)
        self._end.callback(layer_rng.release)
        self._micro_batches, self._gradients, self._loss = [], [], torch.zeros(())
        self._logged = tuple(getattr(loss, "logged", ()))
        self._end.callback(self._forget_engine)
        with groups.noted():
            self._engine = PipeLiteEngine(
                self.stage,
                self.stage_id,
                self.pipeline_stages,
                self.use_column_major_topology,
                loss,
                progress=self._progress,
                layer_rng=layer_rng,
            )
            self._store = CheckpointStore(self.topology, self.global_rank, self.root_device, self.timeout)
        self._end.callback(see_promises(trainer.callbacks, self._store.promised))  # type: ignore[attr-defined]
        self._end.callback(self._store.close)
        self._gradient_check = GradientCheck(self.stage, self._engine.pipeline_group)
        self._evaluation = PipelineEvaluation(trainer, self._engine, self._agreement, self.topology)
        on_gpu = self.root_device.type == "cuda"
        self._checkpointing = Checkpointing(trainer, self._store, self.stage, layer_rng, self.topology, on_gpu)
        self._end.callback(self._checkpointing.training_ends)
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainable(self.stage_parameters(), self.root_device)
            self.setup_optimizers(trainer)
            self._checkpointing.optimizer_made(self.optimizers[0])

    @override
    def model_to_device(self) -> None:
        """Nothing to do: the stage was built where it belongs."""

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        mine = {id(p) for p in self.stage_parameters()}
        check_optimizers(self.optimizers, self.lightning_module, self.stage_parameters())
        for group in self.optimizers[0].param_groups:
            group["params"] = [p for p in group["params"] if id(p) in mine]

    def stage_parameters(self) -> list[Tensor]:
        return self._parameters

    def _progress(self, activity: str, waits: bool) -> None:
        if self._watchdog is not None:
            self._watchdog.progress(activity, waits=waits)

    # Training

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The stages in the middle only need to know the shapes."""
        if 0 < self.stage_id < self.pipeline_stages - 1:
            device = torch.device("cpu")
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, batch: Any, *_: Any) -> Tensor:
        """Collect the micro-batches of a step; with the last one, run them all forward and backward."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        # Lightning passes the index only to a training_step that asks for it, and goes by the module's.
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._micro_batches.clear()
        self._micro_batches.append(checked_pair(batch))
        if not trainer.fit_loop._should_accumulate():
            micro_batches, self._micro_batches = self._micro_batches, []
            self._train_on(micro_batches)
        return self._loss

    def _train_on(self, micro_batches: list[Any]) -> None:
        """Compute the loss and the gradients of a step.

        The engine's gradients are those of the sum of all losses, divided by the number of replicas. Divided by the
        number of terms of the global batch instead they are exact, however the valid tokens are spread over the
        micro-batches. Lightning sets gradients to zero between its training step and its backward, so until then they
        are kept aside.
        """
        module = self.lightning_module
        assert module is not None
        for parameter in self.stage_parameters():
            parameter.grad = None
        self._checkpointing.step_starts(self.optimizers[0])
        self._loose_parts.follow()
        clock = StageTimer(self.root_device) if self.measure_stage_times else None
        if self.pipeline_stages > 1:  # a stage whose micro-batches were others, or fewer, would wait for ever
            loop = module.trainer.fit_loop.epoch_loop
            place = f"epoch {module.trainer.current_epoch}, the step up to micro-batch {loop.batch_idx + 1}"
            self._agreement.tell(place, all_shapes(micro_batches))
        # But for measured times and offloaded inputs, the only time in a step that the host waits for the device.
        total, count, *logged = self._engine.train_on(micro_batches, module.trainer.global_step, clock)
        self.instruction_times = None if clock is None else clock.seconds()
        if not (count > 0 and math.isfinite(total)):
            why = f"the loss is {total / count}" if count > 0 else "every target is masked, there is nothing to learn"
            step = module.trainer.global_step + 1
            raise RuntimeError(f"step {step}: {why}; training stops before the weights are changed")
        scale_gradients(self.stage_parameters(), self.topology.replicas / count)
        self._gradients = [(p, p.grad) for p in self.stage_parameters() if p.grad is not None]
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._loss = torch.tensor(total / count)
        self._empty_logs = None
        self._checkpointing.last_step.batches_taken()
        module.log("train/loss", self._loss, prog_bar=True, batch_size=1)
        for name, value in zip(self._logged, logged, strict=True):
            module.log(f"train/{name}", on_host(value / count), batch_size=1)

    def hand_over_gradients(self) -> None:
        """Give the parameters the gradients of the step."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def weights_change(self) -> None:
        """The optimizer has its gradients, and changes the weights next."""
        self._checkpointing.last_step.weights_change()

    def gradient_norms(self) -> GradientNorms:
        """The 2-norms of the gradients over all stages, each tied parameter counted once. Collective."""
        counted = [p for p in self.stage_parameters() if self._engine.ties.counts_here(p)]
        return gradient_norms(counted, self._engine.pipeline_group, self.root_device)

    def require_finite(self, norms: GradientNorms, clipped: Tensor) -> None:
        """Stop before the weights change if the gradients are not finite, before clipping or after it."""
        assert self.lightning_module is not None
        self._gradient_check.require_finite(self.lightning_module.trainer.global_step + 1, norms, clipped)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        yield

    # Evaluation

    @override
    def validation_step(self, batch: Any, *indices: int) -> None:
        self._loose_parts.follow()
        self._evaluation.take(checked_pair(batch), indices, self.eval_micro_batches)
        assert self.lightning_module is not None
        if not self.lightning_module.trainer.sanity_checking:
            self._empty_logs = None

    @override
    def test_step(self, batch: Any, *indices: int) -> None:
        self.validation_step(batch, *indices)

    def on_validation_end(self) -> None:
        """Called after the callbacks."""
        trainer = self.lightning_module.trainer  # type: ignore[union-attr]
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._checkpointing.last_step.evaluation_ended()

    # What was trained

    def collect_stages(self, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Bring tensors of every stage to rank 0, a stage at a time, to be written. Collective.

        Args:
            tensors: what this rank's stage has; only the first replica's are sent.

        Returns:
            On rank 0 an iterator over the stages, their tensors in host memory, which must be exhausted; elsewhere an
            empty one.
        """
        return collect_stages(tensors, self.topology, self.global_rank, self.root_device)

    # Checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All else is saved by stage."""
        assert self.lightning_module is not None
        return {} if self.stage is None else {**outside_layers(self.lightning_module, self.stage)}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # saved by stage

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        refuse_remote(filepath, "save_checkpoint: filepath")
        error = sys.exc_info()[1]
        trainer: Any = getattr(self.lightning_module, "_trainer", None)
        if error is not None and (trainer is None or self._store is None):
            raise error  # which has stopped the training before it began: there is nothing to save
        if self.world_size > 1 and trainer.interrupted and not isinstance(error, SIGTERMException):
            # Who calls this next says that the checkpoint is there, and asks the other ranks, which may wait forever.
            rank_zero_warn(f"{filepath} is not written: this rank has failed, and the others cannot write their part.")
            assert error is not None
            self.on_exception(error)
            raise error
        self._progress("copying for a checkpoint", True)
        optimizer = self.optimizers[0] if self.optimizers else None
        self._checkpointing.save(checkpoint, Path(filepath), optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self._checkpointing.open(Path(checkpoint_path))

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.stage is not None
        assert self._store is not None
        self._store.load_parameters(self.stage, strict)
        assert self.lightning_module is not None
        load_outside_layers(self.lightning_module, self.stage, checkpoint.get("state_dict", {}), strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        self._checkpointing.load_optimizer(self.optimizers[0], checkpoint)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self._checkpointing.remove(Path(filepath))

    def on_train_start(self) -> None:
        """Called when the data loaders have been made."""
        assert self.lightning_module is not None
        check_loaders(self.lightning_module.trainer.fit_loop._combined_loader, self.lightning_module)
        self._checkpointing.training_starts()

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._store is not None:
            together = isinstance(exception, SIGTERMException)  # all ranks have agreed on that
            if isinstance(exception, SIGTERMException):
                self._sigterm.completes(exception)
            # From fail() on the ranks have some seconds only.
            self._store.wait(None if together else _SECONDS_TO_WRITE)
        if self._watchdog is not None:
            self._watchdog.fail(exception)

    @override
    def teardown(self) -> None:
        """Everything is as it was before the run, but for the trained weights, and whether or not it has failed."""
        if self._empty_logs is not None and self._empty_logs.trainer.state.status == "interrupted":
            self._remove_empty_logs()
        self._end.close()
        self._watchdog = None
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _forget_engine(self) -> None:
        engine, self._engine = self._engine, None
        for name in ("_gradient_check", "_evaluation", "_loose_parts", "_agreement"):
            self.__dict__.pop(name, None)
        self._gradients, self._micro_batches = [], []
        forget_engine(engine)

    def _release_stage(self) -> None:
        module, stage = self.lightning_module, self.stage
        assert module is not None
        assert stage is not None
        if release_stage(module):
            # As Lightning's strategies do.
            _optimizers_to_device(self.optimizers, torch.device("cpu"))
            module.cpu()
        elif module.trainer.state.fn == TrainerFn.FITTING and "pipeline_stage" not in module._modules:
            rank_zero_info(
                f"Each process now holds the trained layers of its own stage alone, of {self.pipeline_stages}: the "
                f"others of this {type(module).__name__} are on the meta device, without values."
            )

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="Pipeline parallelism on DeepSpeed's engine")


PipeLiteStrategy.register_strategies(StrategyRegistry)
lightning_compat.install()
