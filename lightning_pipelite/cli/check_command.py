"""Whether a model trains as a pipeline exactly as it does whole: ``pipelite check`` and benchmarks/coverage.py."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lightning_pipelite.adapters import Full
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.companions import copy_to, own_code
from lightning_pipelite.models.contents import TEXT_MODEL_NAMES
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stage import Stage
from lightning_pipelite.strategy.partition import check_virtual_stages

LIMIT = 1e-5  # of the largest value where that is more than 1
DOCUMENTS = (5, 7)  # tokens of the documents that are packed

Split = int | tuple[int, int]
"""A number of stages; or that and the number of pieces of each."""


@dataclass
class CheckReport:
    """What :func:`check_model` found.

    Attributes:
        stage_bytes: For each split, the bytes of the weights of each stage in bfloat16.
        differences: What differs between the split and the unsplit model, a sentence each; empty if all is exact.
        packing: Whether packed documents are kept apart; if not, train with ``packed: false``.
    """

    stage_bytes: dict[Split, list[int]]
    differences: list[str]
    packing: bool

    def __str__(self) -> str:
        lines = [
            f"{_in_words(split)}: {', '.join(f'{size / 1e9:.2f} GB' for size in sizes)}"
            for split, sizes in self.stage_bytes.items()
        ]
        lines += self.differences or ["Split and unsplit agree: weights, logits and every gradient."]
        lines.append(
            "Packed documents equal each document alone."
            if self.packing
            else "This model cannot keep packed documents apart: set packed to false."
        )
        return "\n".join(lines)


def check_model(
    model_dir: str | Path, stages: Sequence[Split] = (1, 2, 4), *, tiny: bool = False, trust_remote_code: bool = False
) -> CheckReport:
    """Hold a model, split into stages, against the same model unsplit, on the CPU in float32.

    Args:
        model_dir: Directory of a Hugging Face causal LM.
        stages: Numbers of stages to try, or pairs of that and the number of pieces of each.
        tiny: Try a tiny random model of the same class and depth; the weights of ``model_dir`` are then not read.
        trust_remote_code: Run the model's own code, if it has any.

    Raises:
        ConfigurationError: The model is refused, or has fewer items to deal out than a number of stages.
    """
    meta_model = MetaModel(model_dir, trust_remote_code=trust_remote_code)
    items = len(meta_model.groups) - 1
    if meta_model.one_stage_only and set(stages) != {1}:
        raise ConfigurationError(
            f"{model_dir}: a model of type {meta_model.config.model_type} trains in one stage only because "
            f"{meta_model.one_stage_only}; set stages to 1."
        )
    for split in stages:
        if not 1 <= (count := _pieces(split)) <= items:
            raise ConfigurationError(f"stages: {count} is not between 1 and {items}, what {model_dir} can be cut into.")
        if isinstance(split, tuple):
            check_virtual_stages(*split)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(model_dir)
        if tiny:
            directory = Path(temporary)
            meta_model.tiny().save_pretrained(directory)
            copy_to(directory, meta_model.model_dir, own_code(meta_model.model_dir))
        layers = exact_layers(directory, packed=meta_model.isolates_documents, trust_remote_code=trust_remote_code)
        whole = AutoModelForCausalLM.from_pretrained(
            directory,
            config=layers.meta_model.config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            key_mapping=TEXT_MODEL_NAMES if layers.meta_model.is_text_part else None,
        )
        differences = compare_split(layers, whole, stages)
        if layers.packed:
            differences += compare_packed(layers, whole)
    sizes = meta_model.parameter_counts()
    stage_bytes: dict[Split, list[int]] = {}
    for split in stages:
        cuts = itertools.pairwise(_cuts(items, _pieces(split)))
        pieces = [2 * sum(sizes[start:stop]) for start, stop in cuts]
        number = split if isinstance(split, int) else split[0]
        stage_bytes[split] = [sum(pieces[stage::number]) for stage in range(number)]
    return CheckReport(stage_bytes, differences, layers.packed)


def check(model_dir: str, stages: str = "1,2,4", tiny: bool = False, trust_remote_code: bool = False) -> CheckReport:
    """Hold a model, split into stages, against the same model unsplit, on the CPU in float32.

    The exit status is 1 where they differ.

    Args:
        model_dir: Directory of a Hugging Face causal LM.
        stages: Numbers of stages to try; 2x4 is two stages of four pieces each (virtual_stages).
        tiny: Try a tiny random model of the same class and depth; the weights of MODEL_DIR are then not read.
        trust_remote_code: Run the model's own Python code, if it has any.
    """
    try:
        counts = [_read(text) for text in stages.strip("[]").split(",")]
    except ValueError:
        raise ConfigurationError(f"stages must be integers with commas between them, not {stages!r}.") from None
    disable_progress_bar()  # one for each stage of each partition tells nothing
    report = check_model(model_dir, counts, tiny=tiny, trust_remote_code=trust_remote_code)
    if report.differences:
        print(report, flush=True)
        sys.exit(1)
    return report


def exact_layers(model_dir: Path, *, packed: bool, trust_remote_code: bool = False) -> CausalLMLayers:
    """Return the layers of a model in float32, all trained, that recompute if their class can."""
    options: dict[str, Any] = {"packed": packed, "trust_remote_code": trust_remote_code}
    try:
        return CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full(), **options)
    except ConfigurationError as refusal:
        if "activation_memory to keep" not in str(refusal):
            raise
    return CausalLMLayers(model_dir, dtype=torch.float32, adapter=Full(), activation_memory="keep", **options)


def tokens() -> tuple[Tensor, Tensor]:
    """Return input ids and labels, [2, 12]."""
    return torch.randint(3, 120, (2, 2, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(1)).unbind()  # type: ignore[return-value]


def _read(text: str) -> Split:
    stages, by, pieces = text.partition("x")
    return (int(stages), int(pieces)) if by else int(stages)


def _pieces(split: Split) -> int:
    return split if isinstance(split, int) else split[0] * split[1]


def _in_words(split: Split) -> str:
    return f"{split} stages" if isinstance(split, int) else f"{split[0]} stages of {split[1]} pieces"


def build(layers: CausalLMLayers, stages: Split) -> list[Stage]:
    """Build the stages of an even cut, or all of their pieces in the model's order, on the CPU."""
    cuts = itertools.pairwise(_cuts(len(layers), _pieces(stages)))
    return [layers.build_stage(start, stop, torch.device("cpu")) for start, stop in cuts]


