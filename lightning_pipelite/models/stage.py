"""One pipeline stage of a causal LM: the model's own forward, entered and left between two decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class Stage(nn.Module):
    """Consecutive decoder layers of a causal LM, with the embedding if first and the final norm and head if last.

    Masks, rotary embeddings, scaling and soft-capping are the model's own code, which runs on every stage; only the
    decoder layers (and embedding, norm and head) of other stages are left out.

    Args:
        causal_lm: The model trimmed to this stage: a :class:`Placeholder` stands for each layer of another stage.
        layers_name: Name of the list of decoder layers in ``causal_lm``.
        start: Number of the first decoder layer that this stage owns.
        stop: Number after the last one.
    """

    def __init__(self, causal_lm: PreTrainedModel, layers_name: str, start: int, stop: int) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.start, self.stop = start, stop
        # In a list, so that the layer is not registered a second time under another name.
        self._entry = [] if start == 0 else [_receive_at(causal_lm.get_submodule(f"{layers_name}.{start}"))]

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the stage.

        Args:
            inputs: ``(input_ids, position_ids, *extra)`` on the first stage, ``(hidden_states, position_ids, *extra)``
                on the others; ``input_ids`` and ``position_ids`` int64 [batch, seq], ``hidden_states`` [batch, seq,
                hidden] in the model's dtype. Positions start again at 0 where a packed document starts; attention
                then stays inside each document. ``extra`` are small integer tensors passed on untouched.

        Returns:
            The logits [batch, seq, vocabulary] in the model's dtype on the last stage, otherwise
            ``(hidden_states, position_ids, *extra)`` for the next.
        """
        first, position_ids, *extra = inputs
        # No attention mask and no cache: with either, transformers no longer tells packed documents apart.
        arguments: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
        if self._entry:
            # The embedding's place is taken only to give the model a shape, a dtype and a device: what it makes of it
            # (some models scale it) is put aside at the first owned layer.
            self._entry[0].received = first
            arguments["inputs_embeds"] = first.detach()
        else:
            arguments["input_ids"] = first
        try:
            return self.causal_lm(**arguments).logits
        except LeaveStage as leave:
            return (leave.hidden_states, position_ids, *extra)
        finally:
            if self._entry:
                self._entry[0].received = None


class LeaveStage(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a stage's forward where the next stage's first layer would run, with that layer's input."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class Placeholder(nn.Module):
    """Stands, without parameters, for a decoder layer that another stage owns.

    Args:
        layer: The layer; its plain attributes, such as ``attention_type``, are kept as the model's code may ask.
        leaves: Whether the forward ends here: true right after the last owned layer.
        returns_tuple: Whether the model expects a tuple from its layers.
    """

    def __init__(self, layer: nn.Module, *, leaves: bool, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.leaves = leaves
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        if self.leaves:
            raise LeaveStage(hidden_states)
        return (hidden_states,) if self.returns_tuple else hidden_states


class _Receiver:
    """Mixed into the first owned layer: swaps the hidden states that it is called with for the received ones.

    Not a forward pre-hook: transformers before 5.23 checkpoints a layer's ``__call__``, hooks included, so a hook would
    run again in the recomputation, by when another micro-batch has been received. This runs outside the checkpoint.
    """

    received: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.received is not None:
            if args:
                args = (self.received, *args[1:])
            else:
                kwargs["hidden_states"] = self.received
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _receive_at(layer: nn.Module) -> Any:
    layer_class = type(layer)
    layer.__class__ = type(layer_class.__name__, (_Receiver, layer_class), {"__module__": layer_class.__module__})
    return layer
