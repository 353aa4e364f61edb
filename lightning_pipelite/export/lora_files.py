"""A saved LoRA on its base model, with PEFT's own code for what it does to each weight."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.adapters.lora_kinds import check_tensors, read_lora_config
from lightning_pipelite.adapters.peft_compat import adapter_stays, expert_factors, is_swapped
from lightning_pipelite.adapters.weight_file import read_tensors
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.base import BaseModel

ADAPTER = "default"
PREFIX = "base_model.model."
WRAPPING = re.compile(r"\.(base_layer|token_adapter|modules_to_save\.default)\b")


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to one parameter W: ``scaling * B @ A``.

    Attributes:
        a: [rank, in], or [experts, rank, in] for fused experts, float32.
        b: [out, rank] or [experts, out, rank], float32.
        scaling: Factor of the product.
        transposed: Whether W is stored as [..., in, out].
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool


class LoRAOfBase:
    """A saved LoRA on a base model on the meta device: PEFT places it, reads it, and merges it one weight at a time.

    Args:
        base: The model that it was trained on.
        directory: PEFT directory of the adapter.
        scale: Factor applied to what it adds.
        device: Where it is held and merged.
        invoked: Whether to accept an activated LoRA (aLoRA), which takes effect only from certain tokens on.

    Attributes:
        config: PEFT's configuration.
        changed: Names of the base's parameters that it changes.
        sets: Those of them whose values it replaces, wholly or in part.

    Raises:
        ConfigurationError: The directory is not a LoRA, does not fit the base, or one of its weights would go unused.
    """

    def __init__(
        self,
        base: BaseModel,
        directory: str | Path,
        scale: float = 1.0,
        device: str | torch.device = "cpu",
        *,
        invoked: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.config = read_lora_config(self.directory, invoked=invoked)
        tensors = read_tensors(self.directory)
        check_tensors(self.config, tensors, self.directory)
        names = [name.removeprefix(PREFIX) for name in tensors]
        # Older adapters of this project use the text model's names, those of PEFT the whole model's.
        whole = base.whole_of(names)
        self._model = self._place(base.meta_model() if whole is None else whole.copy(), base, device)
        self._layers: dict[str, LoraLayer] = {}
        self._biases: dict[str, LoraLayer] = {}
        self._replaced: dict[str, Tensor] = {}
        rows: dict[str, Any] = {}
        for name, module in self._model.get_base_model().named_modules():
            plain = WRAPPING.sub("", name)
            plain = plain if whole is None else whole.own_name(plain) or plain
            if isinstance(module, LoraLayer) and ADAPTER in [*module.lora_A, *module.lora_embedding_A]:
                self._check_variant(module)
                module.scaling[ADAPTER] *= scale
                self._layers[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"] = module
                if module.lora_bias.get(ADAPTER):
                    self._biases[f"{plain}.bias"] = module
            elif isinstance(module, TrainableTokensWrapper):
                rows[f"{plain}.weight"] = module.token_adapter
            elif name.endswith(".token_adapter.trainable_tokens_delta"):
                continue
            elif ".modules_to_save.default" in name or not isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
                inside = ".lora_" in name
                for parameter, value in module.named_parameters(recurse=False):
                    if value.device.type != "meta" and not inside:
                        self._replaced[f"{plain}.{parameter}"] = value.detach()
        for name, value in list(self._replaced.items()):  # PEFT also saves an adapted embedding's unchanged weight
            if name in base.groups and torch.equal(value.cpu(), base.read_parameter(name)):
                del self._replaced[name]
        shared = _shared_rows(rows, getattr(base.model, "all_tied_weights_keys", {}))
        # The files usually hold only one of two tied weights.
        self._rows = {name: _rows(each) for name, each in rows.items() if name not in shared or name in base.groups}
        self.sets = {*self._replaced, *self._rows}
        self.changed = {*self._layers, *self._biases, *self.sets}
        if not self.changed:
            raise ConfigurationError(f"{directory} changes no weight of {base.directory}; give the adapter's base.")
        if both := sorted(self._rows.keys() & {*self._layers, *self._replaced}):
            raise ConfigurationError(
                f"{directory} changes both {both[0]} as a whole and rows of it; choose another adapter."
            )
        if scale != 1.0 and (self.config.use_dora or self.sets):
            what = "whole weights (modules_to_save or bias)" if self._replaced else "rows of tokens"
            what = "a DoRA" if self.config.use_dora else f"an adapter with {what}"
            raise ConfigurationError(f"{directory} is {what}, which cannot be scaled; leave scale at 1.")
        for name in self.changed:
            if name not in base.shapes:
                raise ConfigurationError(
                    f"{directory} changes {name}, which is not part of the text model of {base.directory}; give "
                    "an adapter of the text model only."
                )
            group = base.group_of(name)
            if name in self._replaced and tuple(self._replaced[name].shape) != base.shapes[name]:
                raise ConfigurationError(
                    f"{directory} holds {name} with shape {list(self._replaced[name].shape)}, but {base.directory} has "
                    f"{list(base.shapes[name])}; give the adapter's base."
                )
            if name in self._rows:
                self._check_rows(name, base)
            if base.model.get_input_embeddings() is base.model.get_output_embeddings():
                raise ConfigurationError(
                    f"{base.directory} has one module as both embedding and head, which is not supported."
                )
            tied = getattr(base.model, "all_tied_weights_keys", {})
            is_tied = any(other in {*tied, *tied.values()} for other in group.parameters)
            if is_tied and name not in shared and base.config.tie_word_embeddings:
                raise ConfigurationError(
                    f"{directory} changes {name}, which {base.directory} ties to another weight; use a base whose "
                    "weights are not tied."
                )

    def products(self) -> Iterator[tuple[str, Factors]]:
        """Yield the name of each parameter that a product B·A is added to, with its factors, in the model's order."""
        for name, layer in self._layers.items():
            yield name, _factors(layer)

    def factors(self) -> Iterator[tuple[str, Factors]]:
        """Yield what :meth:`products` yields, provided that the adapter does nothing else.

        Raises:
            ConfigurationError: The adapter does more than add products of factors.
        """
        if self.config.use_dora or self.sets or self._biases:
            what = "a DoRA" if self.config.use_dora else "an adapter that does more than add products B·A"
            raise ConfigurationError(
                f"{self.directory} is {what}, which cannot be expressed as factors A and B; merge it into its base "
                "(pipelite merge) instead."
            )
        yield from self.products()

    def apply(self, name: str, value: Tensor) -> Tensor:
        """Return the parameter ``name`` with the adapter merged into it.

        Args:
            name: One of the base's parameters.
            value: Its value, in float32; may be changed in place.

        Raises:
            ConfigurationError: The result is not finite.
        """
        if name in self._replaced:
            value = self._replaced[name].to(value)
        if name in self._rows:
            numbers, values = self._rows[name]
            value[numbers] = values.to(value)
        if name in self._biases:
            layer = self._biases[name]
            value = value + layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].bias.detach().to(value)
        if name in self._layers:
            value = self._merge(self._layers[name], name.rpartition(".")[2], value)
        if not torch.isfinite(value).all():
            raise ConfigurationError(f"{self.directory}: {name} is not finite once merged; the adapter is broken.")
        return value

    def _merge(self, layer: Any, parameter: str, value: Tensor) -> Tensor:
        holder = layer.get_base_layer()
        before = dict(holder._parameters)
        try:
            holder._parameters[parameter] = nn.Parameter(value, requires_grad=False)
            if layer.lora_bias.get(ADAPTER):  # PEFT merges it too; discarded here, see _biases
                holder._parameters["bias"] = nn.Parameter(
                    torch.zeros_like(layer.lora_B[ADAPTER].bias), requires_grad=False
                )
            with torch.no_grad():
                layer.merge(adapter_names=[ADAPTER])
            return holder._parameters[parameter].detach()
        finally:
            holder._parameters.update(before)
            layer.merged_adapters.clear()

    def _check_rows(self, name: str, base: BaseModel) -> None:
        (numbers, values), shape = self._rows[name], base.shapes[name]
        if max(numbers) >= shape[0] or values.shape != (len(numbers), *shape[1:]):
            raise ConfigurationError(
                f"{self.directory} has values {list(values.shape)} for rows up to {max(numbers)} of {name}, which has "
                f"shape {list(shape)} in {base.directory}; give the adapter's base."
            )

    def _check_variant(self, layer: LoraLayer) -> None:
        """Refuse a layer that PEFT has made a LoRA variant of that is not supported here."""
        variant = layer.lora_variant.get(ADAPTER)
        if variant is not None and not self.config.use_dora and not self.config.alora_invocation_tokens:
            raise ConfigurationError(
                f"{self.directory} is a LoRA of an unsupported kind ({variant.__name__}); choose another adapter."
            )

    def _place(self, model: PreTrainedModel, base: BaseModel, device: str | torch.device) -> PeftModel:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                placed = PeftModel(model, self.config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
                with adapter_stays():
                    loaded = placed.load_adapter(
                        str(self.directory),
                        ADAPTER,
                        torch_device=str(device),
                        low_cpu_mem_usage=True,
                        autocast_adapter_dtype=False,
                    )
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{self.directory} cannot be read ({error}); fetch it again.") from None
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
            told = str(error).split("\n\t")  # only the first of many size mismatches
            reason = " ".join(told[min(1, len(told) - 1)].split()).rstrip(".")
            raise ConfigurationError(f"{self.directory} does not fit {base.directory}: {reason}.") from error
        if loaded.unexpected_keys:
            raise ConfigurationError(
                f"{self.directory} holds {_names(loaded.unexpected_keys)}, for which {base.directory} has no place; "
                "give the adapter's base."
            )
        own = (".lora_", ".trainable_tokens_delta.")
        missing = [
            name
            for name, each in placed.named_parameters()
            if each.device.type == "meta" and any(part in name for part in own)
        ]
        if missing:
            raise ConfigurationError(f"{self.directory} lacks {_names(missing)}; fetch it again.")
        for name, each in placed.named_parameters():
            if each.device.type != "meta":
                each.data = each.data.float()
                if not torch.isfinite(each).all():
                    raise ConfigurationError(f"{self.directory}: {name} is not finite; the adapter is broken.")
        return placed


def _factors(layer: Any) -> Factors:
    scaling = layer.scaling[ADAPTER]
    if isinstance(layer, ParamWrapper):
        a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        if layer.num_experts > 1:
            a, b = expert_factors(a, b, layer.num_experts)
        return Factors(a, b, scaling, transposed=not is_swapped(layer) and layer.num_experts > 1)
    if ADAPTER in layer.lora_embedding_A:  # as a map from one-hot to hidden, its weight is [in, out]
        return Factors(
            layer.lora_embedding_A[ADAPTER].detach(), layer.lora_embedding_B[ADAPTER].detach(), scaling, True
        )
    a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    return Factors(a, b, scaling, transposed=bool(layer.fan_in_fan_out))


def _rows(adapter: Any) -> tuple[list[int], Tensor]:
    return list(adapter.token_indices[ADAPTER]), adapter.trainable_tokens_delta[ADAPTER].detach()


def _shared_rows(rows: dict[str, Any], tied: dict[str, str]) -> set[str]:
    """Return the tied weights to which PEFT applies the same rows."""
    shared: set[str] = set()
    for name, source in tied.items():
        if name in rows and source in rows and rows[name].tied_adapter is rows[source]:
            shared |= {name, source}
    return shared


def _names(names: list[str]) -> str:
    names = sorted(names)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
