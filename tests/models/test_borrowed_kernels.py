"""Kernels of other packages need a GPU: on the CPU and in a plan, a model's code falls back to torch."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels

import tiny_families
from lightning_pipelite.cli.split_comparison import compare_packed, compare_split, exact_layers
from lightning_pipelite.models.borrowed_kernels import lend_to_gpus_alone

torch.set_num_threads(1)
DRIVERS = "0 active drivers ([]). There should only be one."  # Triton's error for tensors on the CPU


def for_gpus(*args: Any, cu_seqlens: Any = None, **kwargs: Any) -> Any:
    if args[0].device.type == "cuda":
        return "by the kernel"
    raise RuntimeError(DRIVERS)


def install(monkeypatch: pytest.MonkeyPatch, model_type: str, package: str, path: str, name: str) -> Any:
    """Make a model's code find ``path`` in ``package``, as if the package had been installed when it was imported."""
    module: Any = for_gpus
    for part in reversed(path.split(".")):
        module = SimpleNamespace(**{part: module})
    monkeypatch.setitem(sys.modules, package, module)
    code = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    decorate = hub_kernels.use_kernel_func_from_hub_with_fallback(path.rpartition(".")[2], package)
    monkeypatch.setattr(code, name, decorate(inspect.unwrap(getattr(code, name))))
    with pytest.raises(RuntimeError, match="0 active drivers"):
        getattr(code, name)(torch.zeros(1))
    return code


@pytest.mark.parametrize(
    ("model_type", "package", "path", "name"),
    [
        ("qwen3_next", "fla", "ops.gated_delta_rule.chunk_gated_delta_rule", "torch_chunk_gated_delta_rule"),
        ("lfm2", "causal_conv1d", "causal_conv1d_fn", "causal_conv1d_fn"),
    ],
)
def test_a_hybrid_is_tried_and_split_where_its_kernels_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, package: str, path: str, name: str
) -> None:
    code = install(monkeypatch, model_type, package, path, name)
    config = tiny_families.tiny(model_type)
    tiny_families.write(config, tmp_path)
    layers = exact_layers(tmp_path, packed=True)
    assert layers.meta_model.by_document
    whole = tiny_families.write(config, tmp_path)
    assert compare_split(layers, whole, [2], train=True) == []
    assert compare_packed(layers, whole) == []
    assert vars(code)[name](torch.zeros(1).as_subclass(OnGPU)) == "by the kernel"


class OnGPU(Tensor):
    device = torch.device("cuda")  # type: ignore[assignment]


def test_a_plan_runs_on_the_meta_device_and_passes_over_no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_chunk_gated_delta_rule"
    code = install(monkeypatch, "qwen3_5", "fla", "ops.gated_delta_rule.chunk_gated_delta_rule", name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_families.tiny("qwen3_5_text"), dtype=torch.float32)
        hidden = torch.empty(1, 8, model.config.hidden_size)
    lend_to_gpus_alone(model)
    assert model.get_submodule("model.layers.0.linear_attn")(hidden).is_meta
    with pytest.raises(NotImplementedError, match="does not support packed documents"):
        vars(code)[name](torch.zeros(1), cu_seqlens=torch.tensor([0, 4, 8]))