def _cuts(items: int, stages: int) -> list[int]:
    return [-(-items * i // stages) for i in range(stages + 1)]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean loss of logits [batch, seq, vocabulary] and labels [batch, seq]."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def compare_split(
    layers: CausalLMLayers, whole: PreTrainedModel, counts: Sequence[Split], *, train: bool = False
) -> list[str]:
    """Compare weights, logits and gradients of every partition with the unsplit model's; return what differs."""
    input_ids, labels = tokens()
    positions = torch.arange(sum(DOCUMENTS)).expand(2, -1)
    whole.train(train)  # in training mode stages recompute, and dropout draws differ between stages
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
                    wrong.append(f"{_in_words(count)}: {name} is not what the files hold")
        missing = [name for name, parameter in whole.named_parameters() if id(parameter) not in held]
        if missing:
            wrong.append(f"{_in_words(count)}: nobody holds {missing[0]}")
        logits, gradients = run_backward(stages, input_ids, positions, labels)
        if (difference := relative(logits, expected)) > LIMIT:
            wrong.append(f"{_in_words(count)}: logits differ by {difference:.1e}")
        summed: dict[int, Tensor] = {}
        for name, gradient in gradients:
            summed[id(named[name])] = summed.get(id(named[name]), torch.zeros(())) + gradient
        for name, parameter in whole.named_parameters():
            found = summed.get(id(parameter))
            wanted = parameter.grad
            if wanted is None or found is None:
                if (wanted if found is None else found) is not None and (wanted if found is None else found).any():
                    wrong.append(f"{_in_words(count)}: {name} has a gradient on one side only")
            elif (difference := relative(found, wanted)) > LIMIT:
                wrong.append(f"{_in_words(count)}: the gradient of {name} differs by {difference:.1e}")
    return wrong[:3]


def run_backward(
    stages: list[Stage], input_ids: Tensor, positions: Tensor, labels: Tensor
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Run forward and backward as a pipeline does; return the logits, and the gradients with the parameters' names."""
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
    wrong = [f"packed documents differ by {difference:.1e}"] if difference > LIMIT else []
    if relative(unpacked, alone[1]) < 100 * LIMIT:
        wrong.append("the control failed: a document before changes nothing")
    return wrong


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of ``b`` where that is more than 1."""
    if a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return float("inf")
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if a.numel() else 0.0
