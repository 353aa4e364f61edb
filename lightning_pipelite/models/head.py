"""Leaves the output head to the loss, which fuses the two and never holds all logits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.models.rows_apart import rows_of


class HeadInputs(NamedTuple):
    """What the logits are computed from: ``f(hidden @ weight.T + bias)``, where f scales and then soft-caps.

    Attributes:
        hidden: [batch, seq, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        scale: Factor of the logits.
        softcap: The limit c of ``c * tanh(logits / c)``, or None.
        rows: Indices and values of the weight's rows that are held separately, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    rows: tuple[Tensor, Tensor] | None = None


class LeaveHead(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a model's forward where its head would run; carries the head's input."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


@dataclass
class FusedHead:
    """A linear head that a stage leaves to the loss.

    Args:
        head: The head.
        scale: What the model's code multiplies the logits by.
        softcap: The limit of their soft cap in the model's code, or None.
    """

    head: nn.Linear
    scale: float
    softcap: float | None

    def inputs(self, model: PreTrainedModel, arguments: dict[str, Any]) -> HeadInputs:
        """Run the model up to its head."""
        hook = self.head.register_forward_pre_hook(_leave)
        try:
            model(**arguments)
        except LeaveHead as leave:
            head = self.head
            return HeadInputs(leave.hidden_states, head.weight, head.bias, self.scale, self.softcap, rows_of(head))
        finally:
            hook.remove()
        raise RuntimeError(f"{type(model).__name__} ran without calling its head")


def fuse_head(model: PreTrainedModel, head: nn.Module) -> FusedHead | None:
    """Find out what a model does to its head's output; None if the head is not linear, or the model does more to it.

    The model runs once on two tokens, with known values in place of the head's output.

    Args:
        model: The last stage's, in training mode, so that bitsandbytes does not repack 4-bit weights.
        head: Its output head.
    """
    if type(head) is not nn.Linear or not head.weight.is_floating_point():  # wrapped by an adapter, or in 4 bits
        return None
    if head.weight.is_meta:  # no values to compare; scale and soft cap take no memory
        return FusedHead(head, 1.0, None)
    small = 2.0**-10
    values = torch.linspace(-40.0, 40.0, head.out_features, device=head.weight.device)
    values[0] = small
    values = values.expand(1, 2, -1)
    hook = head.register_forward_hook(lambda *_: values)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    devices = [head.weight.device] if head.weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):  # dropout must not advance the run's RNG
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if logits.dtype != values.dtype or logits.shape != values.shape:
        return None
    slope = float(logits[0, 0, 0]) / small
    limits = {None, getattr(model.config, "final_logit_softcapping", None)}
    for scale, softcap in itertools.product((1.0, slope), limits):
        scaled = values * scale
        expected = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
        if torch.allclose(logits, expected, rtol=1e-6, atol=1e-6):
            return FusedHead(head, scale, softcap)
    return None


def _leave(module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
    raise LeaveHead(inputs[0])
