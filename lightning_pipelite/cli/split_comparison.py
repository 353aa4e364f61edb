"""Compares a model in stages with the same model unsplit: weights, logits, every gradient, and packed documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pipelite.adapters import Full
from lightning_pipelite.cli.command_options import Split
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.stage import Stage

LIMIT = 1e-5  # of the largest value if that is more than 1
DOCUMENTS = (5, 7)  # tokens of each packed document


def exact_layers(
    model_dir: Path, *, packed: bool, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> CausalLMLayers:
    """Return the layers of a model in float32 or float64, all trained, with recomputation if their class allows it."""
    options: dict[str, Any] = {"packed": packed, "trust_remote_code": trust_remote_code}
    try:
        return CausalLMLayers(model_dir, dtype=dtype, adapter=Full(), **options)
    except ConfigurationError as refusal:
        if "activation_memory to keep" not in str(refusal):
            raise
    return CausalLMLayers(model_dir, dtype=dtype, adapter=Full(), activation_memory="keep", **options)


def tokens() -> tuple[Tensor, Tensor]:
    """Return input ids and labels, int64 [2, 12] each."""
    return torch.randint(3, 120, (2, 2, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(1)).unbind()  # type: ignore[return-value]


def build(layers: CausalLMLayers, stages: Split) -> list[Stage]:
    """Build the stages of an even split on the CPU, or all of their pieces in the model's order."""
    cuts = itertools.pairwise(even_cuts(len(layers), pieces_of(stages)))
    return [layers.build_stage(start, stop, torch.device("cpu")) for start, stop in cuts]


def even_cuts(items: int, stages: int) -> list[int]:
    """Return the first item of each of ``stages`` stages of even size, and the end of the last."""
    return [-(-items * i // stages) for i in range(stages + 1)]


def pieces_of(split: Split) -> int:
    """Return the total number of pieces of a split."""
    return split if isinstance(split, int) else split[0] * split[1]


def in_words(split: Split) -> str:
    """Return a split in words, for messages."""
    return f"{split} stage{'s' * (split > 1)}" if isinstance(split, int) else f"{split[0]} stages of {split[1]} pieces"


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean loss of logits [batch, seq, vocabulary] and labels [batch, seq]."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def compare_split(
    layers: CausalLMLayers, whole: PreTrainedModel, counts: Sequence[Split], *, train: bool = False
) -> list[str]:
    """Compare weights, logits and gradients of every split with the unsplit model's; return up to three differences."""
    input_ids, labels = tokens()
    positions = torch.arange(sum(DOCUMENTS)).expand(2, -1)
    whole.train(train)  # in training mode stages recompute, and dropout masks differ between stages
    named = dict(whole.named_parameters(remove_duplicate=False))
    buffers = dict(whole.named_buffers())
    expected = whole(input_ids=input_ids, use_cache=False).logits
    cross_entropy(expected, labels).backward()
    wrong = []
    for count in counts:
        stages = [stage.train(train) for stage in build(layers, count)]
        held = set()
        for stage in stages:
            for name, tensor in (*stage.causal_lm.named_parameters(), *stage.causal_lm.named_buffers()):
                reference = named[name] if name in named else buffers[name]
                held.add(id(reference))
                if not torch.equal(tensor, reference):
                    wrong.append(f"{in_words(count)}: {name} differs from the files")
        missing = [name for name, parameter in whole.named_parameters() if id(parameter) not in held]
        if missing:
            wrong.append(f"{in_words(count)}: no stage holds {missing[0]}")
        logits, gradients = run_backward(stages, input_ids, positions, labels)
        if (difference := relative(logits, expected)) > LIMIT:
            wrong.append(f"{in_words(count)}: logits differ by {difference:.1e}")
        summed: dict[int, Tensor] = {}
        for name, gradient in gradients:
            summed[id(named[name])] = summed.get(id(named[name]), torch.zeros(())) + gradient
        for name, parameter in whole.named_parameters():
            found = summed.get(id(parameter))
            wanted = parameter.grad
            if wanted is None or found is None:
                if (wanted if found is None else found) is not None and (wanted if found is None else found).any():
                    wrong.append(f"{in_words(count)}: only one of the two models has a gradient for {name}")
            elif (difference := relative(found, wanted)) > LIMIT:
                wrong.append(f"{in_words(count)}: the gradient of {name} differs by {difference:.1e}")
    return wrong[:3]


def run_backward(
    stages: list[Stage], input_ids: Tensor, positions: Tensor, labels: Tensor
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Run forward and backward as a pipeline does; return the logits, and the gradients with parameter names."""
    tape: list[tuple[Tensor, Tensor]] = []
    received = input_ids
    for stage in stages:
        received = received.detach().requires_grad_(received.is_floating_point())
        output = stage((received, positions))
        output = output if isinstance(output, Tensor) else output[0]
        tape.append((received, output))
        received = output
    logits = received.detach()
    tape[-1] = (tape[-1][0], cross_entropy(received, labels))
    gradient = None
    for received, output in reversed(tape):
        output.backward(gradient)
        gradient = received.grad
    named = [(n, p.grad) for stage in stages for n, p in stage.causal_lm.named_parameters() if p.grad is not None]
    return logits, named


@torch.no_grad()
def compare_packed(layers: CausalLMLayers, whole: PreTrainedModel) -> list[str]:
    """Compare packed documents in two stages with each document alone in the unsplit model."""
    whole.eval()
    input_ids = tokens()[0][:1]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    passed: Any = (input_ids, positions)
    for stage in build(layers, min(2, len(layers))):
        passed = stage.eval()(passed)
    alone = [whole(input_ids=ids, use_cache=False).logits for ids in input_ids.split(DOCUMENTS, dim=1)]
    difference = relative(passed, torch.cat(alone, dim=1))
    unpacked = whole(input_ids=input_ids, use_cache=False).logits[:, DOCUMENTS[0] :]
    wrong = [f"packed documents differ from each document alone by {difference:.1e}"] if difference > LIMIT else []
    if relative(unpacked, alone[1]) < 100 * LIMIT:
        wrong.append("packing was not tested: even without a mask, the preceding document changes nothing")
    return wrong


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of ``b`` if that is more than 1."""
    if a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return float("inf")
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0
