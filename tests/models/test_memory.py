"""Every activation memory policy gives the same results, and so do compiled layers, which share their graphs."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_pipelite.adapters import ControlAdapter, Full, LoRA
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.memory import set_activation_memory
from lightning_pipelite.models.offload import AHEAD, HostCopies
from lightning_pipelite.models.tiny import tiny_config
from operation_counts import Counts
from tiny_models import (
    CPU,
    POSITIONS,
    build,
    classes_for,
    give_b_values,
    micro_batches,
    reference,
    train_stages,
    train_whole,
    write_model,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("memory"), "llama")


def compile_with(stage: Any, backend: Any) -> None:
    """Use ``backend`` for the layers that are compiled, as the default one is for GPUs."""
    for layer in stage.causal_lm.model.layers:
        if layer._compiled_call_impl is not None:
            layer._compiled_call_impl = torch.compile(layer._call_impl, backend=backend, dynamic=False)


@pytest.mark.parametrize("policy", ["keep", "selective", "recompute", "offload"])
def test_same_logits_and_gradients(model_dir: Path, policy: str) -> None:
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full(), activation_memory=policy)  # type: ignore[arg-type]
    logits, gradients = train_stages(build(layers, [0, 2, 4]))
    expected, expected_gradients = train_whole(reference(model_dir))
    torch.testing.assert_close(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_what_is_kept_can_be_set_anew(model_dir: Path) -> None:
    layers = CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full(), activation_memory="recompute")
    (stage,) = build(layers, [0, 4])
    decoder = stage.causal_lm.model.layers
    runs: Counter[int] = Counter()
    for number, layer in enumerate(decoder):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    for policy, times in (("recompute", 2), ("keep", 1), ("offload", 2), ("keep", 1), ("selective", 2)):
        set_activation_memory(decoder, policy, CPU, compiled=False)
        runs.clear()
        train_stages([stage])
        assert runs == {number: times * len(micro_batches()) for number in range(4)}, policy


@pytest.mark.parametrize(
    ("policy", "compiled", "products", "others"),
    [
        ("keep", False, 0, 0),
        ("selective", False, 0, 4),
        ("recompute", False, 16, 4),
        ("keep", True, 0, 0),
        ("selective", True, 0, 0),
        ("recompute", True, 12, 0),  # not each layer's last product; the compiler fuses silu into its gradient
    ],
)
def test_what_is_computed_again(model_dir: Path, policy: Any, compiled: bool, products: int, others: int) -> None:
    layers = CausalLMLayers(
        model_dir, dtype=torch.float32, adapter=LoRA(4), activation_memory=policy, compile_layers=compiled,
        attn_implementation="varlen",
    )  # fmt: skip
    (stage,) = build(layers, [0, 4])
    if compiled:
        compile_with(stage, "aot_eager_decomp_partition")
    output = stage((torch.zeros_like(POSITIONS), POSITIONS)).sum()
    with Counts() as counts:
        output.backward()
    # Four groups of projections in each layer: query, key and value; output; gate and up; down.
    assert counts.of["lora_linear_backward"] == 16
    assert counts.of["lora_linear"] == products
    assert counts.of["silu"] == others


@pytest.mark.parametrize("adapter", [LoRA(4), ControlAdapter(4)], ids=["LoRA", "ControlAdapter"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_compiled_layers_are_one_graph_and_the_same(model_dir: Path, adapter: Any, policy: Any) -> None:
    import torch._dynamo.testing as testing

    def run(compile_layers: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        layers = CausalLMLayers(
            model_dir, dtype=torch.float32, adapter=adapter, activation_memory=policy, compile_layers=compile_layers,
            attn_implementation="varlen",
        )  # fmt: skip
        stages = build(layers, [0, 2, 4])
        for stage in stages:
            compile_with(stage, counter)
        give_b_values(stages)
        return train_stages(stages, classes=classes_for(adapter))

    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    logits, gradients = run(True)
    # One for the first layer, whose input requires no gradient, one for the rest of its stage, one for the other stage.
    assert counter.frame_count == 3
    expected, expected_gradients = run(False)
    torch.testing.assert_close(logits, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("kind", "well"),
    [("llama", True), ("gemma3_text", True), ("mixtral", True), ("gpt_oss", True), ("llama4_text", False)],
)
def test_layers_whose_experts_are_computed_one_by_one_are_not_compiled_by_default(
    tmp_path: Path, kind: str, well: bool
) -> None:
    AutoModelForCausalLM.from_config(tiny_config(CONFIG_MAPPING[kind]())).save_pretrained(tmp_path)
    layers = CausalLMLayers(tmp_path, adapter=LoRA(4, target_modules=["q_proj"]))
    assert layers.compiles_on(torch.device("cuda")) == well
    assert not layers.compiles_on(CPU)


def test_a_wrong_policy_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="activation_memory is 'some'; set it to one of auto, keep"):
        CausalLMLayers(model_dir, adapter=LoRA(4), activation_memory="some")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_host_copies_come_back() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    copies = HostCopies(device)
    weights = [torch.randn(1024, 1024, device=device, requires_grad=True) for _ in range(6)]

    def run(hooks: Any) -> tuple[list[Tensor], int]:
        x = torch.randn(2048, 1024, device=device, generator=torch.Generator(device).manual_seed(0))
        before = torch.cuda.memory_allocated()
        for weight in weights:
            with hooks(x):
                x = (x @ weight).sin()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what was kept until its copy ended is free by now
        held = torch.cuda.memory_allocated() - before
        return list(torch.autograd.grad(x.square().sum(), weights)), held

    expected, kept = run(lambda x: contextlib.nullcontext())
    for _ in range(3):  # later runs reuse the buffers of the first
        torch.cuda.synchronize()
        found, held = run(copies.of)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.cuda.synchronize()
    assert held < 0.7 * kept  # the products that sin() saves stay on the GPU
    assert len(copies._free) == len(weights)
    assert not copies._kept


@pytest.mark.gpu
def test_what_waits_to_be_copied_is_bounded() -> None:
    """Even though the host queues all layers before the GPU has run the first."""
    device = torch.device("cuda", torch.cuda.current_device())
    copies = HostCopies(device)
    x = torch.randn(1024, 1024, device=device, requires_grad=True)
    layers, size = 16, x.nbytes
    for number in range(2):  # the first pass allocates the host buffers, which blocks
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(layers):
            with copies.of(x):
                x = x.square()  # saves only its input
            torch.cuda._sleep(10_000_000)
        peak = torch.cuda.max_memory_allocated() - before
        assert number == 0 or peak < (AHEAD + 4) * size < layers * size
        x.sum().backward()
        x = torch.randn(1024, 1024, device=device, requires_grad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("compile_layers", [False, True])
def test_policies_on_a_gpu(model_dir: Path, policy: Any, compile_layers: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    for kind, where in ((policy, device), ("keep", CPU)):
        layers = CausalLMLayers(
            model_dir, dtype=torch.float32, adapter=LoRA(4), activation_memory=kind,
            compile_layers=compile_layers and where == device,
        )  # fmt: skip
        stage = layers.build_stage(0, 4, where)
        output = stage((torch.arange(24).view(2, 12).to(where), POSITIONS.to(where)))
        output.sum().backward()
        results.append([output.cpu(), *(p.grad.cpu() for p in stage.parameters() if p.grad is not None)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
