"""Packed documents in a hybrid of linear and full attention on one GPU: what packing gains, and whether it is right.

    python benchmarks/packed_hybrids.py [--layers 4] [--steps 6] [--tiny] [--write]

The first layers of Qwen3.5 27B by its config.json (three of linear attention, then one of full attention), random bf16
weights, LoRA of rank 16 in float32 on all linear layers, all activations kept; documents of 512 tokens:

- *packed*: eight of them in a sequence of 4096 tokens.
- *padded*: one in a sequence, padded to 4096, the only choice for a model that cannot keep documents apart.

Each trains through the Trainer, 4 micro-batches a step. Tokens/s count the documents' tokens, without padding, in the
median step after two of warm-up; memory is the peak of torch's allocated memory. Linear attention runs in
flash-linear-attention where it is installed, else in transformers' torch code; the report says which.

Before that, the gradient of all trained weights together from one packed sequence, with each LoRA's B drawn at random:
its distance (relative, in the 2-norm) from transformers + PEFT in float32, in their torch code, with each document
separately. The noise is that distance for the same bf16 stage given one document at a time; the control treats the
sequence as one document.

Exits with 1 if packed is off by more than 1.5 times the noise, or the control is not; on a GPU, also if packing gains
less than a factor of 4.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import tests_support  # noqa: F401
from lightning_pipelite import PipeLiteModule
from lightning_pipelite.adapters import LoRA
from published_bases import PUBLISHED, shallow
from random_model import write_random
from report import Report
from step_jobs import MICRO_BATCHES, RANK
from step_loops import LR, Timing, device, free, one_stage_trainer, peak_gib

BASE, WARM_UP = "Qwen3.5 27B", 2
NOISE_LIMIT, GAIN_LIMIT = 1.5, 4.0
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "vocab_size": 512,
}  # fmt: skip
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


def documents(count: int, length: int, vocabulary: int) -> list[Batch]:
    """Return random documents, in which the last token of each has no label."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], dim=1)
        made.append({"input_ids": tokens, "labels": labels, "position_ids": torch.arange(length)[None]})
    return made


def packed(several: list[Batch]) -> Batch:
    return {name: torch.cat([each[name] for each in several], dim=1) for name in several[0]}


def padded(document: Batch, length: int) -> Batch:
    more = length - document["input_ids"].shape[1]
    pad = nn.functional.pad
    return {
        "input_ids": pad(document["input_ids"], (0, more)),
        "labels": pad(document["labels"], (0, more), value=-100),
        "position_ids": torch.arange(length)[None],
    }


def make_module(directory: str, compile_layers: bool | None = None) -> PipeLiteModule:
    return PipeLiteModule(
        directory, LoRA(RANK), lr=LR, schedule="constant", activation_memory="keep", compile_layers=compile_layers
    )


