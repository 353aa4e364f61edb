"""The LightningModule that puts a causal LM, its adapter, its loss and its optimizer together."""

from __future__ import annotations

import os
import warnings
from collections import ChainMap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.data import PackedDataModule
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage
from lightning_pipelite.models.fingerprint import refuse_another_base
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.models.memory import ActivationMemory
from lightning_pipelite.module.batches import BatchForm, count_documents
from lightning_pipelite.module.data_warnings import embedded_positions, warn_of_data
from lightning_pipelite.module.evaluation_metrics import Evaluation
from lightning_pipelite.module.greedy import GreedyWriter
from lightning_pipelite.module.logged_names import is_logged
from lightning_pipelite.module.optimization import Optimization
from lightning_pipelite.module.saving import Saving
from lightning_pipelite.module.step_log import StepLog
from lightning_pipelite.optim import OptimizerFactory
from lightning_pipelite.planning.memory_plan import MemoryPlan
from lightning_pipelite.shared.protocol import ChecksVocabulary
from lightning_pipelite.strategy import PipeLiteStrategy
from lightning_pipelite.strategy.layers import is_built
from lightning_pipelite.strategy.pieces import Pieces


class PipeLiteModule(pl.LightningModule):
    """Fine-tunes a Hugging Face causal LM under :class:`~lightning_pipelite.strategy.PipeLiteStrategy`.

    Batches are dicts of int64 tensors of shape (batch, sequence): ``input_ids``; ``position_ids``, which restart at
    every document so that attention stays within it; and ``labels``, already shifted, -100 where there is nothing to
    learn. A Control Adapter needs ``control_classes`` as well. Batches from transformers' collators for causal LMs are
    accepted too: their labels are shifted here, and right padding, as their ``attention_mask`` marks it, changes
    nothing.

    Args:
        model_dir: A local Hugging Face directory: config.json, safetensors, tokenizer.
        adapter: What is trained: LoRA, ControlAdapter or Full.
        load_in_4bit: Keep the frozen weights of linear layers in 4 bits (nf4, bitsandbytes).
        lr: The learning rate, approached by the RMS-ratio schedule unless another is chosen.
        beta1: Adam's decay rate of the first moment.
        beta2: Adam's decay rate of the second moment, also used by the schedule.
        eps: Adam's epsilon.
        dtype: The dtype of the base model's weights and of the hidden states.
        activation_memory: What is kept of a layer's activations until its backward pass. keep: everything; selective:
            the results of matrix products and attention, the rest is recomputed; recompute: the layer's input;
            offload: the same in host memory; auto: on GPUs the first of these with which every stage fits, by the same
            plan as ``pipelite plan``, else recompute.
        check_memory: Refuse training that does not fit on its GPUs, by that plan, before weights are loaded.
        compile_layers: Compile each decoder layer (torch.compile), which takes up to a minute before the first step;
            by default on GPUs, except for layers that loop over their experts.
        optimizer: Any class of torch.optim or optimi, with its options except lr; optimi's Adam by default, with Kahan
            summation where weights are bf16. beta1, beta2 and eps apply only to the default.
        schedule: ``rms_ratio``, with the optimizer's second beta; ``constant``; or ``cosine``, down to zero at the end
            of training.
        warmup_steps: Steps of linear warmup of the learning rate before ``constant`` and ``cosine``.
        parameter_groups: Other options for some parameters, by a regular expression that is searched for in their
            names: ``{"lora_B": {"lr": 3e-4}}`` is LoRA+ (https://arxiv.org/abs/2402.12354). The first match counts.
        packed: Sequences may hold several documents, which are kept apart. Models that cannot keep them apart, such as
            those that count positions in their own way, are refused unless this is false and each sequence is one
            document.
        attn_implementation: Varlen is FlashAttention over packed documents; sdpa and eager are transformers'. auto is
            varlen on GPUs that have it, for models with no other form of attention, else transformers' choice.
        bnb_4bit_use_double_quant: Also quantise the scales of the 4-bit weights' blocks, which saves 0.4 bits a weight.
        allow_pickled_weights: Load .bin files where the model has no safetensors; only from a source that you trust.
        trust_remote_code: Run the model's own Python code from model_dir.
        router_aux_loss_coef: Weight of the routers' load-balancing loss in a mixture of experts, 0 for none; if not
            given, the model's config.json decides (output_router_logits and router_aux_loss_coef).
        allow_another_base: Continue from a checkpoint, or an adapter (its init_from), that was trained on another base
            model than model_dir.
        load_in_fp8: Keep the frozen weights of linear layers in FP8, half of bfloat16's memory, and compute with them
            in FP8, forward and backward, on GPUs that can (Ada, Hopper and later); on others, and with dtype float32,
            they are dequantised before each product. Not for fused experts.
        fp8_transpose_cache: Also keep a transposed copy of weights in FP8, as much memory again, so that they need not
            be transposed for each backward product in FP8, which saves about 3 % of the time with 4096 tokens per
            micro-batch, more with fewer.
        offload_optimizer: Keep the optimizer's state in page-locked host memory between steps. A step copies it to the
            GPU and back a few parameters at a time, which takes longer; the resulting weights are the same.

    Raises:
        ConfigurationError: A value is out of range, or the model or the adapter cannot be loaded.
    """

    pipeline_stage: Stage | Pieces  # set by the strategy

    def __init__(
        self,
        model_dir: str,
        adapter: Adapter,
        load_in_4bit: bool = False,
        lr: float = 2e-5,
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-6,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        activation_memory: ActivationMemory = "auto",
        check_memory: bool = True,
        compile_layers: bool | None = None,
        optimizer: OptimizerFactory | None = None,
        schedule: Literal["rms_ratio", "constant", "cosine"] = "rms_ratio",
        warmup_steps: int = 0,
        parameter_groups: dict[str, dict[str, float]] | None = None,
        packed: bool = True,
        attn_implementation: Literal["auto", "varlen", "sdpa", "eager"] = "auto",
        bnb_4bit_use_double_quant: bool = False,
        allow_pickled_weights: bool = False,
        trust_remote_code: bool = False,
        router_aux_loss_coef: float | None = None,
        allow_another_base: bool = False,
        load_in_fp8: bool = False,
        offload_optimizer: bool = False,
        fp8_transpose_cache: bool = False,
    ) -> None:
        super().__init__()
        if router_aux_loss_coef is not None and router_aux_loss_coef < 0:
            raise ConfigurationError(f"model.router_aux_loss_coef must be at least 0, not {router_aux_loss_coef}.")
        self.save_hyperparameters(ignore=["adapter", "optimizer"])
        # Lightning warns whenever a data module is used with a module that has this hook; here that is by design.
        warnings.filterwarnings("ignore", message="You have overridden `on_(before|after)_batch_transfer`")
        self.adapter = adapter
        self.model_dir = model_dir
        self.lr = lr
        self._optimization = Optimization(
            optimizer, lr, (beta1, beta2), eps, schedule, warmup_steps, parameter_groups or {}, offload_optimizer
        )
        self._layers = CausalLMLayers(
            model_dir,
            dtype=getattr(torch, dtype),
            load_in_4bit=load_in_4bit,
            load_in_fp8=load_in_fp8,
            fp8_transpose_cache=fp8_transpose_cache,
            adapter=adapter,
            activation_memory=activation_memory,
            compile_layers=compile_layers,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            packed=packed,
            attn_implementation=attn_implementation,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            allow_pickled_weights=allow_pickled_weights,
            trust_remote_code=trust_remote_code,
            fuse_head=True,
            router_aux_loss_coef=router_aux_loss_coef,
        )
        if adapter.init_from is not None and not allow_another_base:
            refuse_another_base(Path(adapter.init_from), Path(model_dir))
        self._saving = Saving(self._layers, adapter)
        self._batch_form = BatchForm(
            *self._layers.vocabulary,
            keys=tuple(adapter.batch_keys),
            counts_padding=self._layers.router_loss is not None,
        )
        self._positions_on_host: Tensor | None = None  # of the next batch
        self._evaluation = Evaluation([])
        self._writer = GreedyWriter(
            Path(model_dir),
            tuple(adapter.batch_keys),
            trust_remote_code,
            embedded_positions(self._layers.meta_model.config),
        )

    def pipeline_layers(self) -> tuple[CausalLMLayers, Any]:
        """Return the layers for the strategy, and the loss on the last one's output."""
        router_loss = self._layers.router_loss
        return self._layers, CausalLMLoss(router_loss.coefficient if router_loss else 0.0)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        layers, loss = self.pipeline_layers()
        return [
            MemoryPlan(
                layers,
                loss,
                lambda parameters: self._optimization.factory(parameters, self.lr),
                choose=self.hparams["activation_memory"] == "auto",
                refuse=self.hparams["check_memory"],
            ),
            StepLog(layers, self._model_parameters, lambda: self._positions_on_host),
        ]

    @property
    def _pieces(self) -> list[Stage]:
        """This process's pieces of the model: one, unless there are virtual stages."""
        stage = self.pipeline_stage
        return [stage] if isinstance(stage, Stage) else [*stage]

    def _model_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this process's parameters, by the names that the model itself gives them."""
        return chain.from_iterable(piece.causal_lm.named_parameters() for piece in self._pieces)

    @property
    def optimizer_factory(self) -> OptimizerFactory:
        """The factory that makes the optimizer from parameters and a learning rate."""
        return self._optimization.factory

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Tensor]:
        # While the tensors are still on the host: on a GPU, inspecting documents and tokens would synchronise the host
        # in every micro-batch.
        completed = self._batch_form.complete(batch)
        positions = completed["position_ids"]
        self._positions_on_host = None if positions.is_cuda else positions
        if not positions.is_cuda:
            documents = count_documents(positions)
            for piece in self._pieces:
                piece.expect_documents(documents)
        return completed

    @override
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Any:
        if missing := [key for key in self.adapter.batch_keys if key not in batch]:
            raise ConfigurationError(
                f"{type(self.adapter).__name__} needs {missing[0]} in every batch; have the data module provide it."
            )
        return (
            (batch["input_ids"], batch["position_ids"], *(batch[key] for key in self.adapter.batch_keys)),
            batch["labels"],
        )

    @override
    def configure_optimizers(self) -> Any:
        optimizer, schedule = self._optimization.make(
            self.named_parameters(), self.lr, lambda: self.trainer.estimated_stepping_batches
        )
        optimizer.register_step_post_hook(self._after_step)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _after_step(self, *_: Any) -> None:
        for piece in self._pieces:
            self.adapter.after_step(piece.causal_lm)

    def save_trained(self, directory: Path) -> None:
        """Write the adapter (a PEFT directory) or the model (a Hugging Face directory). Collective.

        Args:
            directory: Replaced once the new one is complete.

        Raises:
            OSError: On every rank, if it cannot be written.
            RuntimeError: On every rank, if what was trained is not finite.
        """
        strategy = self.check_strategy(self.trainer.strategy)
        template = self._packed_data.own_template if self._packed_data else None
        self._saving.save(directory, self.pipeline_stage, self.trained_state(), strategy, template)

    def write_text(self, prompt: str, max_new_tokens: int) -> str:
        """Continue a prompt with the model as it is now, during a fit or an evaluation. Collective.

        Args:
            prompt: The beginning, the same on all ranks.
            max_new_tokens: Maximum number of tokens to write, each the most probable one.
        """
        return self._writer.write(prompt, max_new_tokens, self.check_strategy(self.trainer.strategy))

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: there are no weights before a stage is built, which happens within a Trainer."""
        raise ConfigurationError(
            f"{cls.__name__} cannot be loaded without a Trainer: create it as for training, and pass "
            f"{checkpoint_path} to Trainer.fit or validate as ckpt_path, or convert it with "
            f"`pipelite convert --checkpoint {checkpoint_path}` and load the result with transformers and PEFT."
        )

    def trained_state(self) -> dict[str, Tensor]:
        """Return this process's trained tensors, on the CPU, by their names in the saved file."""
        return dict(ChainMap(*map(self._layers.trained_state, self._pieces)))

    def checkpoint_identity(self) -> dict[str, Any]:
        """Return what a checkpoint must match to be resumed from: the base model, and what is trained of it.

        ``pipelite convert`` rebuilds the adapter from it: ``adapter`` has the class and its options.
        """
        return self._saving.identity(self.hparams)

    @property
    def checkpoint_may_differ(self) -> dict[str, tuple[bool, str]]:
        """The parts of the identity that may differ: whether that has been allowed, and by which option it is."""
        return {"base_model": (self.hparams["allow_another_base"], "model.allow_another_base")}

    def check_save(self, directory: Path) -> None:
        """Refuse now what ``save_trained(directory)`` would refuse at the end of training.

        Raises:
            ConfigurationError: ``directory`` cannot be written, or holds what saving would delete.
        """
        self._saving.rehearse(directory)

    @staticmethod
    def check_strategy(strategy: Strategy) -> PipeLiteStrategy:
        """Return the strategy if it is one that can train this module.

        Raises:
            ConfigurationError: It is another one.
        """
        if not isinstance(strategy, PipeLiteStrategy):
            raise ConfigurationError(
                f"PipeLiteModule requires PipeLiteStrategy, not {type(strategy).__name__}: set trainer.strategy to "
                "pipelite."
            )
        return strategy

    def check_data(self, data: Any) -> None:
        """Refuse data with tokens that the model does not have, now, before the weights are loaded.

        Args:
            data: Checked if it is a :class:`~lightning_pipelite.shared.protocol.ChecksVocabulary`, as PackedDataModule
                is; of other data, each batch is checked later.

        Raises:
            ConfigurationError: There is such a token.
        """
        if isinstance(data, ChecksVocabulary):
            data.check_vocabulary(min(self._layers.vocabulary))

    @override
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Refused while a Trainer sets up, before the stage is built: the caller would silently get no parameters.

        Raises:
            ConfigurationError: In that case; also from ``parameters()``, which calls this.
        """
        trainer = self._trainer
        if trainer is not None and trainer.state.status == TrainerStatus.RUNNING and not is_built(self):
            raise ConfigurationError(
                f"{type(self).__name__} has no parameters yet, as its stage is built after all setup() hooks: have the "
                "callback, logger or hook that needs them read them in on_fit_start, on_train_start or later."
            )
        return super().named_parameters(*args, **kwargs)

    @override
    def setup(self, stage: str) -> None:
        self.check_strategy(self.trainer.strategy)
        self.check_data(self._data_module)
        if told := self._layers.weights_told:
            rank_zero_info(told)
        if stage == "fit":
            warn_of_data(self._data_module, self._layers.meta_model.config, self.adapter)

    @override
    def on_train_start(self) -> None:
        self._optimization.warn_of_length(self.trainer.estimated_stepping_batches)

    @property
    def eval_micro_batches(self) -> int | None:
        """The number of micro-batches of an evaluation that run at once, if the data sets more than one."""
        at_once = self._packed_data.eval_gradient_accumulation_steps if self._packed_data else 1
        return at_once if at_once > 1 else None

    def log_evaluation(self, total: float, count: float, dataloader_idx: int) -> None:
        """Log the mean over all tokens of all evaluation sets, its exponential, and, of several sets, each one's mean.

        Args:
            total: The summed loss of an evaluation set.
            count: The number of tokens in it.
            dataloader_idx: Which set it is; they come in order.
        """
        if dataloader_idx == 0:
            packed = self._packed_data
            self._evaluation = Evaluation.of_run(self.trainer, packed.eval_names if packed else [])
        for name, value in self._evaluation.add(total, count).items():
            shown = name in ("eval/loss", "test/loss")
            self.log(name, value, batch_size=1, sync_dist=True, add_dataloader_idx=False, prog_bar=shown)

    def logs(self, name: str) -> bool:
        """Tell whether a metric of that name can come from this module, its strategy or this package's callbacks."""
        return is_logged(name)

    @property
    def _data_module(self) -> pl.LightningDataModule | None:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def _packed_data(self) -> PackedDataModule | None:
        return self._data_module if isinstance(self._data_module, PackedDataModule) else None

    # Lightning requires these; the strategy runs the layers itself

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("PipeLiteStrategy runs the layers itself.")

    validation_step = test_step = training_step
