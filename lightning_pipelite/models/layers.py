"""A causal LM on disk as the layers of a pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.checkpoint import check_weights
from lightning_pipelite.models.loading import load_trimmed
from lightning_pipelite.models.skeleton import Skeleton
from lightning_pipelite.models.stage import Stage

if TYPE_CHECKING:
    from lightning_pipelite.adapters import Adapter


class CausalLMLayers:
    """A Hugging Face causal LM whose decoder layers can be dealt out to pipeline stages.

    Everything that can be told from configuration and file headers is checked here, before any weight is read.

    Args:
        model_dir: Directory with ``config.json`` and safetensors weights.
        dtype: Type of the weights (other than 4-bit ones) and of the computation.
        load_in_4bit: Hold the linear layers of the decoder in nf4; embedding and head keep ``dtype``.
        adapter: What is trained.
        activation_memory: ``"recompute"`` keeps each decoder layer's input and runs the layer again in the backward
            pass (activation checkpointing); ``"keep"`` keeps all activations.
        seed: Seed of the adapter's initial values, which do not depend on the partition.

    Attributes:
        names: Class name of each decoder layer, in order.
        skeleton: The whole model on the meta device.

    Raises:
        ConfigurationError: The model is missing, damaged, not a causal LM or cannot be split, or the adapter does not
            fit it.

    Example::

        layers = CausalLMLayers("Llama-3.1-8B", adapter=LoRA(rank=16))
        first = layers.build_stage(0, 16, torch.device("cuda:0"))
        last = layers.build_stage(16, 32, torch.device("cuda:1"))
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        load_in_4bit: bool = False,
        adapter: Adapter,
        activation_memory: Literal["keep", "recompute"] = "recompute",
        seed: int = 0,
    ) -> None:
        if activation_memory not in ("keep", "recompute"):
            raise ConfigurationError(f'activation_memory is {activation_memory!r}; set it to "keep" or "recompute".')
        self.skeleton = Skeleton(model_dir)
        if (self.skeleton.model_dir / "adapter_config.json").exists():  # from_pretrained would quietly load it as well
            raise ConfigurationError(
                f"{model_dir} also holds an adapter_config.json; merge that adapter or move it away."
            )
        check_weights(self.skeleton.model_dir)
        if load_in_4bit:
            self._check_quantisable()
        adapter.check(self.skeleton, load_in_4bit=load_in_4bit)
        self.adapter = adapter
        self.dtype = dtype
        self.load_in_4bit = load_in_4bit
        self.activation_memory = activation_memory
        self.seed = seed
        self.names = [type(layer).__name__ for layer in self.skeleton.layers]

    def __len__(self) -> int:
        """Return the number of decoder layers."""
        return len(self.names)

    def parameter_counts(self) -> list[int]:
        """Return the number of parameters (frozen ones too, 4-bit ones as one each) that come with each decoder layer.

        The embedding is counted in the first layer, final norm and head in the last; a weight that ties embedding and
        head is counted in both, as both stages hold it.
        """
        counts = [sum(p.numel() for p in layer.parameters()) for layer in self.skeleton.layers]
        counts[0] += self._own_parameters(self.skeleton.embedding_name)
        counts[-1] += sum(map(self._own_parameters, self.skeleton.tail_names))
        return counts

    def build_stage(self, start: int, stop: int, device: torch.device) -> Stage:
        """Load decoder layers [start, stop) to ``device``, adapt them and return them as a stage, in training mode.

        The first stage has the embedding, the last the final norm and the head. ``Stage.named_parameters()`` gives
        each parameter the same name in every partition, and a weight that ties embedding and head one name on both
        stages.

        Raises:
            ConfigurationError: A weight of the stage is missing from the files or has another shape there.
            ValueError: ``start`` and ``stop`` are no range of decoder layers.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"decoder layers [{start}, {stop}) are no range of {len(self)} layers")
        model = load_trimmed(
            self.skeleton, start, stop, dtype=self.dtype, device=device, load_in_4bit=self.load_in_4bit
        )
        self.adapter.apply(model, self.skeleton, self.seed)
        if self.activation_memory == "recompute":
            # Not gradient_checkpointing_enable: that also makes the embedding's output require grad, which only
            # reentrant checkpoints need and which sends gradients below the lowest trained weight.
            model._set_gradient_checkpointing(
                enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
            )
        return Stage(model, self.skeleton.layers_name, start, stop).train()

    def trained_state(self, stage: Stage) -> dict[str, Tensor]:
        """Return what ``adapter.save`` wants of ``stage``: tensors on the CPU by their names in the saved file."""
        return self.adapter.state_dict(stage.causal_lm)

    def _own_parameters(self, module_name: str) -> int:
        return sum(p.numel() for p in self.skeleton.model.get_submodule(module_name).parameters(recurse=False))

    def _check_quantisable(self) -> None:
        for name, parameter in self.skeleton.model.named_parameters():
            # bitsandbytes replaces Linear modules only: fused experts would silently stay in full precision.
            if parameter.ndim > 2 and self.skeleton.layer_of(name) is not None:
                raise ConfigurationError(
                    f"load_in_4bit cannot quantise weights such as {name} of {self.skeleton.model_dir}, which is no "
                    "Linear layer's; set load_in_4bit to false."
                )
