"""The LightningModule that puts a causal LM, its adapter, its loss and its optimizer together."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from optimi import Adam
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.adapters import Adapter
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers, Stage
from lightning_pipelite.models.fingerprint import fingerprint
from lightning_pipelite.optim import rms_ratio_schedule
from lightning_pipelite.strategy import PipeLiteStrategy


class PipeLiteModule(pl.LightningModule):
    """Fine-tunes a Hugging Face causal LM under :class:`~lightning_pipelite.strategy.PipeLiteStrategy`.

    Batches are dicts of int64 tensors of shape (batch, sequence): ``input_ids``; ``position_ids``, which restart at
    every document so that attention stays within it; and ``labels``, already shifted, -100 where there is nothing to
    learn.

    Args:
        model_dir: a local Hugging Face directory: config.json, safetensors, tokenizer.
        adapter: what is trained: LoRA or Full.
        load_in_4bit: keep the frozen weights of linear layers in 4 bits (nf4, bitsandbytes).
        lr: the learning rate, approached by the RMS-ratio schedule.
        beta1: Adam's decay rate of the first moment.
        beta2: Adam's decay rate of the second moment, also that of the schedule.
        eps: Adam's epsilon.
        dtype: the dtype of the base model's weights and of the hidden states.
        activation_memory: keep all activations of a micro-batch until its backward pass, or recompute each layer's
            then from its input.

    Raises:
        ConfigurationError: if a value is out of range, or the model or the adapter cannot be had.
    """

    pipeline_stage: Stage  # put here by the strategy

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
        activation_memory: Literal["keep", "recompute"] = "recompute",
    ) -> None:
        super().__init__()
        for name, value, low, high in (("beta1", beta1, 0, 1), ("beta2", beta2, 0, 1), ("lr", lr, 0, 1e3)):
            if not low <= value < high or (name == "beta2" and value == 0):
                raise ConfigurationError(f"model.{name} must be at least {low} and less than {high:g}, not {value}.")
        if eps <= 0:
            raise ConfigurationError(f"model.eps must be positive, not {eps}.")
        self.save_hyperparameters(ignore=["adapter"])
        # Lightning warns whenever a data module is used with a module that has this hook; here that is the design.
        warnings.filterwarnings("ignore", message="You have overridden `on_after_batch_transfer`")
        self.adapter = adapter
        self.model_dir = model_dir
        self.lr, self.betas, self.eps = lr, (beta1, beta2), eps
        self._layers = CausalLMLayers(
            model_dir,
            dtype=getattr(torch, dtype),
            load_in_4bit=load_in_4bit,
            adapter=adapter,
            activation_memory=activation_memory,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        )
        self._tokens = 0
        self._step_began = 0.0

    def pipeline_layers(self) -> tuple[CausalLMLayers, Any]:
        return self._layers, cross_entropy_terms

    @override
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Any:
        return (batch["input_ids"], batch["position_ids"]), batch["labels"]

    @override
    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        # A stage may have nothing to train; torch refuses [], but not an empty group.
        optimizer = Adam([{"params": trained}], lr=self.lr, betas=self.betas, eps=self.eps)
        scheduler = rms_ratio_schedule(optimizer, self.betas[1])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def save_trained(self, directory: Path) -> None:
        """Write the adapter (a PEFT directory) or the model (a Hugging Face directory). Collective.

        Args:
            directory: replaced once the new one is complete.

        Raises:
            OSError: on every rank, if it cannot be written.
        """
        strategy = self.check_strategy(self.trainer.strategy)
        stages = strategy.collect_stages(self._layers.trained_state(self.pipeline_stage))
        failure: str | None = None
        if strategy.is_global_zero:
            try:
                self.adapter.save(directory, stages, Path(self.model_dir))
            except OSError as error:
                failure = error.strerror or str(error)
                for _ in stages:  # the other stages wait to hand over theirs
                    pass
        if failure := strategy.broadcast(failure):
            raise OSError(f"{directory} cannot be written: {failure}")

    def checkpoint_identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in to be resumed from: the base model, and what is trained of it.

        ``pipelite convert`` makes the adapter anew from it: ``adapter`` has the class and its options.
        """
        kind = type(self.adapter)
        options = {name: getattr(self.adapter, name) for name in inspect.signature(kind).parameters}
        return {
            "base_model": fingerprint(Path(self.model_dir)),
            "adapter": {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": options},
            "dtype": self.hparams["dtype"],
            "load_in_4bit": self.hparams["load_in_4bit"],
        }

    def check_save(self, directory: Path) -> None:
        """Refuse now what ``save_trained(directory)`` would refuse at the end of training.

        Raises:
            ConfigurationError: if ``directory`` cannot be written, or holds what saving would delete.
        """

        def rehearsal() -> Iterator[dict[str, Tensor]]:
            raise _EnoughError
            yield

        try:  # the adapter does all that it does to save, up to the first tensor, and puts everything back
            self.adapter.save(directory, rehearsal(), Path(self.model_dir))
        except _EnoughError:
            pass
        except OSError as error:
            raise ConfigurationError(
                f"{directory} cannot be written ({error.strerror or error}); choose another place to save to."
            ) from error

    @staticmethod
    def check_strategy(strategy: Strategy) -> PipeLiteStrategy:
        """Return the strategy if it is one that can train this module.

        Raises:
            ConfigurationError: if it is another one.
        """
        if not isinstance(strategy, PipeLiteStrategy):
            raise ConfigurationError(
                f"PipeLiteModule trains under PipeLiteStrategy, not {type(strategy).__name__}: set trainer.strategy to "
                "pipelite."
            )
        return strategy

    @override
    def setup(self, stage: str) -> None:
        self.check_strategy(self.trainer.strategy)

    # What is logged beside the strategy's losses and norms

    @override
    def on_fit_start(self) -> None:
        for layer in self.pipeline_stage.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                # On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for good, into a form whose
                # product has no backward: from then on most gradients would be wrong, with no more than a warning.
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        evaluated_at_once = getattr(getattr(self.trainer, "datamodule", None), "eval_gradient_accumulation_steps", 1)
        if evaluated_at_once > 1 and isinstance(self.trainer.strategy, PipeLiteStrategy):
            self.trainer.strategy.eval_micro_batches = evaluated_at_once

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._tokens == 0:
            self._step_began = time.perf_counter()
        self._tokens += batch[1].numel()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        replicas = self.trainer.strategy.distributed_sampler_kwargs["num_replicas"]  # type: ignore[attr-defined]
        tokens_per_s = self._tokens * replicas / (time.perf_counter() - self._step_began)
        self.log("train/tokens_per_s", tokens_per_s, prog_bar=True)
        self._tokens = 0

    # Lightning asks for these; the strategy runs the layers itself

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("PipeLiteStrategy runs the layers itself.")

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.training_step()


class _EnoughError(Exception):
    """Ends the rehearsal of saving."""


def cross_entropy_terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of a micro-batch, in float32, and the number of tokens in it.

    Args:
        logits: (batch, sequence, vocabulary), any floating dtype.
        labels: (batch, sequence), int64; the token to predict at each position, or -100.
    """
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, (labels != -100).sum()
