"""What a stage or piece hands on to the next, and the gradients of it that come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError


def handed_on(outputs: Any, place: str) -> Tensor | tuple[Tensor, ...]:
    """Return the outputs as they can be sent.

    Args:
        outputs: Of a stage or piece.
        place: Which one, for the message.

    Raises:
        ConfigurationError: If they cannot be sent.
    """
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    if isinstance(outputs, (tuple, list)) and all(isinstance(item, Tensor) for item in outputs):
        return tuple(item.contiguous() for item in outputs)
    raise ConfigurationError(
        f"{place} ends with a layer that returns a {type(outputs).__name__}; between stages only a tensor or a tuple "
        "of tensors can be handed on."
    )


def other_shapes(shapes: object, before: object, place: str) -> RuntimeError:
    """Make the error of outputs that the receiver's buffers do not fit: it would read beyond or short of them."""
    return RuntimeError(
        f"{place} hands on {shapes} after {before}, for micro-batches of equal shapes; the shapes between stages may "
        "only depend on the shapes of the micro-batch"
    )


def with_gradients(outputs: Any) -> list[Tensor]:
    """Return the tensors that a stage hands on whose gradients come back: DeepSpeed sends those of floating type."""
    return [t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if t.is_floating_point()]


def back_propagate(pairs: Sequence[tuple[Any, Tensor | None]], received: Any, place: str) -> None:
    """Go backward from outputs with their gradients; what was received, if anything was, then has gradients.

    Args:
        pairs: Outputs, or the edges of their graphs, with their gradients; None for a loss.
        received: What the stage or piece before has handed on.
        place: Where this is, for the message.

    Raises:
        RuntimeError: If nothing depends on what was received.
    """
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
    if received is None:
        return
    # The stage before waits for a gradient of everything that it sent, also of what is not used here.
    inputs = with_gradients(received)
    if inputs and all(tensor.grad is None for tensor in inputs):
        raise RuntimeError(f"{place}: the loss does not depend on what the stage before hands on")
    for tensor in inputs:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
