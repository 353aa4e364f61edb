"""What a stage of a causal LM receives and hands on: hidden states, and further inputs of later layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LeaveStage(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a stage's forward where the next stage's first layer would run; carries what is handed on to that stage."""

    def __init__(self, handed_on: Tensor) -> None:
        super().__init__()
        self.handed_on = handed_on


class Handover:
    """Replaces the placeholders that a stage's model computes without tokens by received values; collects what to send.

    If layers take hidden states only, these are sent as they are. Otherwise one tensor [values] holds the hidden states
    and then, layer by layer up to the last one, the layer's inputs that only the first stage can compute (Gemma 3n's
    embeddings for each layer); an input of several layers is sent once. On later stages the model's own code computes
    these arguments too, with meaningless values but the right shapes, by which the received tensor is split.

    Args:
        start_inputs: For each decoder layer, the positions or names of such arguments.
    """

    def __init__(self, start_inputs: Sequence[Sequence[int | str]]) -> None:
        self._places = start_inputs
        self.hidden_states_only = not any(start_inputs)
        self._received: Tensor | None = None
        self._taken = 0
        self._known: list[tuple[Tensor, Tensor]] = []  # placeholders, and what replaces them
        self._handed_on: list[Tensor] = []
        self._measuring = False

    def begin(self, received: Tensor | None, *, measuring: bool = False) -> None:
        """Start a forward with ``received`` (None on the first stage), or one that measures how much is received."""
        self._received, self._measuring = received, measuring
        self._taken, self._known, self._handed_on = 0, [], []

    def check_all_taken(self) -> None:
        """Check that the layers were given all that was received.

        Raises:
            RuntimeError: They were not: the model's code computed other arguments here than on the stage before.
        """
        if self._received is not None and not self.hidden_states_only and self._taken != self._received.numel():
            raise RuntimeError(
                f"the layers used {self._taken} of the {self._received.numel()} values received from the previous stage"
            )

    def end(self) -> int:
        """Forget the micro-batch, and return how many of the received values were used."""
        self._received, self._known, self._handed_on = None, [], []
        return self._taken

    def arrive(self, number: int, arguments: Arguments, *, entry: bool) -> Arguments:
        """Return the arguments of a layer as the whole model would pass them.

        Args:
            number: The layer's number.
            arguments: What this stage's model calls it with.
            entry: Whether it is the stage's first layer, which receives hidden states.
        """
        if self._received is None and not self._measuring:
            return arguments
        args, kwargs = list(arguments[0]), dict(arguments[1])
        if entry and args:
            args[0] = self._take(args[0])
        elif entry:
            kwargs["hidden_states"] = self._take(kwargs["hidden_states"])
        for place in self._places[number]:
            if isinstance(place, int):
                args[place] = self._take_once(args[place])
            else:
                kwargs[place] = self._take_once(kwargs[place])
        return tuple(args), kwargs

    def depart(self, number: int, first: bool, arguments: Arguments) -> None:
        """Add the inputs of a later stage's layer to what is handed on.

        Args:
            number: The layer's number.
            first: Whether it is the first layer after this stage's, which receives hidden states.
            arguments: What this stage's model calls it with.

        Raises:
            LeaveStage: It is the last layer for which something is handed on.
        """
        args, kwargs = self.arrive(number, arguments, entry=False)
        if first:
            self._handed_on.append(args[0] if args else kwargs["hidden_states"])
            if self.hidden_states_only:
                raise LeaveStage(self._handed_on[0])
        for place in self._places[number]:
            value = args[place] if isinstance(place, int) else kwargs[place]
            if not any(value is each for each in self._handed_on[1:]):
                self._handed_on.append(value)
        if number == len(self._places) - 1:
            dtype = self._handed_on[0].dtype
            for tensor in self._handed_on[1:]:
                dtype = torch.promote_types(dtype, tensor.dtype)
            raise LeaveStage(torch.cat([tensor.flatten().to(dtype) for tensor in self._handed_on]))

    def _take_once(self, made: Tensor) -> Tensor:
        """Return the received values for a placeholder, which may be an argument of several layers.

        Not for hidden states: as no layer has changed them here, they may be the same tensor as another argument.
        """
        for known, value in self._known:
            if known is made:
                return value
        value = self._take(made)
        self._known.append((made, value))
        return value

    def _take(self, made: Tensor) -> Tensor:
        """Return the next received values, in the shape and dtype of the placeholder ``made``."""
        if self._measuring and self.hidden_states_only:
            raise LeaveStage(made)
        if self._measuring:
            value = made
        else:
            assert self._received is not None
            if self.hidden_states_only:
                return self._received
            values = self._received[self._taken : self._taken + made.numel()]
            value = values.view(made.shape).to(made.dtype)
        self._taken += made.numel()
        return value
