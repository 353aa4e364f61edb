"""What a simulation reports of a layer (memory held, memory retained, operations), against the real layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_pipelite.adapters import Adapter, Full, LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.models.quantization import fp8
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from lightning_pipelite.planning.meter import BLOCK
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.watched_stage import held_tensors
from operation_counts import Counts
from planned_layers import LENGTH, make_adam, make_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_in_4_bits_are_counted_with_their_scales(model_dir: Path, double_quant: bool) -> None:
    layers = make_layers(model_dir, LoRA(4), load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)
    _compare_held(layers, 1, 3)


def test_fused_experts_in_4_bits_are_counted_with_their_scales(mixtral_dir: Path) -> None:
    _compare_held(make_layers(mixtral_dir, LoRA(4), load_in_4bit=True), 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_fp8_are_counted_with_their_scales_and_products_by_their_codes(model_dir: Path, dtype: Any) -> None:
    layers = make_layers(model_dir, LoRA(4), dtype=dtype, load_in_fp8=True)
    if dtype == torch.float32:
        with pytest.warns(UserWarning, match="load_in_fp8"):
            _compare_held(layers, 1, 3)
    item = Simulation(layers, CausalLMLoss(), make_adam).trial(1, "keep", LENGTH).item
    frozen = [m for m in layers.build_stage(1, 2, torch.device("meta")).modules() if isinstance(m, Fp8Linear)]
    products = 4.0 * LENGTH * sum(m.codes.numel() for m in frozen)
    assert item.flops.get(1, 0) == (products if dtype == torch.bfloat16 else 0)
    assert (item.flops[dtype.itemsize] > products) == (dtype == torch.float32)


def test_transposed_copies_of_weights_in_fp8_are_counted_and_save_a_temporary_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    items = []
    for cache in (False, True):
        layers = make_layers(model_dir, LoRA(4), dtype=torch.bfloat16, load_in_fp8=True, fp8_transpose_cache=cache)
        items.append(Simulation(layers, CausalLMLoss(), make_adam).trial(1, "keep", LENGTH).item)
    one, two = items
    real = layers.build_stage(1, 2, CPU)
    copies = sum(copy.nbytes for name, copy in real.named_buffers() if name.endswith(".transposed_codes"))
    assert two.weights - one.weights == copies > 0
    assert two.moved < one.moved


@pytest.mark.parametrize("in_4bit", [False, True])
def test_fused_experts_are_planned(mixtral_dir: Path, in_4bit: bool) -> None:
    layers = make_layers(mixtral_dir, LoRA(4), dtype=torch.bfloat16, load_in_4bit=in_4bit)
    item = Simulation(layers, CausalLMLoss(), make_adam).trial(1, "recompute", LENGTH).item
    real = layers.build_stage(1, 2, CPU)
    assert item.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert item.backward > item.retained > 0
    assert item.flops[2] > 0


@pytest.mark.parametrize(("adapter", "of_frozen"), [(LoRA(4), 4), (Full(), 6)], ids=["LoRA", "Full"])
def test_all_products_of_a_layer_are_counted(model_dir: Path, adapter: Adapter, of_frozen: int) -> None:
    """Per token, each weight takes 2 operations forward and 2 for its input's gradient, and 2 more if it is trained."""
    layers = make_layers(model_dir, adapter)
    simulation = Simulation(layers, CausalLMLoss(), make_adam)
    one, two = (simulation.trial(2, "keep", tokens).item.flops[4] for tokens in (LENGTH, 2 * LENGTH))
    per_token = (4 * one - two) / (2 * LENGTH)  # without attention, which takes four times as many at twice the length
    real = layers.build_stage(2, 3, CPU).named_parameters()
    matrices = [p for name, p in real if ".layers.2." in name and p.ndim > 1]
    assert per_token == sum((6 if p.requires_grad else of_frozen) * p.numel() for p in matrices)


@pytest.mark.parametrize("adapter", [LoRA(4), Full()], ids=["LoRA", "Full"])
def test_all_products_of_experts_are_counted(mixtral_dir: Path, adapter: Adapter) -> None:
    """Only the experts that a token is routed to are counted."""
    layers = make_layers(mixtral_dir, adapter, dtype=torch.bfloat16)
    one, two = (
        Simulation(layers, CausalLMLoss(), make_adam).trial(1, "keep", tokens).item.flops for tokens in (64, 128)
    )
    per_token = (4 * one[2] - two[2]) / (2 * 64)
    real = layers.build_stage(1, 2, CPU).named_parameters()
    matrices = {name: p for name, p in real if ".layers.1." in name and p.ndim > 1}
    config = layers.meta_model.config
    share = config.num_experts_per_tok / config.num_local_experts
    assert sum(p.ndim == 3 for p in matrices.values()) == 2
    assert per_token == sum(
        (6 if p.requires_grad else 4) * p.numel() * (share if "experts" in name else 1) for name, p in matrices.items()
    )


