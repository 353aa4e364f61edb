"""Models on disk whose weights are quantised by the formats' own tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from tiny_models import SIZES

MOE = {"num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, **MOE, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **MOE, num_experts=4, moe_intermediate_size=96),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **MOE, num_local_experts=4, pad_token_id=0, sliding_window=4),
    "gpt_oss_wide": lambda: GptOssConfig(
        **{**SIZES, "intermediate_size": 96}, **MOE, num_local_experts=6, pad_token_id=0, tie_word_embeddings=True
    ),
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Tensors = dict[str, Tensor]


def write_quantised(
    directory: Path, kind: str, quantise: Callable[[Tensors], tuple[Tensors, dict[str, Any]]], shards: int = 2
) -> Path:
    """Save a random model of ``kind`` with quantised files: by default two shards and an index, as large models have.

    Args:
        directory: Where to save it.
        kind: A key of ``CONFIGS``.
        quantise: Turns bfloat16 tensors into the files' tensors and the ``quantization_config``.
        shards: Number of files.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    plain = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors, described = quantise(plain)
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        some = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in some}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(some, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(directory, quantization_config=described)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, edit: Callable[[Tensors], Any]) -> None:
    """Edit the tensors of each file, and update the index."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(directory / file)
        before = set(tensors)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file)
        for name in before - tensors.keys():
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(tensors, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def is_linear(name: str, tensor: Tensor) -> bool:
    """Return whether checkpoints quantise a weight: a matrix in a layer, but not a router or norm."""
    in_layer = ".layers." in name and name.endswith(".weight") and tensor.ndim == 2
    return in_layer and not name.endswith((".gate.weight", ".router.weight"))


def of_linear(tensors: Tensors, codes: Callable[[str, Tensor], Tensors]) -> Tensors:
    """Return the tensors with each linear weight replaced by what ``codes`` returns for it."""
    return {
        key: value
        for name, tensor in tensors.items()
        for key, value in (codes(name, tensor) if is_linear(name, tensor) else {name: tensor}).items()
    }


def mxfp4(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Quantise the experts of gpt-oss by section 6.3 of the OCP specification."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = tensor
            continue
        rows = tensor.float().transpose(1, 2)
        groups = rows.reshape(*rows.shape[:-1], -1, 32)
        exponent = groups.abs().amax(-1).log2().floor().clamp(-125, 125) - 2
        scaled = groups / exponent.exp2()[..., None]
        codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        made[name + "_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        made[name + "_scales"] = (exponent + 127).to(torch.uint8)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return made, {"quant_method": "mxfp4", "modules_to_not_convert": skipped}


def fp8(
    block: tuple[int, int] | None = (32, 32), scale_fmt: str = "float", scheme: str = "dynamic"
) -> Callable[[Tensors], tuple[Tensors, dict[str, Any]]]:
    """Quantise with transformers' own quantiser, in blocks; or with a scale for each tensor, as in Mistral's files."""
    described: dict[str, Any] = {
        "quant_method": "fp8", "activation_scheme": scheme, "fmt": "e4m3", "weight_block_size": block,
    }  # fmt: skip
    if scale_fmt != "float":
        described["scale_fmt"] = scale_fmt
    settings = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantiser: Any = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def codes(name: str, tensor: Tensor) -> Tensors:
        made: Tensors = quantiser.convert({name: tensor})
        if block is None:
            made[name + "_scale_inv"] = made[name + "_scale_inv"].reshape(())
        if scheme == "static":
            made[name.replace("weight", "activation_scale")] = torch.tensor(0.01)
        return made

    return lambda tensors: (of_linear(tensors, codes), described)


def compressed(
    form: str, bits: int = 8, plain: Tensors | None = None, **weights: Any
) -> Callable[[Tensors], tuple[Tensors, dict[str, Any]]]:
    """Quantise by the rules of compressed-tensors, with bfloat16 scales for each group, block, row or tensor.

    ``plain`` is filled with the weights that the codes stand for, computed before they are packed.
    """
    kind = "float" if form == "float-quantized" else "int"
    arguments = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    described = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*gate$"],
    }  # fmt: skip

    def codes(name: str, tensor: Tensor) -> Tensors:
        rows, columns = tensor.shape
        sides = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, weights.get("group_size", 0)),
            "block": weights.get("block_structure"),
        }[weights["strategy"]]
        blocks = tensor.float().reshape(rows // sides[0], sides[0], columns // sides[1], sides[1])
        largest = 448.0 if kind == "float" else 2.0 ** (bits - 1) - 1
        scales = (blocks.abs().amax((1, 3), keepdim=True) / largest).to(torch.bfloat16)
        scaled = (blocks / scales.float()).clamp(-largest, largest).reshape(rows, columns)
        values = scaled.to(torch.float8_e4m3fn) if kind == "float" else scaled.round().to(torch.int8)
        if plain is not None:
            stand_for = values.to(torch.bfloat16).reshape(blocks.shape) * scales
            plain[name] = stand_for.reshape(rows, columns)
        made = {name + "_scale": scales.reshape(scales.shape[0], scales.shape[2])}
        if weights["strategy"] == "tensor":
            made[name + "_scale"] = made[name + "_scale"].reshape(1)
        if form == "pack-quantized":
            made[name + "_shape"] = torch.tensor([rows, columns])
            digits = (values.long() + 2 ** (bits - 1)).reshape(rows, -1, 32 // bits)
            words = (digits << torch.arange(0, 32, bits)).sum(-1)
            made[name + "_packed"] = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
        else:
            made[name] = values
        return made

    return lambda tensors: (of_linear(tensors, codes), described)
