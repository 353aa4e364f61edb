"""Which of PEFT's LoRAs are supported: those that add scaling · B A, of any rank and scaling, and little else.

PEFT adds variants with each release. So only what is listed here is accepted, and the file must hold no tensors but
those that the configuration accounts for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from lightning_pipelite.adapters.config_file import CONFIG_FILE, lora_settings
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.wording import counted

# Keys that do not affect what is added to a weight. Those of initialisations matter only via ``init_lora_weights``.
SILENT = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config", "lora_dropout", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_core"),
}
# Keys whose values are honoured: where A and B are, how they are scaled, and what exists besides them.
HONOURED = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("use_dora", "lora_bias", "bias", "modules_to_save", "ensure_weight_tying", "trainable_token_indices"),
}
INVOKED = "alora_invocation_tokens"
# With these the adapter was trained on other weights than the base's: its initialisation changed them.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
ROWS = ".token_adapter.trainable_tokens_delta"
PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def read_lora_config(directory: Path, *, invoked: bool = False) -> LoraConfig:
    """Return PEFT's configuration of a supported LoRA.

    Args:
        directory: PEFT directory of the adapter.
        invoked: Whether the caller also accepts activated LoRAs (aLoRA), whose A and B apply from certain tokens on.

    Raises:
        ConfigurationError: The configuration is missing, not a LoRA's, or of a kind that leaves open what is added to
            the base, or adds more than is supported.
    """
    given = lora_settings(directory)
    _refuse_more(given, directory, {*SILENT, *HONOURED, *([INVOKED] if invoked else [])})
    _check_numbers(given, directory)
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{directory / CONFIG_FILE} is not a valid LoRA configuration: {error}.") from error
    _check_start(config.init_lora_weights, directory)
    config.init_lora_weights = True  # whatever it was, the values come from the file
    config.inference_mode = True
    return config


def check_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], directory: Path) -> dict[str, tuple[str, str]]:
    """Check that a LoRA's file holds A and B in pairs, and nothing that its configuration does not account for.

    Returns:
        For each module, by its name in the file, the names of its A and its B.

    Raises:
        ConfigurationError: A tensor lacks its pair, does not fit it, or is of another kind.
    """
    pairs: dict[str, tuple[str, str]] = {}
    whole = set(config.modules_to_save or [])
    for key, tensor in tensors.items():
        first, second = next((pair for pair in PAIRS if key.endswith(pair)), ("", ""))
        if first:
            module = key.removesuffix(first).removesuffix(second)
            a, b = (tensors.get(module + each) for each in (first, second))
            if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                name = module.removeprefix("base_model.model.")
                lacks = f"lacks {module}{first if a is None else second}" if a is None or b is None else ""
                lacks = lacks or f"has an A of shape {list(a.shape)} and a B of {list(b.shape)} for {name}"  # type: ignore[union-attr]
                raise ConfigurationError(f"{directory} {lacks}; fetch it again.")
            pairs[module] = (module + first, module + second)
        elif not (
            (config.lora_bias and key.endswith(".lora_B.bias"))
            or (config.use_dora and ".lora_magnitude_vector" in key)
            or (config.trainable_token_indices and key.endswith(ROWS))
            or (".lora_" not in key and _is_whole(key, whole, biases=config.bias != "none"))
        ):
            raise ConfigurationError(
                f"{directory} holds {key} of shape {list(tensor.shape)}, which is not A or B of a LoRA; choose another "
                "adapter."
            )
    if config.trainable_token_indices and not any(key.endswith(ROWS) for key in tensors):
        raise ConfigurationError(f"{directory} lacks the rows of its trainable_token_indices; fetch it again.")
    if not pairs:
        raise ConfigurationError(f"{directory} holds no A and B for any module; choose another adapter.")
    return pairs


def rest_of(config: LoraConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe what an adapter has besides its products."""
    rest = ["the magnitudes of a DoRA"] if config.use_dora else []
    biases = sum(key.endswith(".bias") for key in tensors)
    rows = {key: tensor.shape[0] for key, tensor in tensors.items() if key.endswith(ROWS)}
    whole = sum(".lora_" not in key and not key.endswith((".bias", ".base_layer.weight", ROWS)) for key in tensors)
    rest += [f"{counted(count, 'row')} of {key.removesuffix(ROWS).rpartition('.')[2]}" for key, count in rows.items()]
    return rest + [counted(count, noun) for count, noun in ((biases, "bias"), (whole, "whole weight")) if count]


def _is_whole(key: str, modules: set[str], *, biases: bool) -> bool:
    """Tell whether a tensor is a whole one of the base: of ``modules_to_save``, a bias, or an embedding's weight."""
    parameter = key.rpartition(".")[2]
    inside = any(f"{name}." in key for name in modules)  # as in PEFT: "norm" matches all names that end so
    # With an adapter on the embedding or head, or with tokens added, PEFT saves their weights as well.
    outside = parameter == "weight" and re.search(r"\.\d+\.", key) is None
    return inside or outside or (biases and parameter == "bias")


def _refuse_more(given: Mapping[str, Any], directory: Path, known: set[str]) -> None:
    defaults = {each.name: each.default for each in fields(LoraConfig) if each.default is not MISSING}
    for name, value in given.items():
        if name in known or not value or (name in defaults and value == defaults[name]):
            continue
        if name == INVOKED:
            raise ConfigurationError(
                f"{directory} sets {INVOKED}: an activated LoRA applies only after its invocation tokens, so it is not "
                "a change of weights; use it with its base, in PEFT or (after pipelite export-gguf) in llama.cpp."
            )
        raise ConfigurationError(
            f"{directory} sets {name} in {CONFIG_FILE}, which is not supported, as it may do more than add a product "
            "B·A; choose an adapter without it, or merge this one with PEFT."
        )


def _check_numbers(given: Mapping[str, Any], directory: Path) -> None:
    """Check ranks and alphas, which PEFT accepts unchecked."""
    for name, pattern, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        patterns = given.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ConfigurationError(
                f"{directory / CONFIG_FILE}: {pattern} is {patterns!r}, but must be a mapping; fetch the file again."
            )
        for key, value in [(name, given.get(name, 8)), *patterns.items()]:
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (whole and (value < 1 or value != int(value))):
                place = name if key == name else f"{pattern} of {key}"
                wanted = "an integer of at least 1" if whole else "a number"
                raise ConfigurationError(
                    f"{directory / CONFIG_FILE}: {place} is {value!r}, but must be {wanted}; fetch the file again."
                )


def _check_start(start: object, directory: Path) -> None:
    if start is None or isinstance(start, bool) or start in PLAIN_STARTS:
        return
    if str(start).lower().startswith(CHANGES_BASE):
        raise ConfigurationError(
            f"{directory} was initialised with {start}, which changes the base's weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion first."
        )
    raise ConfigurationError(
        f"{directory} was initialised with {start}, which may change the base's weights; choose another adapter."
    )
