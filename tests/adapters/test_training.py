"""Adapters trained by the strategy, in one to four processes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_lora_variants import four_bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapter_jobs import (
    DECAY,
    GAMMA,
    LR,
    SCALE,
    evaluate_sets,
    items,
    learning_rates,
    refused,
    resume,
    train,
    train_control_plainly,
    train_jobs,
)
from exact_training import Case, make_model
from lightning_pipelite.adapters import ControlAdapter, LoRA, load_control_adapter
from processes import Workers


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, Case("LoRA"), SCALE)
    return str(directory)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=limit, msg=name)


def test_control_adapters_equal_a_plain_loop(workers: Workers, model_dir: str, tmp_path: Path) -> None:
    adapter = ControlAdapter(4, gamma=GAMMA)
    results = {}
    for stages, replicas, pieces in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):
        output = str(tmp_path / f"{stages}-{replicas}")
        ranks = workers.run(stages * replicas, train, model_dir, adapter, stages, replicas, output, DECAY, pieces)
        results[stages, replicas] = ranks[0]
    start, _, steps, _ = results[1, 1]
    expected, losses = train_control_plainly(model_dir, start)
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert moved > 0.3 * LR
    assert abs(losses[-1] - losses[0]) > 1e-3
    for other_start, other_final, other_steps, loss in results.values():
        torch.testing.assert_close(other_start, start, rtol=0, atol=0)
        close(other_final, expected)
        for step, mean in zip(other_steps, losses, strict=True):
            assert step["train/loss"] == pytest.approx(mean, abs=1e-5)
        assert loss == pytest.approx(results[1, 1][3], abs=1e-5)
        for name in ("norms_avg", "norms_max", "weight_decay_min", "orthogonality_max"):
            last = f"train/{name}"
            assert other_steps[-1][last] == pytest.approx(steps[-1][last], rel=1e-3, abs=1e-9)
    assert steps[-1]["train/weight_decay_max"] > 0
    read = load_control_adapter(tmp_path / "2-1")
    for n, (q, _) in read.items():
        expected_q = results[2, 1][1][f"base_model.model.model.layers.{n}.control_Q"]
        torch.testing.assert_close(q, expected_q, rtol=0, atol=0)


@pytest.mark.parametrize("adapter", [ControlAdapter(4, gamma=GAMMA), LoRA(4)], ids=["control", "lora"])
def test_resumed_in_another_number_of_stages(workers: Workers, model_dir: str, tmp_path: Path, adapter: Any) -> None:
    half, whole = (str(tmp_path / name) for name in ("half.ckpt", "whole.ckpt"))
    (expected,) = workers.run(1, resume, model_dir, adapter, 1, whole, 2, False)
    (middle,) = workers.run(1, resume, model_dir, adapter, 1, half, 1, False)
    for pieces in (1, 2):
        close(workers.run(2, resume, model_dir, adapter, 2, half, 2, True, pieces)[0], expected)
    assert max(float((expected[name] - middle[name]).abs().max()) for name in expected) > 0.1 * LR


def sums_of(model: Any, data: list[dict[str, Tensor]]) -> tuple[float, int]:
    """Return the summed loss over some sequences, and the number of labels."""
    total, count = 0.0, 0
    with torch.no_grad():
        for item in data:
            tokens, positions, labels = (item[key][None] for key in ("input_ids", "position_ids", "labels"))
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
            total += float(nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
            count += int((labels != -100).sum())
    return total, count


LORAS: list[tuple[LoRA, dict[str, Any]]] = [
    (LoRA(4), {}),
    (LoRA(4), {"load_in_4bit": True}),
    (LoRA(4, use_dora=True), {}),
    (LoRA(4, init_lora_weights="pissa"), {}),
]


def test_loras_are_the_same_in_1_2_and_4_stages_and_in_peft(workers: Workers, model_dir: str, tmp_path: Path) -> None:
    found = {}
    for stages, pieces in ((1, 1), (2, 2), (4, 1)):
        # Four stages have the cuts of two with two pieces each. So one LoRA is enough, whose start depends on weights.
        chosen = LORAS[-1:] if stages == 4 else LORAS
        jobs = [(adapter, str(tmp_path / f"{i}-{stages}"), 2.0, options) for i, (adapter, options) in enumerate(chosen)]
        found[stages] = workers.run(stages, train_jobs, model_dir, jobs, stages, pieces)[0]
    for index, (adapter, options) in enumerate(LORAS):
        start, final, _, loss = found[1][index]
        for stages in (1, 2, 4):
            place = index - len(LORAS)  # from the end: four stages have only the last one
            if -place > len(found[stages]):
                continue
            torch.testing.assert_close(found[stages][place][0], start, rtol=0, atol=0)
            close(found[stages][place][1], final)
            if stages < 4:
                model = AutoModelForCausalLM.from_pretrained(
                    model_dir, dtype=torch.float32, quantization_config=four_bit() if options else None
                ).train()
                directory = tmp_path / f"{index}-{stages}"
                loaded = PeftModel.from_pretrained(model, directory, is_trainable=True)
                total, count = sums_of(loaded, items())
                assert total / count == pytest.approx(found[stages][index][3], abs=1e-5), adapter
        assert max(float((final[name] - start[name]).abs().max()) for name in start) > 0.3 * LR
        assert math.isfinite(loss)


@pytest.mark.parametrize("in_4bit", [False, True], ids=["full", "4-bit"])
def test_experts_in_two_stages(workers: Workers, tmp_path: Path, in_4bit: bool) -> None:
    model_dir = str(tmp_path / "model")
    make_model(Path(model_dir), Case("LoRA", experts=True), SCALE)  # with its routers' loss
    adapter = LoRA(2, target_modules=["gate_up_proj", "down_proj"])
    options = {"load_in_4bit": in_4bit}
    results = [
        workers.run(n, train_jobs, model_dir, [(adapter, str(tmp_path / f"{n}"), 2.0, options)], n, n)[0][0]
        for n in (1, 2)  # two stages have two pieces each
    ]
    assert len(results[0][0]) == 4 * 2 * 2
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    close(results[1][1], results[0][1])
    assert results[1][2][-1]["train/norms_max"] == pytest.approx(results[0][2][-1]["train/norms_max"], rel=1e-4)
    assert all(tensor.any() for tensor in results[0][1].values())


def test_evaluation_sets(workers: Workers, model_dir: str) -> None:
    (one,), two = (workers.run(n, evaluate_sets, model_dir, n, LoRA(2)) for n in (1, 2))
    assert one.keys() == {"eval/loss", "eval/loss/short", "eval/loss/long", "eval/perplexity"}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    sums = {"short": sums_of(model, items()[:5]), "long": sums_of(model, items()[5:16])}
    loss = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    for metrics in (one, *two):
        for name, (total, count) in sums.items():
            assert metrics[f"eval/loss/{name}"] == pytest.approx(total / count, abs=1e-5)
        assert metrics["eval/loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_any_optimizer_with_groups_and_a_schedule(workers: Workers, model_dir: str) -> None:
    options: dict[str, Any] = {
        "lr": 1e-3, "optimizer": partial(torch.optim.AdamW, weight_decay=0.1), "schedule": "cosine", "warmup_steps": 2,
        "parameter_groups": {r"layers\.3\..*lora_B": {"lr": 1e-2}},
    }  # fmt: skip
    results = workers.run(2, with_options, model_dir, options)
    for rates, held, kind in results:
        assert kind == "AdamW"
        factors = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
        assert [rate for rate, _ in rates] == pytest.approx([1e-3 * factor for factor in factors])
        assert [rate for _, rate in rates] == pytest.approx([1e-2 * factor for factor in factors])
        assert len(held) == 2
    assert results[0][1][1] == []
    assert [name.endswith("layers.3.self_attn.q_proj.lora_B.default.weight") for name in results[1][1][1]] == [True]


def with_options(model_dir: str, options: dict[str, Any]) -> Any:
    return learning_rates(model_dir, 2, LoRA(2, target_modules=["q_proj"]), **options)


def refusals(model_dir: str, cases: list[dict[str, Any]]) -> list[str]:
    return [refused(model_dir, **case) for case in cases]


def test_what_does_not_fit_is_told(workers: Workers, model_dir: str) -> None:
    cases = [
        ({"adapter": ControlAdapter(2)}, "ControlAdapter needs control_classes in every batch"),
        ({"adapter": LoRA(2), "parameter_groups": {"lora_C": {"lr": 1.0}}}, "'lora_C' matches no trainable parameter"),
        ({"adapter": LoRA(2), "parameter_groups": {"lora_B": {"momentum": 1.0}}}, "lora_B sets momentum"),
        ({"adapter": LoRA(2), "optimizer": torch.optim.SGD}, "no second beta"),
        ({"adapter": LoRA(2), "optimizer": torch.optim.AdamW, "beta2": 0.9}, "default optimizer"),
        ({"adapter": LoRA(2), "schedule": "linear"}, "schedule is 'linear'"),
        ({"adapter": LoRA(2), "schedule": "cosine", "warmup_steps": 5}, "cosine with 5 warmup_steps"),
    ]
    for said, (_, word) in zip(workers.run(1, refusals, model_dir, [case for case, _ in cases])[0], cases, strict=True):
        assert said.startswith("ConfigurationError"), said
        assert word in said
