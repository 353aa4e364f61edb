"""What a stage or piece passes on to the next, and the gradients that come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pipelite.errors import ConfigurationError


def handed_on(outputs: Any, place: str) -> Tensor | tuple[Tensor, ...]:
    """Return the outputs of a stage or piece in a form that can be sent: contiguous.

    Args:
        outputs: A tensor, or a tuple or list of tensors.
        place: The stage or piece, for the message.

    Raises:
        ConfigurationError: If the outputs are anything else.
    """
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    if isinstance(outputs, (tuple, list)) and all(isinstance(item, Tensor) for item in outputs):
        return tuple(item.contiguous() for item in outputs)
    raise ConfigurationError(
        f"{place} ends with a layer that returns a {type(outputs).__name__}; only a tensor or a tuple of tensors can "
        "be passed between stages."
    )


def other_shapes(shapes: object, before: object, place: str) -> RuntimeError:
    """Return the error for outputs that do not match the receiver's buffers: it would read too much or too little."""
    return RuntimeError(
        f"{place} outputs {shapes} after {before}, for micro-batches of equal shapes; the shapes and dtypes between "
        "stages may only depend on the shapes of the micro-batch"
    )


def with_gradients(outputs: Any) -> list[Tensor]:
    """Return the outputs whose gradients come back: DeepSpeed sends gradients of floating-point tensors only."""
    return [t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if t.is_floating_point()]


def back_propagate(pairs: Sequence[tuple[Any, Tensor | None]], received: Any, place: str) -> None:
    """Back-propagate from the outputs; afterwards every floating-point tensor that was received has a gradient.

    Args:
        pairs: Outputs, or the gradient edges of their graphs, each with its gradient; None for a loss.
        received: What the previous stage or piece passed on; None if there is none.
        place: Where this is, for the message.

    Raises:
        RuntimeError: If the loss does not depend on what was received.
    """
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
    if received is None:
        return
    # The previous stage waits for a gradient of everything that it sent, including what is unused here.
    inputs = with_gradients(received)
    if inputs and all(tensor.grad is None for tensor in inputs):
        raise RuntimeError(f"{place}: the loss does not depend on the outputs of the previous stage")
    for tensor in inputs:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
