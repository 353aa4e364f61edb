"""Shrinks the sizes in a configuration, so that its class builds a small model of the same kind."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Small values for the names that configurations give their sizes. Not a table of models: names that a configuration
# lacks are skipped. Heads times head size is the hidden size, and the sizes of all 4-bit weights are multiples of 64.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "embedding_dim": 64,
    "word_embed_proj_dim": 64,
    "lru_width": 64,
    "attention_hidden_size": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "n_inner": 128,
    "ffn_dim": 128,
    "dim_ff": 128,
    "ffn_hidden_size": 128,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "shared_intermediate_size": 128,
    "dense_intermediate_size": 128,
    "prefix_dense_intermediate_size": 128,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_experts_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "linear_num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_query_groups": 2,
    "num_global_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "dim_head": 16,
    "d_head": 16,
    "swa_head_dim": 16,
    "global_head_dim": 16,
    "attention_head_dim": 32,
    "attention_head_size": 16,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rotary_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "vocab_size": 128,
}

ROPE = ("rope_parameters", "rope_scaling")  # the dictionaries of rotary embeddings' parameters

# Hidden sizes: where one differs from the first that a configuration has, the class has a projection between them.
WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "emb_dim",
    "embedding_size",
    "embedding_dim",
    "word_embed_proj_dim",
    "lru_width",
    "attention_hidden_size",
)
# Pairs of sizes whose equality matters: some classes detect it, or build something else then.
ALIKE = (
    ("num_attention_heads", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("num_key_value_heads", "num_global_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("head_dim", "global_head_dim"),
    ("intermediate_size", "moe_intermediate_size"),
)
# Widths of state-space layers: a multiple of the hidden size, which some classes compute again.
EXPANDED = ("intermediate_size", "mamba_d_ssm")


def small_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Return small values for the sizes in ``config``; the number of layers and their kinds stay."""
    return _small(config.to_dict())


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that change.

    Values that mean none or one of a thing stay: 0, 1, None, an empty list. Sizes that are equal stay equal where a
    class can tell the difference.
    """
    small: dict[str, Any] = {}
    for name, size in SIZES.items():
        value = values.get(name)
        if _is_size(value):
            small[name] = min(size, value) if "per_tok" in name or "group" in name else size
        elif isinstance(value, list) and value and all(type(each) is int for each in value):  # one per layer
            small[name] = [_smaller(size, each, max(value)) if each > 1 else each for each in value]
    _keep_relations(values, small)
    small.update({name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if _is_token(values.get(name))})
    for name in ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"):
        if _is_size(values.get(name)):
            small[name] = 4  # shorter than the sequences of a trial, so that it has an effect
    for name, value in values.items():
        if name == "per_layer_config" and value:  # overrides for single layers
            small[name] = {layer: _small_layer(own, values, small) for layer, own in value.items()}
        elif isinstance(value, dict) and name not in ROPE and (inner := _small(value)):
            small[name] = {**value, **inner}
    return small


def _small_layer(own: dict[str, Any], values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Return a layer's overrides, shrunk in proportion to the model's values."""
    made = {**own, **{k: _smaller(small[k], own[k], values[k]) for k in own.keys() & small.keys()}}
    parts, real = ("qk_nope_head_dim", "qk_rope_head_dim"), {**values, **own}
    if parts[0] in made and real.get("head_dim") == sum(real[part] for part in parts):
        made["head_dim"] = sum({**small, **made}[part] for part in parts)
    return made


def _keep_relations(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Keep sizes equal, different, or sums of others, as the real ones are."""
    widths = [name for name in WIDTHS if type(small.get(name)) is int]
    for name in widths[1:]:
        small[name] = _smaller(small[widths[0]], values[name], values[widths[0]])
    for one, other in ALIKE:
        if type(small.get(one)) is int and type(small.get(other)) is int:
            if values[one] == values[other]:
                small[other] = small[one]
            elif small[one] == small[other]:
                small[other] = _smaller(small[one], values[other], values[one])
    if "qk_rope_head_dim" in small and "qk_nope_head_dim" in small:  # multi-head latent attention
        _keep_latent_heads(values, small)
    for expand in (values.get(name) for name in ("expand", "mamba_expand")):
        for name in EXPANDED:
            if expand and name in small and values[name] == expand * values.get("hidden_size", 0):
                small[name] = int(expand * small["hidden_size"])
        # Here these are the heads of the state-space layers: together they are as wide as the expanded hidden size.
        if expand and "mamba_num_heads" not in small and "num_heads" in small:
            small["num_heads"], small["head_dim"] = 8, int(expand * small["hidden_size"]) // 8


def _keep_latent_heads(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Keep the value heads' size equal to, or different from, that of queries and keys or of their unrotated part."""
    rope, nope, value = values["qk_rope_head_dim"], values["qk_nope_head_dim"], values.get("v_head_dim")
    small["qk_nope_head_dim"] = 16 if nope == value else 8
    whole = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if "v_head_dim" in small and value not in (nope, nope + rope):
        small["v_head_dim"] = 32
    for name in ("qk_head_dim", "head_dim", "swa_head_dim"):
        if name in small:
            sizes = {rope: small["qk_rope_head_dim"], nope: small["qk_nope_head_dim"], nope + rope: whole}
            small[name] = sizes.get(values[name], small[name])


def _smaller(size: int, value: int, reference: int) -> int:
    """Return ``size``, half of it, or twice it: as ``value`` is equal to ``reference``, smaller, or larger."""
    return size if value == reference else size // 2 if value < reference else 2 * size


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 1


def _is_token(value: Any) -> bool:
    return value is not None and value != [] and value != -1
