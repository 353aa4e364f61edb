"""Low-rank adapters on the linear layers and the experts of the decoder."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pipelite.adapters.base import Adapter, to_cpu
from lightning_pipelite.adapters.directory import whole_directory
from lightning_pipelite.adapters.experts import fuse_experts, wrap_experts
from lightning_pipelite.adapters.fused_lora import fuse
from lightning_pipelite.adapters.lora_start import LoRAStart
from lightning_pipelite.adapters.lora_targets import ADAPTER, check_peft_loads, is_transposed, lora_targets, shortest
from lightning_pipelite.adapters.low_rank import (
    DTYPES,
    FILE_PREFIX,
    generator_of,
    named_as_whole,
)
from lightning_pipelite.adapters.option_ranges import KNOWN_FILES, check_options
from lightning_pipelite.adapters.token_rows import (
    IN_FILE,
    Rows,
    check_computation,
    check_numbers,
    check_places,
    for_peft,
    hold_rows,
    rows_by_module,
)
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.fingerprint import record_base
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.rows_apart import ROWS


class LoRA(Adapter):
    """Trains B·A beside each chosen weight W, with alpha = rank: y = W x + B A dropout(x).

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685). A [rank,
    in] starts uniform in ±1/sqrt(in), as in PEFT, and B [out, rank] at zero. The layers and the files are PEFT's.

    Args:
        rank: Rank of each adapter.
        dropout: Probability of dropout on the adapter's input.
        dtype: Dtype of the adapter's weights: "float32", "bfloat16" or "float16".
        target_modules: Linear layers of the decoder to adapt: "all-linear", a list of names such as "q_proj", or a
            regular expression for the full name. The experts of a MoE model, fused into parameters such as
            "mlp.experts.down_proj", count as linear layers; each expert gets an A and B of its own.
        layers_to_transform: Decoder layers to adapt, such as "0:3, 7, 12:15" (ranges are inclusive) or a list of
            numbers; all by default.
        use_rslora: Scale B·A by sqrt(rank) (https://arxiv.org/abs/2312.03732).
        use_dora: Train the magnitude of W + B·A separately from its direction (https://arxiv.org/abs/2402.09353).
        init_lora_weights: "default"; "gaussian", with A normal of standard deviation 1/rank; "pissa", with A and B from
            the largest singular values of W, which keeps the rest (https://arxiv.org/abs/2404.02948); or
            "pissa_niter_N", the same by N iterations of a randomised decomposition. PiSSA is saved as a LoRA of twice
            the rank on the unchanged W.
        init_from: A PEFT directory of a LoRA to start from instead, with this rank, these targets and these layers; its
            alpha is multiplied into B. A resumed training continues from its checkpoint.
        trainable_token_indices: Numbers of tokens, such as those added to a tokenizer, whose rows of the embedding and
            the head are trained too; give them by module, such as ``{"embed_tokens": [128002]}``, to train those of
            only one of the two.

    Raises:
        ConfigurationError: An option is out of range, or two are incompatible.
    """

    def __init__(
        self,
        rank: int,
        dropout: float = 0.0,
        dtype: str = "float32",
        target_modules: str | list[str] = "all-linear",
        layers_to_transform: str | list[int] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: str = "default",
        init_from: str | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
    ) -> None:
        check_options(rank, dropout, dtype)
        if not re.fullmatch(r"default|gaussian|pissa|pissa_niter_[1-9]\d*", init_lora_weights):
            raise ConfigurationError(
                f"init_lora_weights is {init_lora_weights!r}; set it to default, gaussian, pissa or pissa_niter_N."
            )
        self.rank = rank
        self.dropout = dropout
        self.dtype = dtype
        self.target_modules = target_modules
        self.layers_to_transform = layers_to_transform
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.init_lora_weights = init_lora_weights
        self.init_from = init_from
        self.trainable_token_indices: Rows | None = trainable_token_indices
        if trainable_token_indices is not None:
            check_numbers(trainable_token_indices)
        if init_from is not None and init_lora_weights != "default":
            raise ConfigurationError(
                f"init_from and init_lora_weights {init_lora_weights} both set the initial A and B; leave one out."
            )
        if self._pissa and (use_rslora or use_dora):
            raise ConfigurationError(
                "init_lora_weights pissa works with plain LoRA only; set use_rslora and use_dora to false."
            )

    @property
    def _pissa(self) -> bool:
        return self.init_lora_weights.startswith("pissa")

    @property
    @override
    def changes_weights(self) -> str:
        return f"init_lora_weights {self.init_lora_weights}" if self._pissa else ""

    @property
    @override
    def trained_tokens(self) -> set[int]:
        rows = self.trainable_token_indices or []
        return {*chain(*rows.values())} if isinstance(rows, dict) else {*rows}

    @override
    def check(self, meta_model: MetaModel, *, load_in_4bit: bool) -> None:
        linear, fused = self._targets(meta_model)
        if self._pissa and load_in_4bit:
            raise ConfigurationError(
                "init_lora_weights pissa changes the base's weights, which load_in_4bit does not allow; leave one out."
            )
        if self._pissa and (small := [n for n in linear if min(_shape(meta_model, n)) < self.rank]):
            raise ConfigurationError(
                f"rank is {self.rank}, but {small[0]}, which init_lora_weights pissa decomposes, has only "
                f"{min(_shape(meta_model, small[0]))} singular values; lower rank."
            )
        for name, option in (("dropout", self.dropout), ("use_dora", self.use_dora), ("pissa", self._pissa)):
            if fused and option:
                raise ConfigurationError(
                    f"{name} does not work on fused experts such as {fused[0]}; leave it out, or choose "
                    "other target_modules."
                )
        rows = self._rows(meta_model)
        if rows:
            check_computation(rows, meta_model)
        loaded = check_peft_loads(self._saved_config(meta_model), meta_model, {*linear, *fused})
        check_places(loaded, rows, meta_model)
        if self.init_from is not None:
            self._start(meta_model)

    @override
    def apply(self, model: PreTrainedModel, meta_model: MetaModel, seed: int) -> None:
        model.requires_grad_(False)
        linear, experts = self._wrap(model, meta_model)
        for name, layer in [*linear.items(), *experts]:
            self._initialise(layer, name, seed)
        hold_rows(model, self._rows(meta_model), meta_model, DTYPES[self.dtype])
        if self.init_from is not None and not next(model.parameters()).is_meta:
            start = self._start(meta_model)
            for name, parameter in _adapting(model).items():
                if name in start.tensors:
                    parameter.data.copy_(start.tensors[name])
        fuse(linear, ADAPTER, meta_model.shared_inputs)
        fuse_experts(model, ADAPTER)

    def _wrap(self, model: PreTrainedModel, meta_model: MetaModel) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """Put PEFT's layers, still without values, into ``model``; return those of linear layers, and of experts."""
        linear, fused = self._targets(meta_model)
        owned = dict(model.named_modules())
        linear = [name for name in linear if name in owned]
        fused = [name for name in fused if name.rpartition(".")[0] in owned]
        if linear:
            # On the meta device, as PEFT's own initialisation would consume global random numbers for nothing.
            # Into the list of layers: in a whole model of some types, PEFT takes gate_proj and the like for experts'.
            prefix = meta_model.layers_name + "."
            config = self._config([name.removeprefix(prefix) for name in linear])
            config.fan_in_fan_out = is_transposed(model, linear)
            inject_adapter_in_model(config, owned[meta_model.layers_name], adapter_name=ADAPTER, low_cpu_mem_usage=True)
        experts = []
        for name in fused:
            module, _, parameter = name.rpartition(".")
            experts.append((name, wrap_experts(model, module, parameter, self._config([]), ADAPTER)))
        return {name: model.get_submodule(name) for name in linear}, experts

    def _start(self, meta_model: MetaModel) -> LoRAStart:
        assert self.init_from is not None
        whole = copy.deepcopy(meta_model.model)
        self._wrap(whole, meta_model)
        hold_rows(whole, self._rows(meta_model), meta_model, DTYPES[self.dtype])
        shapes = {name: parameter.shape for name, parameter in _adapting(whole).items()}
        return LoRAStart(Path(self.init_from), meta_model, shapes, self._config([]), self._rows(meta_model))

    @override
    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        state = {FILE_PREFIX + name: to_cpu(parameter) for name, parameter in _adapting(model).items()}
        for name, layer in model.named_modules():
            # W - B₀A₀ is frozen, but the file is for W: BA - B₀A₀ is a product of twice the rank.
            if (start := getattr(layer, "pissa_start", None)) is not None:
                a, b = (f"{FILE_PREFIX}{name}.lora_{letter}.weight" for letter in "AB")
                state[a] = torch.cat([state[a], start[0].to(state[a])])
                state[b] = torch.cat([state[b], -start[1].to(state[b])], dim=1)
        return state

    @override
    def place(self, directory: Path, meta_model: MetaModel) -> AbstractContextManager[Path]:
        return whole_directory(directory, KNOWN_FILES)

    @override
    def write(self, directory: Path, states: Iterable[dict[str, Tensor]], meta_model: MetaModel) -> None:
        config = self._saved_config(meta_model)
        config.task_type = "CAUSAL_LM"
        config.base_model_name_or_path = str(meta_model.model_dir.absolute())
        config.inference_mode = True
        config.save_pretrained(str(directory))
        weights = named_as_whole(states, meta_model)
        if self._pissa and any(t.shape[0] != config.r for n, t in weights.items() if n.endswith("lora_A.weight")):
            raise ValueError("these are not the tensors that state_dict() returns with init_lora_weights pissa")
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        record_base(directory, meta_model.fingerprint)

    def _config(self, targets: list[str]) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def _saved_config(self, meta_model: MetaModel) -> LoraConfig:
        linear, fused = self._targets(meta_model)
        whole, transposed = meta_model.whole, is_transposed(meta_model.model, linear)
        linear, fused = ([whole.name(name) for name in names] for names in (linear, fused))
        config = self._config(shortest(linear, [name for name, _ in whole.model.named_modules()], 1))
        config.fan_in_fan_out = transposed
        if fused:
            config.target_parameters = shortest(fused, [name for name, _ in whole.model.named_parameters()], 3)
        if self._pissa:
            config.r = config.lora_alpha = 2 * self.rank
        if rows := self._rows(meta_model):
            config.trainable_token_indices = for_peft(rows, meta_model)
        return config

    def _rows(self, meta_model: MetaModel) -> dict[str, list[int]]:
        """Return the tokens whose rows are trained, by the names of embedding and head."""
        rows = self.trainable_token_indices
        return {} if rows is None else rows_by_module(rows, meta_model)

    def _targets(self, meta_model: MetaModel) -> tuple[list[str], list[str]]:
        return lora_targets(meta_model, self.target_modules, self.layers_to_transform)

    def _initialise(self, layer: Any, name: str, seed: int) -> None:
        """Set A and B to values that depend only on ``seed`` and ``name``, drawn on the CPU whatever the device."""
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        device, dtype = next(layer.get_base_layer().parameters()).device, DTYPES[self.dtype]
        generator = generator_of(seed, name)
        a = torch.empty(down.weight.shape, dtype=torch.float32, device="cpu")
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(up.weight.shape, dtype=torch.float32, device="cpu")
        down.weight, up.weight = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        if self._pissa and device.type != "meta":  # a plan has no weights to decompose
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # pissa_niter uses the global RNG
                torch.manual_seed(generator.initial_seed())
                layer.pissa_init(ADAPTER, self.init_lora_weights)
            layer.pissa_start = (down.weight.detach().cpu().clone(), up.weight.detach().cpu().clone())
        if self.use_dora:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=down.weight,
                lora_B=up.weight,
                scaling=layer.scaling[ADAPTER],
            )
            magnitude.weight = nn.Parameter(magnitude.weight.detach().to(dtype))
        down.weight, up.weight = (nn.Parameter(each.weight.detach().to(dtype)) for each in (down, up))


def _adapting(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by PEFT's names in a file, without its prefix."""
    return {_name_in_file(name): each for name, each in model.named_parameters() if _is_trained(name)}


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name.endswith(f".{ROWS}")


def _name_in_file(name: str) -> str:
    """Name a parameter as PEFT's files do: no adapter name, DoRA's magnitude as no module's, rows as a submodule's."""
    if name.endswith(f".{ROWS}"):
        return f"{name.removesuffix(ROWS)}{IN_FILE}"
    magnitude = f".lora_magnitude_vector.{ADAPTER}.weight"
    return name.replace(magnitude, ".lora_magnitude_vector").replace(f".{ADAPTER}.", ".")


def _shape(meta_model: MetaModel, name: str) -> torch.Size:
    return meta_model.model.get_submodule(name).weight.shape
