"""Writes what was trained to disk, and identifies it in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.adapters import Adapter, Full
from lightning_pipelite.data.templates import write_template
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.shared.finite import refuse_not_finite
from lightning_pipelite.shared.over_ranks import gathered
from lightning_pipelite.strategy import PipeLiteStrategy


class Saving:
    """Writes an adapter (a PEFT directory) or a model (a Hugging Face directory).

    Args:
        layers: The model's layers.
        adapter: What is trained of them.
    """

    def __init__(self, layers: CausalLMLayers, adapter: Adapter) -> None:
        self._layers, self._adapter = layers, adapter

    def save(
        self,
        directory: Path,
        stage: nn.Module,
        trained: dict[str, Tensor],
        strategy: PipeLiteStrategy,
        template: str | None = None,
    ) -> None:
        """Write what was trained, replacing what is there once it is complete. Collective.

        Args:
            directory: Where to write.
            stage: This rank's stage.
            trained: The stage's trained tensors, on the CPU, by their names in the saved file.
            strategy: Collects the stages.
            template: The chat template to save with a model, if it is not its tokenizer's.

        Raises:
            OSError: On every rank, if it cannot be written.
            RuntimeError: On every rank, if what was trained is not finite.
        """
        parameters = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        refuse_not_finite(str(directory), parameters, strategy.topology, gathered)
        stages = strategy.collect_stages(trained)
        failure, cause = None, None
        if strategy.is_global_zero:
            try:
                self._adapter.save(directory, stages, self._layers.meta_model)
                if template is not None and isinstance(self._adapter, Full):
                    write_template(directory, template)
            except Exception as error:  # of any kind, such as safetensors' own for a full disk: the job can go on
                cause, failure = error, getattr(error, "strerror", None) or str(error) or type(error).__name__
                for _ in stages:  # the other stages are waiting to send theirs
                    pass
        if failure := strategy.broadcast(failure):
            raise OSError(f"{directory} cannot be written: {failure}") from cause

    def rehearse(self, directory: Path) -> None:
        """Refuse now what :meth:`save` would refuse at the end of training.

        Raises:
            ConfigurationError: ``directory`` cannot be written, or holds what saving would delete.
        """
        layers = self._layers
        try:
            self._adapter.rehearse_save(directory, layers.meta_model)
            for number in {0, len(layers) - 1}:  # without values; the two ends hold more than a decoder layer
                layers.trained_state(layers.build_stage(number, number + 1, torch.device("meta")))
        except OSError as error:
            raise ConfigurationError(
                f"{directory} cannot be written ({error.strerror or error}); choose another place to save to."
            ) from error

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint must match: the base model, and what is trained of it.

        Args:
            options: The module's options.
        """
        kind = type(self._adapter)
        doubly = options["load_in_4bit"] and options["bnb_4bit_use_double_quant"]
        return {
            "base_model": self._layers.meta_model.fingerprint,
            "adapter": {
                "class_path": f"{kind.__module__}.{kind.__qualname__}",
                "init_args": {
                    name: getattr(self._adapter, name)
                    for name in inspect.signature(kind).parameters
                    if name != "init_from"  # only where values started; a checkpoint has later ones
                },
            },
            "dtype": options["dtype"],
            "load_in_4bit": options["load_in_4bit"],
            # Double quantisation changes the frozen weights; named only where used, as older checkpoints lack the key.
            **({"bnb_4bit_use_double_quant": True} if doubly else {}),
            **({"load_in_fp8": True} if options["load_in_fp8"] else {}),
        }
