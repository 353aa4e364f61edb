"""What is planned for a stage, against stages that run on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from optimi import Adam
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lightning_pipelite.adapters import Adapter, ControlAdapter, Full, LoRA
from lightning_pipelite.models import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.models.quantization.fp8 import Fp8Linear
from lightning_pipelite.planning.meter import BLOCK
from lightning_pipelite.planning.simulation import Simulation
from lightning_pipelite.planning.stages import WORKSPACE, stage_memory
from lightning_pipelite.planning.watched_stage import held_tensors
from lightning_pipelite.strategy.interleaved_1f1b import interleaved_1f1b
from lightning_pipelite.strategy.partition import spans_of
from lightning_pipelite.strategy.pieces import Pieces
from lightning_pipelite.strategy.timeline import simulate
from operation_counts import Counts

CPU = torch.device("cpu")
LENGTH = 256
ROUNDING = 64 * BLOCK  # of a few dozen tensors, each to whole blocks of the CUDA allocator
MICRO_BATCHES = 4


def make_adam(parameters: list[nn.Parameter]) -> Adam:
    return Adam(parameters, lr=1e-3)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


def make_layers(model_dir: Path, adapter: Adapter, **options: Any) -> CausalLMLayers:
    # Attention in plain operations: other code keeps other things on a CPU than on a GPU.
    options = {"dtype": torch.float32, "attn_implementation": "eager", "compile_layers": False, **options}
    return CausalLMLayers(model_dir, adapter=adapter, fuse_head=False, **options)


def train_on_cpu(layers: CausalLMLayers, start: int, stop: int, micro_batches: int) -> tuple[int, int]:
    """Train a real stage; return the bytes of its weights, and the most that was held, by torch's own allocator."""
    stage = layers.build_stage(start, stop, CPU)
    size = layers.meta_model.config.hidden_size
    weights = sum({t.untyped_storage().data_ptr(): t.nbytes for t in (*stage.parameters(), *stage.buffers())}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(micro_batches):
            positions = torch.arange(LENGTH)[None]
            extra = [torch.ones_like(positions) for _ in layers.adapter.batch_keys]
            first: Tensor = torch.zeros_like(positions)
            if start:
                first = torch.randn(1, LENGTH, size, requires_grad=True)
            outputs = stage((first, positions, *extra))
            if stop == len(layers):
                outputs = CausalLMLoss()(outputs, torch.zeros_like(positions))[:1]
            root = outputs[0]
            gradient = None if root.ndim == 0 else torch.ones_like(root)
            del outputs, first, positions, extra
            root.backward(gradient)
            del root, gradient
    return weights, weights + most_allocated(profiler)


def most_allocated(profiler: profile) -> int:
    """The most bytes that were held at once of what was allocated while the profiler ran.

    By its totals, as its times, which a virtual machine's cores tell, may be out of order.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    allocated = [event["args"] for event in events if event.get("name") == "[memory]"]
    first = min(allocated, key=lambda event: event["Ev Idx"])
    return max(each["Total Allocated"] for each in allocated) - (first["Total Allocated"] - first["Bytes"])


def train_pieces_on_cpu(layers: CausalLMLayers, spans: list[tuple[int, int]], stage: int, stages: int) -> int:
    """Train the pieces of a stage in the order of the schedule; return the most that was held."""
    pieces = Pieces([layers.build_stage(*span, CPU) for span in spans], spans)
    size = layers.meta_model.config.hidden_size
    held: dict[tuple[int, int], Any] = {}
    weights = sum({t.untyped_storage().data_ptr(): t.nbytes for t in held_tensors(pieces)}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for action in interleaved_1f1b(stages, len(spans), MICRO_BATCHES).orders[stage]:
            place, (start, stop) = (action.piece, action.micro_batch), spans[action.piece // stages]
            if action.backward:
                gradient = torch.ones(1, LENGTH, size) if action.piece < stages * len(spans) - 1 else None
                torch.autograd.backward([held.pop(place)], [gradient])
                del gradient
                continue
            positions = torch.arange(LENGTH)[None]
            first = torch.randn(1, LENGTH, size, requires_grad=True) if start else torch.zeros_like(positions)
            outputs = pieces[action.piece // stages]((first, positions))
            if stop == len(layers):
                held[place] = CausalLMLoss()(outputs, torch.zeros_like(positions))[0]
            else:
                held[place] = torch.autograd.graph.get_gradient_edge(outputs[0])
            del outputs, first, positions
    return weights + most_allocated(profiler)


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("stage", [0, 1])
def test_pieces_take_what_is_planned(model_dir: Path, policy: str, stage: int) -> None:
    layers = make_layers(model_dir, LoRA(4))
    spans = spans_of([0, 1, 2, 4, 5], 2, stage)
    planned = stage_memory(
        Simulation(layers, CausalLMLoss(), make_adam), spans,
        stage=stage, stages=2, micro_batches=MICRO_BATCHES, policy=policy, sequence_len=LENGTH,
    )  # fmt: skip
    layers.activation_memory = policy  # type: ignore[assignment]
    peak = train_pieces_on_cpu(layers, spans, stage, 2)
    # Of what is received there is the gradient of the pass here. The plan has all gradients of the weights from the
    # beginning on, when some pieces have not run backward yet.
    taken = planned.peak - planned.optimizer - planned.exchange + planned.hidden - WORKSPACE
    assert 0.99 * peak <= taken <= 1.05 * peak
    step = simulate(interleaved_1f1b(2, 2, MICRO_BATCHES), [1.0] * 4, [2.0] * 4)
    assert planned.in_flight == step.in_flight[stage]


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("adapter", [LoRA(4), Full(), ControlAdapter(4)], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bounds", [(0, 5), (0, 2), (1, 4), (3, 5)])
def test_a_stage_takes_what_is_planned(model_dir: Path, adapter: Adapter, policy: str, bounds: tuple[int, int]) -> None:
    layers = make_layers(model_dir, adapter)
    planned = stage_memory(
        Simulation(layers, CausalLMLoss(), make_adam), [bounds],
        stage=0, stages=1, micro_batches=2, policy=policy, sequence_len=LENGTH,
    )  # fmt: skip
    layers.activation_memory = policy  # type: ignore[assignment]
    weights, peak = train_on_cpu(layers, *bounds, 2)
    assert planned.weights == pytest.approx(weights, abs=ROUNDING)
    assert planned.peak - planned.optimizer - planned.exchange - WORKSPACE == pytest.approx(peak, rel=0.03)


def test_more_micro_batches_in_flight_take_as_much_more_as_is_retained(model_dir: Path) -> None:
    simulation = Simulation(make_layers(model_dir, LoRA(4)), CausalLMLoss(), make_adam)
    one, two = (
        stage_memory(simulation, [(0, 2)], stage=0, stages=stages, micro_batches=8, policy="keep", sequence_len=LENGTH)
        for stages in (1, 2)
    )
    assert (one.in_flight, two.in_flight) == (1, 2)
    assert two.activations == 2 * one.activations
    assert two.peak - one.peak == pytest.approx(one.activations, rel=0.05)


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
    """Of each weight 2 a token forward and 2 for what it is multiplied with, 2 more if it is trained."""
    layers = make_layers(model_dir, adapter)
    simulation = Simulation(layers, CausalLMLoss(), make_adam)
    one, two = (simulation.trial(2, "keep", tokens).item.flops[4] for tokens in (LENGTH, 2 * LENGTH))
    per_token = (4 * one - two) / (2 * LENGTH)  # without attention, which takes four times as many for twice the tokens
    real = layers.build_stage(2, 3, CPU).named_parameters()
    matrices = [p for name, p in real if ".layers.2." in name and p.ndim > 1]
    assert per_token == sum((6 if p.requires_grad else of_frozen) * p.numel() for p in matrices)


def test_all_products_of_experts_are_counted(mixtral_dir: Path) -> None:
    """Of the experts as many as a token is sent to; and what a LoRA multiplies to add to their weights."""
    layers = make_layers(mixtral_dir, Full(), dtype=torch.bfloat16)
    one, two = (
        Simulation(layers, CausalLMLoss(), make_adam).trial(1, "keep", tokens).item.flops for tokens in (64, 128)
    )
    per_token = (4 * one[2] - two[2]) / (2 * 64)
    real = layers.build_stage(1, 2, CPU).named_parameters()
    matrices = {name: p for name, p in real if ".layers.1." in name and p.ndim > 1}
    config = layers.meta_model.config
    share = config.num_experts_per_tok / config.num_local_experts
    assert sum(p.ndim == 3 for p in matrices.values()) == 2
    assert per_token == sum(6 * p.numel() * (share if p.ndim == 3 else 1) for p in matrices.values())


@pytest.mark.parametrize("fused", [True, False])
def test_experts_with_adapters_retain_less_with_each_policy(
    mixtral_dir: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if not fused:  # as PEFT does it
        monkeypatch.setattr("lightning_pipelite.adapters.lora.fuse_experts", lambda *_: None)
    layers = make_layers(mixtral_dir, LoRA(4), dtype=torch.bfloat16)

    def retained() -> list[int]:
        simulation = Simulation(layers, CausalLMLoss(), make_adam)
        policies = ("keep", "selective", "recompute", "offload")
        # Of few tokens, so that the experts' weights are much beside them.
        return [simulation.trial(1, policy, 16).item.retained for policy in policies]

    keep, selective, recompute, offload = retained()
    assert keep > selective > recompute > offload
    monkeypatch.setattr("lightning_pipelite.models.memory.SHORT_SUM", 0)  # also B·A of all experts, in float32
    assert fused or retained()[1] > keep


@pytest.mark.parametrize("policy", ["selective", "recompute"])
def test_products_of_experts_are_computed_again_only_if_they_are_not_kept(mixtral_dir: Path, policy: Any) -> None:
    layers = make_layers(mixtral_dir, LoRA(4), dtype=torch.bfloat16, activation_memory=policy)
    stage = layers.build_stage(1, 2, CPU)
    hidden = torch.randn(1, 8, layers.meta_model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    output = stage((hidden, torch.arange(8)[None]))[0].sum()
    with Counts() as counts:
        output.backward()
    # Forward two with W and one with A for each; in the backward pass one with W and one with B for each.
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
    """On the meta device a stage holds tensors of the shapes and types that it really has."""
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
    assert len(real) == (3 if dtype == torch.bfloat16 else 2) * len(parameters)  # Kahan's compensation
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
    # Beside what is saved the output is held.
    assert trial.item.retained == pytest.approx(kept + hidden.nbytes, rel=0.03)
