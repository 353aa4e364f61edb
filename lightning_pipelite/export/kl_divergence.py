"""Measures how close LoRAs come to a Control Adapter on the base, with one decoder layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lightning_pipelite.adapters.control_files import ControlAdapterFile, Transform
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.export.base import BaseModel
from lightning_pipelite.export.residual_writers import LayerWriters, Writer
from lightning_pipelite.models.loading import load_trimmed
from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stage import Stage
from lightning_pipelite.shared.progress import track

SEQUENCES, LENGTH = 2, 128
CPU = torch.device("cpu")


@dataclass(frozen=True)
class KLDivergence:
    """How close a LoRA comes to a Control Adapter.

    Attributes:
        divergence: Kullback-Leibler divergence KL(Control Adapter ‖ LoRA) of the next-token probabilities, averaged
            over the tokens, in nats.
        without: The same for the base without an adapter.
        tokens: Number of tokens.
    """

    divergence: float
    without: float
    tokens: int


@torch.no_grad()
def measure(
    base: BaseModel, control: ControlAdapterFile, writers: dict[str, LayerWriters], *, inverse: bool
) -> dict[str, KLDivergence]:
    """Run the base, the Control Adapter, and the LoRAs on "last" and on "all" writers, on the same text.

    The text is from Python's documentation if the base has a tokenizer that can be read, else random tokens. Each layer
    is read once, in float32, and run for all four.

    Args:
        base: The base.
        control: The Control Adapter.
        writers: The writers of each transformed layer.
        inverse: Use class -1 instead of class +1.
    """
    meta_model = MetaModel(base.directory, trust_remote_code=base.trust_remote_code)
    limit = getattr(meta_model.config, "max_position_embeddings", None) or LENGTH
    input_ids = _text(base, meta_model.config.vocab_size, min(LENGTH, limit))
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    states: dict[str, Tensor] = dict.fromkeys(("control", "none", "last", "all"), input_ids)
    bounds = list(zip(meta_model.groups, meta_model.groups[1:], strict=False))
    for start, stop in track(bounds, "measuring", "layers"):
        model = load_trimmed(meta_model, start, stop, dtype=torch.float32, device=CPU, load_in_4bit=False)
        stage = Stage(
            model.eval(),
            meta_model.layers_name,
            start,
            stop,
            start_inputs=meta_model.start_inputs,
            takes_positions=meta_model.takes_positions,
            packed=False,
        )
        here = [number for number in range(start, stop) if number in control.transforms]

        def run(name: str, stage: Stage = stage) -> None:
            output = stage((states[name], positions))
            states[name] = output if isinstance(output, Tensor) else output[0]

        run("none")
        hooks = [
            model.get_submodule(f"{meta_model.layers_name}.{number}").register_forward_hook(
                _transform(control.transforms[number], inverse), with_kwargs=True
            )
            for number in here
        ]
        run("control")
        for hook in hooks:
            hook.remove()
        for kind in ("last", "all"):
            for number in here:
                layer = writers[f"{meta_model.layers_name}.{number}"]
                for writer in layer.last if kind == "last" else layer.first:
                    _multiply(model, writer, control.transforms[number], inverse)
            run(kind)
    wanted = states["control"].double().log_softmax(-1)

    def divergence(name: str) -> float:
        found = states[name].double().log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    without, tokens = divergence("none"), input_ids.numel()
    near = {name: KLDivergence(divergence(name), without, tokens) for name in ("last", "all")}
    if not all(torch.isfinite(torch.tensor(each.divergence)) for each in near.values()):
        raise ConfigurationError(
            f"{control.directory} gives probabilities that are not finite on {base.directory}; the adapter is broken."
        )
    return near


def _text(base: BaseModel, vocabulary: int, length: int) -> Tensor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(base.directory), local_files_only=True, trust_remote_code=base.trust_remote_code
        )
        tokens = tokenizer("\n".join(topics[name] for name in ("objects", "types")), add_special_tokens=False).input_ids
    except Exception:  # transformers raises nearly anything here; the measurement needs tokens, not this text
        tokens = []
    if len(tokens) < SEQUENCES * length or max(tokens) >= vocabulary:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)
    return torch.tensor(tokens[: SEQUENCES * length]).view(SEQUENCES, length)


def _transform(transform: Transform, inverse: bool) -> Any:
    left, right = transform.factors(inverse=inverse)

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        output = returned[0] if isinstance(returned, tuple) else returned
        output = output + (output - entered) @ right.mT @ left.mT
        return (output, *returned[1:]) if isinstance(returned, tuple) else output

    return hook


def _multiply(model: nn.Module, writer: Writer, transform: Transform, inverse: bool) -> None:
    """Multiply the writer's weight and bias by the matrix that the transform applies to the layer's delta."""
    left, right = transform.factors(inverse=inverse)
    weight = model.get_parameter(writer.weight).data
    weight = weight.mT if writer.transposed else weight
    weight += left @ (right @ weight)
    if writer.bias is not None:
        bias = model.get_parameter(writer.bias).data
        bias += bias @ right.mT @ left.mT
