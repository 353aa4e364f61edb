"""What was trained on its way to the disk, and what tells it from anything else."""

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
        layers: Of the model.
        adapter: What is trained of it.
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
        """Write it in the place of what is there, once it is complete. Collective.

        Args:
            directory: Where.
            stage: This rank's stage.
            trained: What was trained of it, on the CPU, by its names in the saved file.
            strategy: Brings the stages together.
            template: The chat template that a model is to go with, if it is not its tokenizer's.

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
            except Exception as error:  # whatever it is, as safetensors' own of a full disk: the job can still go on
                cause, failure = error, getattr(error, "strerror", None) or str(error) or type(error).__name__
                for _ in stages:  # the other stages wait to hand over theirs
                    pass
        if failure := strategy.broadcast(failure):
            raise OSError(f"{directory} cannot be written: {failure}") from cause

    def rehearse(self, directory: Path) -> None:
        """Refuse now what :meth:`save` would refuse at the end of training.

        Raises:
            ConfigurationError: If ``directory`` cannot be written, or holds what saving would delete.
        """
        layers = self._layers
        try:
            self._adapter.rehearse_save(directory, layers.meta_model)
            for number in {0, len(layers) - 1}:  # without values; the ends have more than the layers between
                layers.trained_state(layers.build_stage(number, number + 1, torch.device("meta")))
        except OSError as error:
            raise ConfigurationError(
                f"{directory} cannot be written ({error.strerror or error}); choose another place to save to."
            ) from error

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint must agree in: the base model, and what is trained of it.

        Args:
            options: Of the module.
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
                    if name != "init_from"  # where values started, which a checkpoint has gone on from
                },
            },
            "dtype": options["dtype"],
            "load_in_4bit": options["load_in_4bit"],
            # The frozen weights are others with it; said only where it is used, as older checkpoints do not say it.
            **({"bnb_4bit_use_double_quant": True} if doubly else {}),
            **({"load_in_fp8": True} if options["load_in_fp8"] else {}),
        }