def gradients_of(loss_of: Callable[[Batch], Tensor], model: nn.Module, batches: list[Batch]) -> Gradients:
    """Return the gradient of the sum of all losses, by the names in the adapter's file."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        loss_of({name: tensor.to(device()) for name, tensor in batch.items()}).backward()
    return {
        name.removeprefix("base_model.model."): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def own_gradients(directory: str, ways: dict[str, list[Batch]]) -> dict[str, Gradients]:
    """Return those of one stage with the whole bf16 model, for each way to pass the documents; write the adapter."""
    module = make_module(directory, compile_layers=False)  # each way has other shapes and would be recompiled
    layers, loss_of = module.pipeline_layers()
    stage = layers.build_stage(0, len(layers), device())
    generator = torch.Generator(device()).manual_seed(3)
    for name, parameter in stage.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    module.adapter.save(adapter_of(directory), [layers.trained_state(stage)], Path(directory))

    def loss(batch: Batch) -> Tensor:
        terms = loss_of(stage((batch["input_ids"], batch["position_ids"])), batch["labels"])
        return terms[0] if isinstance(terms, tuple) else terms

    return {name: gradients_of(loss, stage.causal_lm, batches) for name, batches in ways.items()}


def reference_gradients(directory: str, alone: list[Batch]) -> Gradients:
    """Return those of transformers and PEFT in float32, with the same adapter."""
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map={"": device()})
    model: Any = PeftModel.from_pretrained(base, str(adapter_of(directory)), is_trainable=True)

    def loss(batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum")

    with torch_alone(type(base).__module__):
        return gradients_of(loss, model, alone)


@contextmanager
def torch_alone(code: str) -> Iterator[None]:
    """Keep a model's code from using other packages' kernels, by unwrapping its own torch functions."""
    functions = vars(sys.modules[code])
    wrapped = {
        name: each for name, each in functions.items() if inspect.isfunction(each) and hasattr(each, "__wrapped__")
    }
    functions.update({name: inspect.unwrap(each) for name, each in wrapped.items()})
    try:
        yield
    finally:
        functions.update(wrapped)


def adapter_of(directory: str) -> Path:
    return Path(directory).with_name("adapter")


def distance(found: Gradients, reference: Gradients) -> float:
    if found.keys() != reference.keys():
        raise SystemExit(f"other weights are trained: {sorted(found.keys() ^ reference.keys())[:4]}")
    off = sum(float((found[name] - reference[name]).square().sum()) for name in reference)
    return (off / sum(float(each.square().sum()) for each in reference.values())) ** 0.5


def train(directory: str, batches: list[Batch], steps: int) -> tuple[float, float, list[float]]:
    """Return the median seconds of a step, GiB at the peak, and the losses."""
    free()
    timing = Timing(steps, None)
    again = [batches[number % len(batches)] for number in range(steps * MICRO_BATCHES)]
    one_stage_trainer(timing, steps, MICRO_BATCHES).fit(make_module(directory), DataLoader(again, batch_size=None))  # type: ignore[arg-type]
    seconds = [b - a for a, b in itertools.pairwise(timing.ends)][WARM_UP - 1 :]
    return statistics.median(seconds), peak_gib(), timing.losses


def kernels() -> str:
    """Return what computes linear attention on this machine, by transformers' choice."""
    if torch.cuda.is_available() and importlib.util.find_spec("fla") is not None:
        return f"flash-linear-attention {importlib.metadata.version('fla-core')}"
    return "transformers' torch code"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="narrow, documents of 32 tokens: for a try on a CPU")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/packed_hybrids.md")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must exceed {WARM_UP}, the number of warm-up steps")
    length, document = (256, 32) if arguments.tiny else (4096, 512)
    facts = shallow(PUBLISHED[BASE], arguments.layers) | {"max_position_embeddings": length}
    facts |= TINY if arguments.tiny else {}
    several, failed = length // document, False
    alone = documents(several * MICRO_BATCHES, document, facts["vocab_size"])
    one = packed(alone[:several])
    ways = {
        "packed": [one],
        "one document at a time": alone[:several],
        "control: taken for one document": [one | {"position_ids": torch.arange(length)[None]}],
    }
    sequences = {
        "packed": [packed(alone[start : start + several]) for start in range(0, len(alone), several)],
        "padded": [padded(each, length) for each in alone],
    }
    report = Report(
        "packed_hybrids",
        "| gradient, bf16 | distance from float32 | of the noise | limit |",
        "| --- | --- | --- | --- |",
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        directory = str(Path(folder) / "base")
        write_random(Path(directory), facts, device())
        free()
        own = own_gradients(directory, ways)
        free()
        reference = reference_gradients(directory, ways["one document at a time"])
        off = {name: distance(each, reference) for name, each in own.items()}
        noise = off["one document at a time"]
        for name, each in off.items():
            limit = {"packed": f"at most {NOISE_LIMIT}", "one document at a time": "noise"}.get(
                name, f"over {NOISE_LIMIT}"
            )
            report.row(f"| {name} | {each:.2e} | {each / noise:.2f} | {limit} |")
        failed |= not off["packed"] <= NOISE_LIMIT * noise
        failed |= not off["control: taken for one document"] > NOISE_LIMIT * noise
        del own, reference
        report.line("| sequences | documents' tokens/s | ms a step | peak GiB | loss, first to last |")
        report.row("| --- | --- | --- | --- | --- |")
        speeds = {}
        for name, batches in sequences.items():
            seconds, gib, losses = train(directory, batches, arguments.steps)
            tokens = MICRO_BATCHES * document * (several if name == "packed" else 1)
            speeds[name] = tokens / seconds
            report.row(
                f"| {name} | {speeds[name]:,.0f} | {1000 * seconds:,.0f} | {gib:.2f} "
                f"| {losses[0]:.4f} to {losses[-1]:.4f} |"
            )
    gain = speeds["packed"] / speeds["padded"]
    failed |= torch.cuda.is_available() and not arguments.tiny and not gain >= GAIN_LIMIT
    report.line(
        f"Packing gains {gain:.2f} times (limit {GAIN_LIMIT:g}; {several} at most, if a sequence takes as long). "
        f"{arguments.layers} layers, documents of {document} tokens in {length}, linear attention by {kernels()}; "
        f"{arguments.steps} steps; {'FAILED' if failed else 'all within their limits'}"
    )
    if arguments.write:
        report.write()
    sys.exit(failed)


if __name__ == "__main__":
    main()
