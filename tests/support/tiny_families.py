"""A tiny random model of any type that transformers knows, and whether it trains exactly as a pipeline."""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_pipelite.cli.split_comparison import compare_packed, compare_split, exact_layers
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.small_sizes import small_sizes
from lightning_pipelite.models.tiny import tiny_config
from published_bases import PUBLISHED, shallow
from published_training import four_bits, in_attention, lora_through_peft

LAYERS = 4
LARGEST = 40_000_000  # parameters; a model that stays larger has sizes that this file does not know
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_blocks",
    "num_decoder_layers",
)
# Values that four small layers require in certain types, by names that only those types have.
SPECIAL: dict[str, Any] = {
    "attention_types": [[["global", "local"], 2]],
    "num_kv_shared_layers": 1,
    "local_layer_ids": [0, 2],
    "full_attn_idxs": [1, 3],
    "attn_layer_indices": [1, 3],
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "default_language": "en_XX",
    "axial_pos_embds_dim": (32, 32),
    "axial_pos_shape": (8, 8),
    "num_attention_heads": 4,
}
# The same for single types whose names mean something else in others.
SPECIAL_OF: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 512, "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
}  # fmt: skip
# Values that the class needs although its defaults are None.
UNSET = {"head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


class NotTiny(Exception):  # noqa: N818 (an outcome, not an error)
    """Raised if no tiny model of a type can be built with the values that this file knows."""


@dataclass
class Outcome:
    """The result of trying one model type: ``result`` is exact, refused, not tried or WRONG.

    For a published model, ``lora`` and ``four_bit`` are equal, equal on attention, or refused.
    """

    model_type: str
    result: str
    stages: str = ""
    packing: str = ""
    note: str = ""
    lora: str = ""
    four_bit: str = ""


def tiny(model_type: str) -> PretrainedConfig:
    """Return a configuration with four layers that cover the type's kinds of layers, small sizes and no dropout.

    Raises:
        NotTiny: If the class refuses such values, or the model stays too large.
    """
    try:
        default = CONFIG_MAPPING[model_type]()
        text = default.get_text_config(decoder=True)
        default = text if type(text) is not type(default) else default  # a decoder's copy lacks its own size names
        values = default.to_dict()
        changed: dict[str, Any] = {**small_sizes(default), **{name: LAYERS for name in DEPTHS if name in values}}
        changed.update({name: value[:LAYERS] for name, value in changed.items() if isinstance(value, list)})
        changed.update({name: size for name, size in UNSET.items() if values.get(name, 0) is None})
        changed.update(_without_chance(values))
        changed.update({k: v for k, v in (("is_decoder", True), ("is_encoder_decoder", False)) if k in values})
        changed.update({name: value for name, value in SPECIAL.items() if name in values})
        changed.update(SPECIAL_OF.get(default.model_type, {}))
        if "per_layer_config" in changed:
            changed["per_layer_config"] = {n: v for n, v in changed["per_layer_config"].items() if int(n) < LAYERS}
        of_each = next((name for name in ("layer_types", "layers_block_type") if name in values), "layer_types")
        kinds = list(dict.fromkeys(values.get(of_each) or []))
        changed.pop(of_each, None)
        variants = [changed]
        variants += [{**changed, "num_experts_per_tok": 1}] if "num_experts_per_tok" in values else []
        if values.get("layer_types", 0) is None:
            variants.append({**changed, "layer_types": ["full_attention"] * LAYERS})
        if len(kinds) > 1:
            variants.insert(0, {**changed, of_each: [kinds[i % len(kinds)] for i in range(LAYERS)]})
        error: Exception | None = None
        for variant in variants:
            try:
                config = type(default)(**variant)
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
                break
            except Exception as refusal:
                error = error or refusal
        else:
            raise error or AssertionError
    except Exception as refusal:  # validation errors of all sorts
        raise NotTiny(
            f"no tiny model: {(str(refusal) or type(refusal).__name__).splitlines()[-1].strip()}"
        ) from refusal
    if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise NotTiny(f"no tiny model: it still has {size} parameters")
    return config


def _without_chance(values: dict[str, Any]) -> dict[str, float]:
    """Return values that disable randomness in training: stages draw other numbers than the whole model."""
    return {name: 0.0 for name, v in values.items() if ("drop" in name or "jitter" in name) and isinstance(v, float)}


def write(config: PretrainedConfig, directory: Path) -> PreTrainedModel:
    """Save a random model of ``config`` and return it as loaded from there, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += (0.2 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()


def try_model(model_type: str) -> Outcome:
    """Try one model type with its defaults."""
    try:
        config = tiny(model_type)
    except NotTiny as reason:
        return Outcome(model_type, "not tried", note=str(reason))
    return try_config(model_type, config)


def try_published(name: str, layers: int) -> Outcome:
    """Try the first layers of a published base with small sizes."""
    facts = shallow(PUBLISHED[name], layers)
    config = CONFIG_MAPPING[facts["model_type"]](**{key: value for key, value in facts.items() if key != "model_type"})
    if kinds(tiny_config(config)) != kinds(config):
        return Outcome(name, "WRONG", note="the tiny model has other parts")
    small = tiny_config(config)
    small.update(_without_chance(small.to_dict()))
    return try_config(name, small, trains=True)


def try_config(model_type: str, config: PretrainedConfig, *, trains: bool = False) -> Outcome:
    """Try one configuration of a small size; with a LoRA and in 4 bits too, if ``trains``."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            whole = write(config, directory)
        except Exception as error:
            return Outcome(model_type, "not tried", note=f"no tiny model: {str(error).splitlines()[-1]}")
        try:
            whole(input_ids=torch.ones(1, 12, dtype=torch.int64), use_cache=False)
        except Exception as error:  # some classes only train on sequences of one length
            return Outcome(model_type, "not tried", note=f"the class itself refuses: {str(error).splitlines()[0]}")
        packing = "isolated"
        try:
            layers = exact_layers(directory, packed=True)
        except ConfigurationError as refusal:
            if "packed to false" not in str(refusal):
                return Outcome(model_type, "refused", note=reason_of(refusal))
            layers, packing = exact_layers(directory, packed=False), "refused"
        stages, note = f"1 to {len(layers)}" if len(layers) > 1 else "1", layers.one_stage_only or ""
        try:
            wrong = compare_split(layers, whole, sorted({1, min(2, len(layers)), len(layers)}), train=True)
            if packing == "isolated":
                wrong += compare_packed(layers, whole)
        except ConfigurationError as refusal:
            return Outcome(model_type, "refused", note=reason_of(refusal))
        except Exception as error:
            wrong = [f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"]
        outcome = Outcome(model_type, "exact", stages, packing, note)
        if trains and not wrong:
            packed = packing == "isolated"
            found = [lora_through_peft(directory, packed), four_bits(directory, whole, packed)]
            refused = [told.startswith("refused: ") for told in found]
            outcome.lora, outcome.four_bit = ("refused" if is_refused else "equal" for is_refused in refused)
            outcome.note = "; ".join([note, *(told for told in found if told)]).strip("; ")
            if refused[0]:
                found.append(lora_through_peft(directory, packed, in_attention(whole)))
                outcome.lora = "refused" if found[-1].startswith("refused: ") else "equal on attention"
            wrong = [told for told in found if told and not told.startswith("refused: ")]
    if wrong:
        return Outcome(model_type, "WRONG", stages, packing, "; ".join(wrong))
    return outcome


def kinds(config: PretrainedConfig) -> set[tuple[str, str]]:
    """Return the names of all modules with their classes, and of all parameters with their dimensions.

    Experts and other lists within a layer, of which a tiny model has fewer entries, count as one entry.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    modules = {(_in_layer(name), type(module).__name__) for name, module in model.named_modules()}
    parameters = model.named_parameters(remove_duplicate=False)
    return modules | {(_in_layer(name), f"{parameter.ndim} dimensions") for name, parameter in parameters}


def _in_layer(name: str) -> str:
    first, *others = re.split(r"(?<=\.\d)(?=\.)|(?<=\.\d\d)(?=\.)", name, maxsplit=1)
    return first + re.sub(r"\b\d+\b", "*", "".join(others))


def reason_of(refusal: ConfigurationError) -> str:
    return str(refusal).split(" because ")[-1].removesuffix("; choose another model.")
