"""Which weights a LoRA adapts: linear layers of the decoder, and experts that are fused into one parameter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Conv1D

from lightning_pipelite.adapters.selection import match_modules, no_linear, parse_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layer_signature import layer_signature
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.quantization.four_bit import fused_weights

ADAPTER = "default"


def lora_targets(
    meta_model: MetaModel, target_modules: str | list[str], layers_to_transform: str | list[int] | None
) -> tuple[list[str], list[str]]:
    """Return the full names of the linear layers and of the fused weights to adapt in the whole model.

    Raises:
        ConfigurationError: A target is neither, or there is nothing to adapt.
    """
    modules = {name: module for name, module in meta_model.model.named_modules() if name}
    known = {n for n, m in modules.items() if meta_model.layer_of(n) is not None and _is_linear(m)}
    known -= meta_model.bypassed_in_training
    names = {module: name for name, module in modules.items()}
    experts = [f"{names[module]}.{name}" for module, name in fused_weights(meta_model.layers)]
    targets = [*(name for name in modules if name in known), *experts]
    if target_modules != "all-linear":
        targets = match_modules([*modules, *experts], target_modules)
        if others := [name for name in targets if name not in known and name not in experts]:
            first = modules[others[0]]
            if others[0] in meta_model.bypassed_in_training:
                raise ConfigurationError(
                    f"target_modules matches {others[0]}, whose weight this model uses without calling the layer, so "
                    "an adapter on it would not be trained; leave it out."
                )
            has_matrix = any(parameter.ndim > 1 for parameter in first.parameters())
            raise no_linear(others[0], f"a {type(first).__name__}" if has_matrix else "which has no matrix")
    layers = set(parse_layers(layers_to_transform, len(meta_model.layers)))
    chosen = [name for name in targets if meta_model.layer_of(name) in layers]
    if not chosen:
        raise ConfigurationError("target_modules matches no linear layer in layers_to_transform; widen one of the two.")
    return [name for name in chosen if name in known], [name for name in chosen if name not in known]


def check_peft_loads(config: LoraConfig, meta_model: MetaModel, targets: set[str]) -> nn.Module:
    """Refuse, before hours of training, targets that PEFT would not adapt when it loads the result.

    Args:
        config: The configuration that will be saved.
        meta_model: The whole model.
        targets: Full names of what the LoRA adapts.

    Returns:
        The whole model with PEFT's adapters; of identical layers, only one has them.

    Raises:
        ConfigurationError: PEFT refuses a target, or takes its name for another one's.
    """
    whole = meta_model.whole
    layers = whole.model.get_submodule(whole.name(meta_model.layers_name))
    # PEFT goes by names and classes: of layers that are alike in both and in their targets, one stands for all.
    tried: dict[Hashable, int] = {}
    own: list[set[str]] = [set() for _ in meta_model.layers]
    for name in targets:
        number = meta_model.layer_of(name)
        assert number is not None
        own[number].add(name.removeprefix(meta_model.layers_name).split(".", 2)[2])
    for number, layer in enumerate(meta_model.layers):
        tried.setdefault((layer_signature(layer), frozenset(own[number])), number)
    others = {id(layer): nn.Identity() for n, layer in enumerate(layers) if n not in tried.values()}
    model = copy.deepcopy(whole.model, others)
    targets = {name for name in targets if meta_model.layer_of(name) in tried.values()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            placed = PeftModel(
                model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
    except ValueError as error:
        raise ConfigurationError(f"target_modules: {error}") from error
    adapted = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            parameter = [layer.parameter_name] if hasattr(layer, "parameter_name") else []
            adapted.add(whole.own_name(".".join([name.replace(".base_layer", ""), *parameter])))
    if lost := sorted(targets - adapted):
        raise ConfigurationError(
            f"target_modules matches {lost[0]}, which PEFT cannot load for a model of type "
            f"{meta_model.config.model_type}, as it takes {_last(lost[0])} for a weight of the experts; "
            f"{_others(targets, lost)}"
        )
    # PEFT renames what it loads as transformers renames the model's files, in which some weights have other names.
    state = get_peft_model_state_dict(placed, adapter_name=ADAPTER, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = set_peft_model_state_dict(placed, state, ADAPTER, low_cpu_mem_usage=True).missing_keys
    if lost := sorted(name for name in missing if ".lora_" in name):
        name = lost[0].removeprefix("base_model.model.").partition(".lora_")[0]
        raise ConfigurationError(
            f"target_modules matches {name}, whose adapter PEFT loads under another name for a model of type "
            f"{meta_model.config.model_type}, and thus drops; {_others(targets, lost)}"
        )
    return model


def _others(targets: set[str], lost: list[str]) -> str:
    """Say which target modules remain without the lost ones."""
    left = sorted({_last(name) for name in targets} - {_last(name.partition(".lora_")[0]) for name in lost})
    return f"choose other target_modules, such as [{', '.join(left)}]." if left else "choose other target_modules."


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def is_transposed(model: nn.Module, linear: list[str]) -> bool:
    """Return PEFT's ``fan_in_fan_out``: whether the named linear layers store their weights as [in, out].

    In 4 bits, the weight of a Conv1D is [out, in] like any other.
    """
    return any(type(model.get_submodule(name)) is Conv1D for name in linear)


def shortest(targets: list[str], names: list[str], length: int) -> list[str]:
    """Shorten ``targets`` to their last components, as people and tools expect, if no others of ``names`` match."""

    def last(name: str) -> str:
        return ".".join(name.split(".")[-length:])

    short = {last(name) for name in targets}
    return sorted(short) if {name for name in names if last(name) in short} == set(targets) else targets


def _is_linear(module: nn.Module) -> bool:
    """Tell whether ``module``, on the meta device, is a linear layer; some routers only inherit from one.

    GPT-2's are transformers' Conv1D, which stores its weight as [in, out].
    """
    if type(module) is Conv1D:
        return True
    if type(module) is nn.Linear or not isinstance(module, nn.Linear):
        return isinstance(module, nn.Linear)
    try:
        output = module(torch.empty(1, 2, module.in_features, dtype=module.weight.dtype, device="meta"))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, 2, module.out_features)
