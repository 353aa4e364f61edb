"""The arithmetic that a training step requires and that a device can do: model FLOPs utilisation (MFU).

Chowdhery et al. 2022, "PaLM" (https://arxiv.org/abs/2204.02311), appendix B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipelite.models.meta_model import MetaModel

# Dense bf16 products with fp32 accumulation, TFLOP/s, by a part of the device's name; the first match counts. From
# NVIDIA's data sheets (H200, H100, A100, L40S, L40, L4, A10, A40, A6000) and the appendices of its architecture
# papers (Ampere GA102, Ada, Blackwell RTX); half of the figures that they give "with sparsity".
PEAK_BF16 = {
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return a device's peak rate of dense matrix products in FLOP/s, or None if it is not known.

    The bf16 rate also applies to training with weights in FP8 or 4 bits, so that results can be compared.

    Args:
        device_name: As ``torch.cuda.get_device_name()`` returns it.
        dtype: Of the products; only the rate of bfloat16 is known.
    """
    if dtype != torch.bfloat16:
        return None
    for name, peak in PEAK_BF16.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name):
            return peak * 1e12
    return None


@dataclass(frozen=True)
class TrainingFlops:
    """The floating-point operations of training a model, without recomputation.

    Args:
        per_token: In products with weights, for each token.
        per_pair: In attention, for each ordered pair of tokens of a document.
    """

    per_token: float
    per_pair: float

    def of(self, tokens: float, pairs: float) -> float:
        """Return the operations for ``tokens`` tokens and ``pairs`` ordered pairs of tokens within a document."""
        return self.per_token * tokens + self.per_pair * pairs


def training_flops(meta_model: MetaModel, trained: Mapping[str, Tensor]) -> TrainingFlops | None:
    """Count the operations of training as the PaLM paper does (appendix B), but only those that this training needs.

    A token costs 2 for each weight in the forward pass, 2 in the backward pass for the gradient of the weight's input,
    and 2 for the weight's own gradient if it is trained: 6N if all N weights are trained, 4N + 6A if N weights are
    frozen and A weights of an adapter are trained, and 2 for each weight in layers below the lowest trained one, which
    have no backward pass. Only weights of matrices count, including the head's but not the embedding's; of experts,
    only as many as a token is sent to. Attention costs 12 for each layer, dimension of all heads and ordered pair of
    tokens of a document, whether one sees the other or not, or 4 in layers without a backward pass. Recomputed
    activations do not count.

    Args:
        meta_model: The model.
        trained: The trained parameters of all stages by name, on any device.

    Returns:
        None for a model without attention heads, or with experts whose configuration does not say how many are used.
    """
    configs = _layer_configs(meta_model)
    matrices = dict(_matrices(meta_model.model))
    layers = [layer for name in trained if (layer := meta_model.layer_of(name)) is not None]
    # Training anything before the layers takes a backward pass through all of them; training the tail alone, none.
    before = any(name.rpartition(".")[0] in meta_model.start_names for name in trained)
    lowest = 0 if before else min(layers, default=len(meta_model.layers))
    own = {name for name, _ in meta_model.model.named_parameters()}
    added = sum(p.numel() for name, p in trained.items() if name not in own and p.ndim >= 2)
    per_token = 6.0 * added
    for name, matrix in matrices.items():
        layer = meta_model.layer_of(name)
        routed = _is_routed(name, matrix)
        share = _share_of_experts(meta_model.config if layer is None else configs[layer]) if routed else 1.0
        if share is None:
            return None
        tied = (
            f"{meta_model.embedding_name}.weight"
            if meta_model.tied and name == f"{meta_model.head_name}.weight"
            else name
        )
        factor = 2 + 2 * (layer is None or layer >= lowest) + 2 * (name in trained or tied in trained)
        per_token += factor * matrix.numel() * share
    kinds = getattr(meta_model.config, "layer_types", None) or ["attention"] * len(configs)
    per_pair = 0.0
    for layer, (config, kind) in enumerate(zip(configs, kinds, strict=False)):
        width = _width_of_heads(config)
        if width is None:
            return None
        if "attention" in kind and "linear" not in kind:
            per_pair += width * (4 + 8 * (layer >= lowest))
    return TrainingFlops(per_token, per_pair)


def _layer_configs(meta_model: MetaModel) -> list[Any]:
    """Return each layer's configuration: the model's own raises an error for attributes that differ between layers."""
    config: Any = meta_model.config
    return (
        list(config.per_layer_config)
        if getattr(config, "is_heterogeneous", False)
        else [config] * len(meta_model.layers)
    )


def _width_of_heads(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else None


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that tokens are multiplied with, module by module, as a tied head shares the embedding's."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                yield f"{prefix}.{name}", parameter


def _is_routed(name: str, matrix: Tensor) -> bool:
    return ".experts." in name and (matrix.ndim == 3 or re.search(r"\.experts\.\d+\.", name) is not None)


def _share_of_experts(config: object) -> float | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if experts and used else None
