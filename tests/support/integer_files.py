"""Files of GPTQ and AWQ, written from the formats' definitions: codes are concatenated into one long number.

Each quantiser fills ``plain`` with the weights that its codes stand for, computed before they are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantised_files import Tensors, is_linear

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Quantise = Callable[[Tensors], tuple[Tensors, dict[str, Any]]]


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [n, count] as int32 [n, count * bits / 32], the first code in the lowest bits of the first word."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([number >> (32 * word) & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def in_groups(weight: Tensor, group: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [out, in], zero points and float16 scales [out, groups]; ``group`` is the group of each input."""
    largest = 2**bits - 1
    columns = [weight.float()[:, group == number] for number in range(int(group.max()) + 1)]
    low = torch.stack([each.amin(1).clamp(max=-0.05) for each in columns], 1)
    high = torch.stack([each.amax(1).clamp(min=0.05) for each in columns], 1)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / largest).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.float()).round().clamp(1, largest)
    codes = (weight.float() / scales.float()[:, group] + zeros[:, group]).round().clamp(0, largest)
    return codes.long(), zeros.long(), scales


def gptq(
    bits: int = 4, group_size: int = 32, plain: Tensors | None = None, *, sym: bool = True, desc_act: bool = False,
    version: int = 1, g_idx: bool = True, biases: bool = False, **described: Any,
) -> Quantise:  # fmt: skip
    """Quantise as GPTQ, packed along the inputs; ``biases`` adds the zero biases that old packers wrote."""
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act,
        "damp_percent": 0.1, "true_sequential": True, "model_file_base_name": "model", **described,
    }  # fmt: skip
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        made: Tensors = {}
        for name, tensor in tensors.items():
            if not is_linear(name, tensor):
                made[name] = tensor
                continue
            width, stem = tensor.shape[1], name.removesuffix(".weight")
            group = torch.arange(width) // (width if group_size == -1 else group_size)
            if desc_act:
                group = group[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
            codes, zeros, scales = in_groups(tensor, group, bits, symmetric=sym)
            if plain is not None:
                plain[name] = (codes - zeros[:, group]).half() * scales[:, group]
            made[f"{stem}.qweight"] = words(codes, bits).T
            made[f"{stem}.qzeros"] = words(zeros.T - int(version == 1), bits)
            made[f"{stem}.scales"] = scales.T
            if g_idx:
                made[f"{stem}.g_idx"] = group.int()
            if biases:
                made[f"{stem}.bias"] = torch.zeros(tensor.shape[0], dtype=torch.float16)
        return made, config

    return quantise


def awq(group_size: int = 32, plain: Tensors | None = None, **described: Any) -> Quantise:
    """Quantise as AWQ, packed along the outputs in the order of the gemm kernels."""
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None, **described,
    }  # fmt: skip

    def interleaved(codes: Tensor) -> Tensor:
        return words(codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER].flatten(1), 4)

    def quantise(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        made: Tensors = {}
        for name, tensor in tensors.items():
            if not is_linear(name, tensor):
                made[name] = tensor
                continue
            group = torch.arange(tensor.shape[1]) // (tensor.shape[1] if group_size == -1 else group_size)
            codes, zeros, scales = in_groups(tensor, group, 4, symmetric=False)
            if plain is not None:
                plain[name] = (codes - zeros[:, group]).half() * scales[:, group]
            stem = name.removesuffix(".weight")
            made[f"{stem}.qweight"] = interleaved(codes.T)
            made[f"{stem}.qzeros"] = interleaved(zeros.T)
            made[f"{stem}.scales"] = scales.T
        return made, config

    return quantise
