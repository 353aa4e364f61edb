"""The Lightning strategy that runs a LightningModule's layers as a pipeline."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_pipelite import __version__
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.loop_state import at_step_end, for_replicas, within_last_batch
from lightning_pipelite.strategy.checkpoint.encoding import encode
from lightning_pipelite.strategy.checkpoint.find import find_checkpoint
from lightning_pipelite.strategy.checkpoint.store import CheckpointStore
from lightning_pipelite.strategy.deepspeed_compat import load_deepspeed
from lightning_pipelite.strategy.gradients import clip_factor, global_norm, scale_gradients
from lightning_pipelite.strategy.launcher import PipeLiteLauncher
from lightning_pipelite.strategy.layers import Loss, PipelineLayers, hand_out_layers
from lightning_pipelite.strategy.lifeline import Lifeline
from lightning_pipelite.strategy.partition import partition
from lightning_pipelite.strategy.randomness import LayerRandomness
from lightning_pipelite.strategy.topology import Topology


class PipeLiteStrategy(DDPStrategy):
    """Pipeline parallelism, and data parallelism over the rest of the devices, on DeepSpeed's pipeline engine.

    The module must have a method ``pipeline_layers()`` that returns ``(layers, loss)``, see
    :mod:`lightning_pipelite.strategy.layers`; micro-batches are pairs ``(inputs, targets)``. Its ``training_step`` and
    ``validation_step`` are not called: the strategy logs ``train/loss``, ``train/grad_norm`` and ``eval/loss`` itself,
    the same values on every rank; ``eval/loss`` is left to a method ``log_evaluation(total, count, dataloader_idx)`` of
    the module, if it has one. ``Trainer(accumulate_grad_batches=N)`` is the number of micro-batches a step.

    Example::

        class Model(L.LightningModule):
            def pipeline_layers(self):
                return [nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)], nn.functional.cross_entropy

        Trainer(strategy=PipeLiteStrategy(pipeline_stages=3), devices=3, accumulate_grad_batches=8)

    Args:
        pipeline_stages: the number of stages; it must divide the number of devices.
        partition_method: ``uniform`` (equal numbers of layers), ``parameters`` (equal numbers of parameters, frozen
            ones too) or ``type:REGEX`` (equal numbers of layers whose class name matches).
        use_column_major_topology: put the stages of one pipeline on neighbouring devices, and with that the hidden
            states on a node's own links and the gradients on the network; otherwise the other way round.
        timeout: how long a rank may make no progress before the job is ended, in seconds.
        process_group_backend: ``nccl`` or ``gloo``; chosen by the device if not given.
        cluster_environment: Lightning's, for special clusters.

    Raises:
        ConfigurationError: by ``Trainer.fit``, before any process is started, if the configuration does not fit.
    """

    strategy_name = "pipelite"

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
            # Longer than the lifeline's, which can tell which rank is stuck; NCCL would only abort.
            timeout=timedelta(seconds=timeout + 60),
        )
        if timeout <= 0:
            raise ConfigurationError(f"strategy: timeout must be a positive number of seconds, not {timeout}.")
        self.timeout = timedelta(seconds=timeout)
        self.pipeline_stages = pipeline_stages
        self.partition_method = partition_method
        self.use_column_major_topology = use_column_major_topology
        self.stage: nn.Module | None = None
        self._handed: tuple[PipelineLayers, Loss] | None = None
        self._lifeline: Lifeline | None = None
        self._engine: Any = None  # a PipeLiteEngine, which can be imported once the device is known
        self._checkpoints: CheckpointStore | None = None
        self._randomness: LayerRandomness | None = None
        self._random_states: dict[str, Any] | None = None  # of the checkpoint, until training starts
        self._step_ended: tuple[list[Any], dict[str, Any]] = [], {}  # the data loaders and generators at that time
        self._evaluated = False  # right after that step
        self._reserves = False  # host memory, before the first step that finds all of the optimizer's state
        self._to_save: dict[str, bool] = {}  # after the evaluation that follows: whether without the optimizer
        self._micro_batches: list[Any] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._eval_batches: list[Any] = []
        self._eval_sums: Tensor | None = None
        self._eval_seen, self._eval_loader = 0, 0
        self._loss = torch.zeros(())
        self._logged: tuple[str, ...] = ()
        self.eval_micro_batches = 4 * pipeline_stages
        """How many micro-batches of an evaluation run through the pipeline at once."""

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

    # Before and while the processes start

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = PipeLiteLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, before_launch=self._check
        )

    def _check(self, trainer: pl.Trainer | None, arguments: dict[str, Any]) -> None:
        """Refuse what cannot work, in the process that would start the others; resolve ``ckpt_path="last"``."""
        assert trainer is not None
        topology = self.topology
        if trainer.state.fn not in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            raise ConfigurationError("PipeLiteStrategy trains and validates; test and predict without it.")
        if trainer.precision != "32-true":
            raise ConfigurationError(
                f"Trainer(precision={trainer.precision!r}) is not supported by PipeLiteStrategy: every layer keeps the "
                "dtype that the module gives it (PipeLiteModule has dtype=); leave precision out."
            )
        module = arguments.get("model") or trainer.lightning_module
        if not module.automatic_optimization:
            raise ConfigurationError("PipeLiteStrategy needs automatic_optimization=True.")
        if self._layer_sync is not None:
            raise ConfigurationError("Trainer(sync_batchnorm=True) is not supported by PipeLiteStrategy; leave it out.")
        if not (is_overridden("setup", module) or is_overridden("configure_model", module)):  # they may make the layers
            self._handed = hand_out_layers(module)
            partition(self._handed[0], topology.stages, self.partition_method)
        arguments["ckpt_path"] = find_checkpoint(trainer, arguments.get("ckpt_path"), checks=self._starts_the_job())

    def _starts_the_job(self) -> bool:
        assert self.cluster_environment is not None
        return self.cluster_environment.global_rank() == 0

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        load_deepspeed(self.root_device, self.local_rank)
        launcher = self._launcher
        assert isinstance(launcher, PipeLiteLauncher)
        assert self.cluster_environment is not None
        self._lifeline = Lifeline.connect(
            rank=self.global_rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            stage=self.stage_id,
            host=self.cluster_environment.main_address,
            children=launcher.procs,
            timeout=self.timeout,
        )
        launcher.stop_watching()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        from lightning_pipelite.strategy.engine import PipeLiteEngine

        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        # Lightning's own broadcasts within the handler, amid whatever the ranks are doing, which then never ends.
        trainer._signal_connector._sigterm_notifier_fn = partial(_note_sigterm, trainer)  # type: ignore[method-assign]
        self.precision_plugin = _PipelinePrecision(self)
        layers, loss = self._handed or hand_out_layers(self.lightning_module)
        self._handed = None
        self.stage = self._build_stage(layers)
        if isinstance(loss, nn.Module):
            loss.to(self.root_device)
        self._randomness = LayerRandomness(self, self.root_device, self.stage)
        self._checkpoints = CheckpointStore(self.topology, self.global_rank, self.root_device, self.timeout)
        self._micro_batches, self._gradients, self._loss = [], [], torch.zeros(())
        self._logged = tuple(getattr(loss, "logged", ()))
        self._engine = PipeLiteEngine(
            self.stage,
            self.stage_id,
            self.pipeline_stages,
            self.use_column_major_topology,
            loss,
            progress=self._progress,
            randomness=self._randomness,
        )
        if trainer.state.fn == TrainerFn.FITTING:
            self._refuse_nothing_to_train()
            self.setup_optimizers(trainer)

    def _build_stage(self, layers: PipelineLayers) -> nn.Module:
        """This rank's layers; those of the run before, if there was one, with what they have learnt."""
        module = self.lightning_module
        assert module is not None
        bounds = partition(layers, self.pipeline_stages, self.partition_method)
        place = (bounds[self.stage_id], bounds[self.stage_id + 1], bounds[-1], str(self.root_device))
        built: tuple[nn.Module, Any] | None = getattr(module, "_pipelite_stage", None)
        if built is None:
            stage = layers.build_stage(*place[:2], self.root_device)
            # As a submodule it follows Lightning's train and eval modes, and its parameters are the module's.
            module.add_module("pipeline_stage", stage)
            object.__setattr__(module, "_pipelite_stage", (stage, place))  # not one more submodule
            return stage
        if built[1] != place:
            raise ConfigurationError(
                f"this {type(module).__name__} has been split into other stages before: this process holds only its "
                f"layers {built[1][0]} to {built[1][1]}; make a new one, and pass ckpt_path to load what was trained."
            )
        return built[0]

    @override
    def model_to_device(self) -> None:
        """Nothing to do: the stage was built where it belongs."""

    def _refuse_nothing_to_train(self) -> None:
        trainable = torch.tensor(float(sum(p.requires_grad for p in self._parameters())), device=self.root_device)
        dist.all_reduce(trainable)
        if trainable.item() == 0:
            raise ConfigurationError("no parameter of any stage requires a gradient: there is nothing to train.")

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise ConfigurationError(f"PipeLiteStrategy needs one optimizer, not {len(self.optimizers)}.")
        if isinstance(self.optimizers[0], torch.optim.LBFGS):
            raise ConfigurationError("LBFGS needs all parameters in one process; use another optimizer.")
        mine = {id(p) for p in self._parameters()}
        assert self.lightning_module is not None
        names = {id(p): name for name, p in self.lightning_module.named_parameters()}
        for group in self.optimizers[0].param_groups:
            # The layers of other stages are on the meta device here. What is neither there nor here is in no stage.
            stray = [p for p in group["params"] if id(p) not in mine and p.requires_grad and not p.is_meta]
            if stray:
                raise ConfigurationError(
                    f"the optimizer was given {names.get(id(stray[0]), 'a parameter')}, which is in none of the layers "
                    "of pipeline_layers() and so would never be trained; put it in a layer, or freeze it."
                )
            group["params"] = [p for p in group["params"] if id(p) in mine]

    def _parameters(self) -> Iterator[Tensor]:
        assert self.stage is not None
        return self.stage.parameters()

    def _progress(self, activity: str, waits: bool) -> None:
        if self._lifeline is not None:
            self._lifeline.progress(activity, waits=waits)

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
        self._micro_batches.append(_pair(batch))
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
        for parameter in self._parameters():
            parameter.grad = None
        if self._reserves and self.optimizers[0].state:
            self._reserves = False
            assert self._checkpoints is not None
            assert self.stage is not None
            self._checkpoints.reserve(self.stage, self.optimizers[0])
        total, count, *logged = self._engine.train_on(micro_batches, module.trainer.global_step).tolist()
        if not (count > 0 and math.isfinite(total)):
            why = f"the loss is {total / count}" if count > 0 else "every target is masked, there is nothing to learn"
            step = module.trainer.global_step + 1
            raise RuntimeError(f"step {step}: {why}; training stops before the weights are changed")
        scale_gradients(self._parameters(), self.topology.replicas / count)
        self._gradients = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._loss = torch.tensor(total / count)
        self._note_step_end()
        module.log("train/loss", self._loss, prog_bar=True, batch_size=1)
        for name, value in zip(self._logged, logged, strict=True):
            module.log(f"train/{name}", value / count, batch_size=1)

    def _hand_over_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the gradients over all stages, each tied parameter counted once; a scalar. Collective."""
        group = self._engine.grid.get_pipe_parallel_group() if self.pipeline_stages > 1 else None
        counted = [p for p in self._parameters() if self._engine.ties.counts_here(p)]
        return global_norm(counted, group, self.root_device)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        yield

    # Evaluation

    @override
    def validation_step(self, batch: Any, *indices: int) -> None:
        """Collect micro-batches and run them a pipeline-full at a time; log the mean with the last one."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == TrainerFn.FITTING else trainer.validate_loop
        # Lightning passes only the indices that the module's own validation_step asks for.
        loader = indices[-1] if loop._is_sequential and loop.num_dataloaders > 1 else 0
        first = loop.batch_progress.current.ready == 1
        if first or loader != self._eval_loader:
            if not first and (self._eval_batches or self._eval_sums is not None):
                raise ConfigurationError(
                    f"validation dataloader {self._eval_loader} has no length, so that its end is not known; give it a "
                    "__len__, or set limit_val_batches to a number."
                )
            self._eval_batches, self._eval_sums, self._eval_seen, self._eval_loader = [], None, 0, loader
        self._eval_batches.append(_pair(batch))
        self._eval_seen += 1
        limit = loop.max_batches[loader] if loop._is_sequential else math.inf
        last = loop.batch_progress.is_last_batch or self._eval_seen == limit
        if not last and len(self._eval_batches) < self.eval_micro_batches:
            return
        sums = self._engine.evaluate_on(self._eval_batches)
        self._eval_batches = []
        self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        if last:
            total, count, *_ = self._engine.share(self._eval_sums).tolist()
            self._eval_sums = None
            self._warn_of_repeats(loop, loader)
            if callable(log := getattr(self.lightning_module, "log_evaluation", None)):
                log(total, count, loader)
                return
            loss = total / count if count else math.nan
            self.lightning_module.log("eval/loss", loss, batch_size=1, sync_dist=True, prog_bar=True)

    def _warn_of_repeats(self, loop: Any, loader: int) -> None:
        """Lightning's sampler for several processes gives all of them equally many rows, some twice if need be."""
        sampler: Any = getattr(loop._combined_loader.flattened[loader], "sampler", None)
        if type(sampler) not in (DistributedSampler, DistributedSamplerWrapper):  # not a user's own kind
            return
        repeats = sampler.total_size - len(sampler.dataset)
        if repeats > 0 and loop.max_batches[loader] == len(loop._combined_loader.flattened[loader]):
            rank_zero_warn(
                f"eval/loss counts {repeats} of {len(sampler.dataset)} validation samples twice, because they do not "
                f"divide by {self.topology.replicas} replicas; PackedDataModule's sampler repeats none."
            )

    # What was trained

    def collect_stages(self, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Bring tensors of every stage to rank 0, a stage at a time, to be written. Collective.

        Args:
            tensors: what this rank's stage has; only the first replica's are sent.

        Returns:
            On rank 0 an iterator over the stages, their tensors in host memory, which must be exhausted; elsewhere an
            empty one.
        """
        topology = self.topology
        if self.global_rank == 0:
            return self._receive_stages(tensors)
        if topology.replica_of(self.global_rank) == 0:
            described = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
            dist.send_object_list([described], dst=0, device=self.root_device)
            for tensor in tensors.values():
                dist.send(tensor.detach().to(self.root_device).contiguous(), dst=0)
        return iter(())

    def _receive_stages(self, tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        yield {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for stage in range(1, self.pipeline_stages):
            source = self.topology.rank_of(stage, 0)
            described: list[Any] = [None]
            dist.recv_object_list(described, src=source, device=self.root_device)
            received = {}
            for name, shape, dtype in described[0]:
                buffer = torch.empty(shape, dtype=dtype, device=self.root_device)
                dist.recv(buffer, src=source)
                received[name] = buffer.cpu()
            yield received

    # Checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # saved by stage

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # saved by stage

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Copy everything to host memory; while training goes on, the files are written in the background."""
        assert self.stage is not None
        assert self._checkpoints is not None
        if self._evaluation_follows():
            # Lightning does not make up for it when it resumes from a checkpoint before it.
            self._to_save[str(filepath)] = "optimizer_states" not in checkpoint
            return
        self._progress("copying for a checkpoint", True)
        state, meta = self._describe(checkpoint)
        optimizer = self.optimizers[0] if self.optimizers and "optimizer_states" in checkpoint else None
        self._checkpoints.save(Path(filepath), state, meta, self.stage, optimizer)
        if not self._trains:
            self._checkpoints.wait()

    def _evaluation_follows(self) -> bool:
        """Whether this is called in the last hook of a batch, before an evaluation."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        counts: Any = loop.batch_progress.current
        in_hook = trainer.training and counts.ready == counts.processed == counts.completed + 1
        return in_hook and fetcher is not None and trainer.enable_validation and loop._should_check_val_fx(fetcher)

    def on_validation_end(self) -> None:
        """Called after the callbacks."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if not self._micro_batches:
            self._note_step_end()
            self._evaluated = True
        to_save, self._to_save = self._to_save, {}
        for path, weights_only in to_save.items():
            trainer.save_checkpoint(path, weights_only)

    @property
    def _trains(self) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.state.status == "running"

    def _describe(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Lightning saves, with the random states; and what ``meta.json`` says."""
        assert self.lightning_module is not None
        assert self._randomness is not None
        trainer = self.lightning_module.trainer
        state = {**checkpoint, "random_states": self._randomness.state()}
        if self._micro_batches:  # in the middle of a step: the checkpoint is that of the last one
            loaders, state["random_states"] = self._step_ended
            ahead = len(self._micro_batches)
            fit_loop = at_step_end(checkpoint["loops"]["fit_loop"], ahead, loaders, self._evaluated)
            state["loops"] = {**checkpoint["loops"], "fit_loop": fit_loop}
        return state, {
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "stages": self.pipeline_stages,
            "replicas": self.topology.replicas,
            "micro_batches": trainer.accumulate_grad_batches,
            "identity": self._identity(),
            "hyper_parameters": encode(checkpoint.get("hyper_parameters", {}), {}, "hyper_parameters"),
            "versions": {
                "lightning-pipelite": __version__,
                **{name: version(name) for name in ("torch", "lightning", "deepspeed")},
            },
        }

    def _identity(self) -> dict[str, Any]:
        """What tells the module's model and what is trained of it from others, if the module can say."""
        describe = getattr(self.lightning_module, "checkpoint_identity", None)
        return describe() if callable(describe) else {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self._checkpoints is not None
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        state, meta = self._checkpoints.open(Path(checkpoint_path), self._identity())
        self._random_states = state.pop("random_states")
        if trainer.state.fn == TrainerFn.FITTING:
            if trainer.max_steps != -1:
                within_last_batch(state["loops"]["fit_loop"])
            before = meta["replicas"], meta["micro_batches"]
            for_replicas(state["loops"], before, (self.topology.replicas, trainer.accumulate_grad_batches))
        return state

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.stage is not None
        assert self._checkpoints is not None
        self._checkpoints.load_parameters(self.stage)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.stage is not None
        assert self._checkpoints is not None
        self._checkpoints.load_optimizer(self.stage, self.optimizers[0])

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove it as soon as what is being written is safely on the disk; if that fails, later."""
        assert self._checkpoints is not None
        if self.is_global_zero:
            self._checkpoints.remove(Path(filepath), after_next=bool(self._to_save))

    def on_train_start(self) -> None:
        """Called when the data loaders have been made, which drew from the generators."""
        assert self._randomness is not None
        if self._random_states is not None:
            self._randomness.load_state(self._random_states)
            self._random_states = None
        self._note_step_end()
        self._rehearse_saving()

    def _rehearse_saving(self) -> None:
        """What a checkpoint cannot hold is refused now, not hours later."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.checkpoint_callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            state, _ = self._describe(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
            encode(state, {})
            self._reserves = self.root_device.type == "cuda"

    def _note_step_end(self) -> None:
        assert self.lightning_module is not None
        assert self._randomness is not None
        loader = self.lightning_module.trainer.fit_loop._combined_loader
        loaders = loader._state_dicts() if loader is not None and self.is_global_zero else []
        self._step_ended = loaders, self._randomness.state()
        self._evaluated = False

    # The end

    @override
    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and self._checkpoints is not None:
            self._checkpoints.wait()  # all ranks leave together; from fail() on they have some seconds only
        if self._lifeline is not None:
            self._lifeline.fail(exception)

    @override
    def teardown(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
        if self._lifeline is not None:
            self._lifeline.close()
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


class _PipelinePrecision(Precision):
    """Leaves every dtype as it is; takes the gradients from the engine, and clips by their norm over all stages."""

    def __init__(self, strategy: PipeLiteStrategy) -> None:
        self._strategy = strategy

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._strategy._hand_over_gradients()

    @override
    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        model.log("train/grad_norm", self._strategy.gradient_norm(), batch_size=1)
        super()._clip_gradients(model, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        factor = clip_factor(self._strategy.gradient_norm(), float(clip_val))
        scale_gradients(self._strategy._parameters(), factor)


def _note_sigterm(trainer: pl.Trainer, signum: int, frame: Any) -> None:
    """Before the next micro-batch rank 0 tells all ranks, and they leave."""
    trainer._signal_connector.received_sigterm = True


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ConfigurationError(
            f"PipeLiteStrategy needs micro-batches that are pairs (inputs, targets), not {type(batch).__name__}; "
            "on_after_batch_transfer() of the module can make them so."
        )
    return batch[0], batch[1]
