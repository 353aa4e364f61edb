"""Low-rank adapters on the linear layers of the decoder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pipelite.adapters.base import Adapter
from lightning_pipelite.adapters.directory import whole_directory
from lightning_pipelite.adapters.selection import match_modules, parse_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.skeleton import Skeleton

ADAPTER = "default"
FILE_PREFIX = "base_model.model."
KNOWN_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoRA(Adapter):
    """Trains B·A beside each chosen weight W, with alpha = rank: y = W x + B A dropout(x).

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685). A [rank,
    in] starts uniform in ±1/sqrt(in) as PEFT's does, B [out, rank] at zero. The layers and the files are PEFT's.

    Args:
        rank: Rank of each adapter.
        dropout: Probability of dropout on the adapter's input.
        dtype: Type of the adapter's weights: "float32", "bfloat16" or "float16".
        target_modules: Linear layers of the decoder to adapt: "all-linear", a list of names such as "q_proj", or a
            regular expression for the full name.
        layers_to_transform: Decoder layers to adapt, such as "0:3, 7, 12:15" (ranges are inclusive) or a list of
            numbers; all by default.

    Raises:
        ConfigurationError: An option out of its range.
    """

    def __init__(
        self,
        rank: int,
        dropout: float = 0.0,
        dtype: str = "float32",
        target_modules: str | list[str] = "all-linear",
        layers_to_transform: str | list[int] | None = None,
    ) -> None:
        if rank < 1:
            raise ConfigurationError(f"rank is {rank}; set it to 1 or more.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigurationError(f"dropout is {dropout}; set it to at least 0 and less than 1.")
        if dtype not in DTYPES:
            raise ConfigurationError(f"dtype is {dtype!r}; set it to one of {', '.join(DTYPES)}.")
        self.rank = rank
        self.dropout = dropout
        self.dtype = dtype
        self.target_modules = target_modules
        self.layers_to_transform = layers_to_transform

    @override
    def check(self, skeleton: Skeleton, *, load_in_4bit: bool) -> None:
        self._targets(skeleton)

    @override
    def apply(self, model: PreTrainedModel, skeleton: Skeleton, seed: int) -> None:
        model.requires_grad_(False)
        owned = {name for name, module in model.named_modules() if hasattr(module, "in_features")}
        targets = [name for name in self._targets(skeleton) if name in owned]
        if not targets:
            return
        # On the meta device, as PEFT's own initial values would draw from the global random numbers in vain.
        inject_adapter_in_model(self._config(targets), model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        for name in targets:
            self._initialise(model.get_submodule(name), name, seed)

    @override
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {
            FILE_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }

    @override
    def save(self, directory: Path, states: Iterable[dict[str, Tensor]], model_dir: Path) -> None:
        with whole_directory(directory, KNOWN_FILES) as partial:
            weights = {name: tensor for state in states for name, tensor in state.items()}
            skeleton = Skeleton(model_dir)
            config = self._config(_shortest_targets(self._targets(skeleton), skeleton))
            config.task_type = "CAUSAL_LM"
            config.base_model_name_or_path = str(model_dir.absolute())
            config.inference_mode = True
            config.save_pretrained(str(partial))
            save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})

    def _config(self, targets: list[str]) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.rank, lora_dropout=self.dropout, target_modules=targets)

    def _targets(self, skeleton: Skeleton) -> list[str]:
        """Return the full names of the linear layers to adapt in the whole model."""
        modules = {name: module for name, module in skeleton.model.named_modules() if name}
        in_decoder = [n for n, m in modules.items() if isinstance(m, nn.Linear) and skeleton.layer_of(n) is not None]
        targets = in_decoder
        if self.target_modules != "all-linear":
            targets = match_modules(modules, self.target_modules)
            if others := [name for name in targets if name not in in_decoder]:
                kind = type(modules[others[0]]).__name__
                raise ConfigurationError(
                    f"target_modules matches {others[0]}, a {kind}; name Linear modules of decoder layers only."
                )
        layers = set(parse_layers(self.layers_to_transform, len(skeleton.layers)))
        chosen = [name for name in targets if skeleton.layer_of(name) in layers]
        if not chosen:
            raise ConfigurationError("target_modules matches no linear layer of layers_to_transform; widen either.")
        return chosen

    def _initialise(self, layer: LoraLayer, name: str, seed: int) -> None:
        """Set A and B to values that depend on ``seed`` and ``name`` alone, drawn on the CPU for every device."""
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        values = torch.empty(down.weight.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        device, dtype = layer.get_base_layer().weight.device, DTYPES[self.dtype]
        down.weight = nn.Parameter(values.to(device, dtype))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device, dtype=dtype))


def _shortest_targets(targets: list[str], skeleton: Skeleton) -> list[str]:
    """Return the last components of ``targets`` if they name the same modules, as people and other tools expect."""
    last = {name.rpartition(".")[2] for name in targets}
    matched = {name for name, _ in skeleton.model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if matched == set(targets) else targets
