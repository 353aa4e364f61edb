"""Writes adapters as GGUF files for llama.cpp."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from lightning_pipelite.adapters.control_files import is_control_adapter
from lightning_pipelite.adapters.lora_kinds import read_lora_config
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.architectures import Architecture, architecture
from lightning_pipelite.export.atomic_output import check_new_file, new_file
from lightning_pipelite.export.base import BaseModel, Group
from lightning_pipelite.export.control_lora import control_to_lora
from lightning_pipelite.export.lora_files import Factors, LoRAOfBase
from lightning_pipelite.models.fingerprint import refuse_another_base
from lightning_pipelite.models.transformers_compat import Concatenate, MergeModulelist
from lightning_pipelite.shared.progress import track
from lightning_pipelite.shared.wording import counted

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
EXPERT = re.compile(r"\.experts\.\d+\.")


def export_gguf(
    adapter: str,
    base: str,
    output: str,
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32",
    inverse: bool = False,
    trust_remote_code: bool = False,
    allow_another_base: bool = False,
) -> str:
    """Write an adapter as a GGUF file for llama.cpp's --lora.

    Names come from the ``gguf`` library's map for the base's architecture, and rows of q and k are permuted where
    llama.cpp's conversion of that architecture permutes them. A Control Adapter is first converted to a LoRA, as by
    control-to-lora. The invocation tokens of an activated LoRA (aLoRA) are written to the file. Tensors whose rows
    cannot be split into the blocks of 32 that q8_0 needs are written in f16.

    Args:
        adapter: Directory of the LoRA or Control Adapter.
        base: Directory of the Hugging Face model that it was trained on (also ``--model_dir``).
        output: File to write; must not exist.
        outtype: Type of the tensors.
        inverse: For a Control Adapter, use class -1 instead of class +1.
        trust_remote_code: Run the base's own Python code, if it has any.
        allow_another_base: Continue with an adapter that was trained on another base.

    Raises:
        ConfigurationError: The adapter does not fit the base or does more than a LoRA in llama.cpp can, or the base's
            architecture is not supported.
    """
    check_new_file(Path(output))
    control = is_control_adapter(adapter)
    if not allow_another_base:
        refuse_another_base(Path(adapter), Path(base))
    if control:
        with tempfile.TemporaryDirectory() as directory:
            lora_of_it = f"{directory}/lora"
            told = control_to_lora(base, adapter, lora_of_it, inverse, trust_remote_code=trust_remote_code)
            if read_lora_config(Path(lora_of_it)).lora_bias:
                raise ConfigurationError(
                    f"{adapter}: on {base}, whose layers have biases, a Control Adapter becomes a LoRA with biases, "
                    "which llama.cpp does not support; make that LoRA (pipelite control-to-lora), merge it (pipelite "
                    "merge), and convert the merged model with llama.cpp's convert_hf_to_gguf.py."
                )
            try:
                return f"{told}\n{export_gguf(lora_of_it, base, output, outtype, False, trust_remote_code, True)}"
            except ConfigurationError as error:  # names a temporary directory that the user never gave
                message = str(error).replace(lora_of_it, f"the LoRA that control-to-lora makes of {adapter}")
                raise ConfigurationError(message) from error
    if inverse:
        raise ConfigurationError(f"{adapter} is not a Control Adapter, so there is no class -1; leave inverse out.")
    model = BaseModel(base, trust_remote_code=trust_remote_code)
    target = architecture(model.config)
    lora = LoRAOfBase(model, adapter, invoked=True)
    factors = dict(lora.factors())
    # llama.cpp scales by alpha / rank, with one alpha for the file and each tensor's own rank; by 1 if alpha is 0.
    products = Counter(each.scaling * each.a.shape[-2] for each in factors.values() if each.scaling)
    alpha = float(np.float32(products.most_common(1)[0][0])) if products else 1.0
    kind, file_type = TYPES[outtype]
    count = 0
    with new_file(Path(output)) as partial:
        writer = gguf.GGUFWriter(partial, target.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if tokens := lora.config.alora_invocation_tokens:
            key = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS
            writer.add_key_value(key, tokens, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        writer.add_file_type(file_type)
        for name, each in track(factors.items(), "writing", "weights"):
            by = each.scaling * each.a.shape[-2] / alpha
            for tensor, a, b in _placed(model, target, name, each):
                _add(writer, f"{tensor}.lora_a", a, kind)
                _add(writer, f"{tensor}.lora_b", b if abs(by - 1) < 1e-6 else b * by, kind)
                count += 2
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return f"{output}: {counted(count, 'tensor')} for architecture {target.name}, {outtype}, alpha {alpha:g}."


def _placed(base: BaseModel, target: Architecture, name: str, factors: Factors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the GGUF tensors that the parameter ``name`` becomes, with the A and B of each."""
    group = base.group_of(name)
    if factors.a.ndim == 3:
        pieces = _experts(base, group, name)
        rows = factors.b.shape[1] // len(pieces)
        for number, piece in enumerate(pieces):
            yield _name(base, target, piece), factors.a, factors.b[:, number * rows : (number + 1) * rows]
        return
    if group.converter is not None or len(group.files) != 1:
        raise ConfigurationError(
            f"{base.directory}: {name} is part of a larger weight in llama.cpp, so its LoRA cannot be exported; merge "
            "the adapter into its base (pipelite merge) instead."
        )
    ((file, (renamed, _)),) = group.files.items()
    tensor = _name(base, target, renamed if base.is_text_part else file)
    a, b = factors.a, factors.b
    if tensor == "token_embd.weight":  # llama.cpp looks up rows of A by token
        yield tensor, a.mT, b
        return
    for module, heads in target.heads.items():
        if file.endswith(f".{module}.weight"):
            b = permute(b, heads)
    yield tensor, a, b


def permute(b: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows, as llama.cpp's rotary embedding expects them.

    Args:
        b: [heads * head size, ...].
        heads: Number of heads that the rows belong to.
    """
    halves = b.reshape(heads, 2, b.shape[0] // heads // 2, *b.shape[1:])
    return halves.swapaxes(1, 2).reshape(b.shape)


def _experts(base: BaseModel, group: Group, name: str) -> list[str]:
    """Return the names, without the expert numbers, of the weights whose rows make up the fused weight ``name``."""
    operations = [] if group.converter is None else group.converter.operations
    merge_first = operations and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    concatenate_then = len(operations) == 2 and isinstance(operations[1], Concatenate) and operations[1].dim == 1
    pieces = []
    if merge_first and (len(operations) == 1 or concatenate_then):
        assert group.converter is not None
        for pattern in group.converter.source_patterns:
            names = {EXPERT.sub(".experts.", file) for file, (_, matched) in group.files.items() if matched == pattern}
            pieces += sorted(names)
    if not pieces or len(pieces) != len(group.converter.source_patterns if group.converter else ()):
        raise ConfigurationError(
            f"{base.directory}: the layout of {name} in its files is not supported for llama.cpp; save the model with "
            "transformers' save_pretrained and use that copy."
        )
    return pieces


def _name(base: BaseModel, target: Architecture, file: str) -> str:
    name = target.names.get_name(file, try_suffixes=(".weight",))
    if name is None:
        raise ConfigurationError(
            f"{base.directory}: llama.cpp's architecture {target.name} has no tensor for {file}; train an adapter "
            "without it."
        )
    return name


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    values = tensor.detach().cpu().float().contiguous().numpy()
    if kind == gguf.GGMLQuantizationType.Q8_0 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > torch.finfo(torch.float16).max:
        raise ConfigurationError(f"{name} overflows f16; set outtype to f32 or bf16.")
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