@pytest.mark.parametrize("fused", [True, False])
def test_experts_with_adapters_retain_less_with_each_policy(
    mixtral_dir: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if not fused:  # PEFT's own layers
        monkeypatch.setattr("lightning_pipelite.adapters.lora.fuse_experts", lambda *_: None)
    layers = make_layers(mixtral_dir, LoRA(4), dtype=torch.bfloat16)

    def retained() -> list[int]:
        simulation = Simulation(layers, CausalLMLoss(), make_adam)
        policies = ("keep", "selective", "recompute", "offload")
        # Few tokens, so that the experts' weights are large beside them.
        return [simulation.trial(1, policy, 16).item.retained for policy in policies]

    keep, selective, recompute, offload = retained()
    assert keep > selective > recompute > offload
    # Selective now also keeps low-rank products; for PEFT's layers these are all B·A, in float32.
    monkeypatch.setattr("lightning_pipelite.models.memory.SHORT_SUM", 0)
    more = retained()[1]
    assert more > selective
    assert (more > keep) == (not fused)


@pytest.mark.parametrize("policy", ["selective", "recompute"])
def test_products_of_experts_are_computed_again_only_if_they_are_not_kept(mixtral_dir: Path, policy: Any) -> None:
    layers = make_layers(mixtral_dir, LoRA(4), dtype=torch.bfloat16, activation_memory=policy)
    stage = layers.build_stage(1, 2, CPU)
    hidden = torch.randn(1, 8, layers.meta_model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    output = stage((hidden, torch.arange(8)[None]))[0].sum()
    with Counts() as counts:
        output.backward()
    # Each of the two fused weights takes one with W and one with A forward, and one with W and one with B backward.
    again = counts.of["grouped_product"] - 4
    assert again == (0 if policy == "selective" else 4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "attention"])
@pytest.mark.parametrize("compiled", [False, True])
def test_of_experts_those_that_a_token_goes_to_are_counted(mixtral_dir: Path, targets: Any, compiled: bool) -> None:
    layers = make_layers(mixtral_dir, LoRA(4, target_modules=targets), compile_layers=compiled)
    simulation = Simulation(layers, CausalLMLoss(), make_adam)
    one, two = (simulation.trial(1, "keep", tokens).item.flops[4] for tokens in (LENGTH, 2 * LENGTH))
    real = layers.build_stage(1, 2, CPU).named_parameters()
    matrices = [(name, p) for name, p in real if ".layers.1." in name and p.ndim > 1]
    expected = sum(
        (6 if p.requires_grad else 4) * p.numel() * (2 / 4 if "experts" in name else 1) for name, p in matrices
    )
    assert (4 * one - two) / (2 * LENGTH) == expected


def _compare_held(layers: CausalLMLayers, start: int, stop: int) -> None:
    """Check that a stage on the meta device holds tensors of the same shapes and dtypes as the real one."""
    real, planned = (
        sorted((tuple(t.shape), str(t.dtype)) for t in held_tensors(layers.build_stage(start, stop, device)))
        for device in (CPU, torch.device("meta"))
    )
    assert planned == real


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizers_state_is_what_a_real_step_leaves(model_dir: Path, dtype: torch.dtype) -> None:
    layers = make_layers(model_dir, Full(), dtype=dtype)
    planned = Simulation(layers, CausalLMLoss(), make_adam).trial(1, "keep", 64).item
    parameters = [p for n, p in layers.build_stage(1, 2, CPU).named_parameters() if ".layers.1." in n]
    optimizer = make_adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert len(real) == (3 if dtype == torch.bfloat16 else 2) * len(parameters)  # bfloat16 adds Kahan's compensation
    assert planned.optimizer == sum(-(-t.nbytes // BLOCK) * BLOCK for t in real if t.ndim)
    assert planned.trained == sum(p.numel() for p in parameters)


def test_a_layer_retains_what_autograd_saves(model_dir: Path) -> None:
    layers = make_layers(model_dir, LoRA(4))
    trial = Simulation(layers, CausalLMLoss(), make_adam).trial(2, "keep", LENGTH)
    layers.activation_memory = "keep"
    stage = layers.build_stage(2, 3, CPU)
    layer = stage.causal_lm.model.layers[2]
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def begin(*_: Any) -> None:
        hooks.__enter__()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    hidden = torch.randn(1, LENGTH, 128, requires_grad=True)
    output = stage((hidden, torch.arange(LENGTH)[None]))[0]
    outside = {hidden.untyped_storage()._cdata, *(p.untyped_storage()._cdata for p in stage.parameters())}
    shared = [t for key, t in saved.items() if t.shape[-1] == 32 and t.numel() == LENGTH * 32]  # rotary cos and sin
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in outside) - sum(
        t.untyped_storage().nbytes() for t in shared
    )
    assert output.requires_grad
    # The output is held in addition to what is saved.
    assert trial.item.retained == pytest.approx(kept + hidden.nbytes, rel=0.03)
