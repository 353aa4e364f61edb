"""One pipeline stage of a causal LM: the model's own forward, entered and left between two decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.attention.document_mask import document_mask
from lightning_pipelite.models.handover import Handover, LeaveStage
from lightning_pipelite.models.head import FusedHead
from lightning_pipelite.models.router import RouterLoss, RouterSums
from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in


class Stage(nn.Module):
    """Consecutive decoder layers of a causal LM, with the embedding if first and the final norm and head if last.

    Masks, rotary embeddings, scaling and soft-capping are the model's own code, which runs on every stage; only the
    decoder layers (and embedding, norm and head) of other stages are left out.

    Args:
        causal_lm: The model trimmed to this stage: a :class:`RemoteLayer` stands for each layer of another stage.
        layers_name: Name of the list of decoder layers in ``causal_lm``.
        start: Number of the first decoder layer that this stage owns.
        stop: Number after the last one.
        start_inputs: For each decoder layer of the model, which of its arguments the first stage alone can make;
            see :class:`~lightning_pipelite.models.MetaModel`.
        takes_positions: Whether ``causal_lm`` is called with ``position_ids``.
        packed: Whether inputs may hold several documents. If not, one that does is an error.
        router_loss: The load-balancing loss of the model's routers, if it is trained.
        fused_head: The head, if it is left to the loss.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        layers_name: str,
        start: int,
        stop: int,
        *,
        start_inputs: Sequence[Sequence[int | str]],
        takes_positions: bool = True,
        packed: bool = True,
        router_loss: RouterLoss | None = None,
        fused_head: FusedHead | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.start, self.stop = start, stop
        self.fused_head = fused_head
        self._takes_positions, self._packed = takes_positions, packed
        self._most_documents: int | None = None
        causal_lm.extra_inputs = ()
        self._routers: RouterSums | None = None
        if router_loss is not None:
            mine = [f"{layers_name}.{number}." for number in range(start, stop)]
            names = [name for name in router_loss.places if name.startswith(tuple(mine))]
            self._routers = RouterSums(causal_lm, router_loss, names)
        self._handover = Handover(start_inputs)
        layers: Any = causal_lm.get_submodule(layers_name)
        if start > 0:
            for number in range(start, stop):
                mix_in(layers[number], _StageEntry).receive_from(self._handover, number, entry=number == start)
        for number in range(stop, len(layers)):
            layers[number].hand_on_to(self._handover, number, first=number == stop)

    def expect_documents(self, count: int) -> None:
        """Tell how many documents a micro-batch has, which spares the host of a GPU a wait for it.

        Where it is told of one, it must be told of all before they run.
        """
        self._most_documents = max(self._most_documents or 0, count)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the stage.

        Args:
            inputs: ``(input_ids, position_ids, *extra)`` on the first stage, ``(hidden_states, position_ids, *extra)``
                on the others; ``input_ids`` and ``position_ids`` int64 [batch, seq], ``hidden_states`` [batch, seq,
                hidden] in the model's dtype (some models have several streams; where layers are given more that the
                first stage makes, one tensor of all of it). Positions start again at 0 where a
                packed document starts; attention then stays inside each document. ``extra`` are small integer tensors
                passed on untouched; while the stage runs, its model has them as ``extra_inputs``. Where routers are
                balanced in training, the sums over the routers of the stages before follow last.

        Returns:
            The logits [batch, seq, vocabulary] in the model's dtype, or :class:`~lightning_pipelite.models.head.
            HeadInputs` where the head is left to the loss, on the last stage, otherwise
            ``(hidden_states, position_ids, *extra)`` for the next. Where routers are balanced in training,
            ``(logits, loss)`` with their loss, a float32 scalar, or one more tensor for the next stage.

        Raises:
            ConfigurationError: Packed documents reach a stage that cannot keep them apart.
        """
        first, position_ids, *extra = inputs
        routers = self._routers if self.training else None
        if routers is not None:
            sums = extra.pop() if self.start else first.new_zeros(2, routers.loss.experts, dtype=torch.float32)
            routers.start()
        if not self._packed and not self.start and bool((position_ids.diff(dim=-1) != 1).any()):
            raise ConfigurationError(
                "the data packs several documents into a sequence but packed is false; give one document a sequence."
            )
        arguments = self._arguments(position_ids, None if self.start else first)
        self._handover.begin(first if self.start else None)
        self.causal_lm.extra_inputs = tuple(extra)
        try:
            with document_mask(position_ids if self._packed else None, self._most_documents):
                outputs: Any = (
                    self.causal_lm(**arguments).logits
                    if self.fused_head is None
                    else self.fused_head.inputs(self.causal_lm, arguments)
                )
            self._handover.check_all_taken()
            if routers is None:
                return outputs
            return outputs, routers.loss.loss(routers.finish(sums), position_ids.numel())
        except LeaveStage as leave:
            self._handover.check_all_taken()
            return (leave.handed_on, position_ids, *extra, *([] if routers is None else [routers.finish(sums)]))
        finally:
            self.causal_lm.extra_inputs = ()
            self._handover.end()

    @torch.no_grad()
    def received_like(self, position_ids: Tensor) -> Tensor:
        """Return an empty tensor of the shape and dtype of what this stage receives, if it is not the first.

        Args:
            position_ids: As :meth:`forward` gets them.
        """
        self._handover.begin(None, measuring=True)
        try:
            with document_mask(position_ids if self._packed else None, self._most_documents):
                self.causal_lm(**self._arguments(position_ids, None))
            made = None
        except LeaveStage as leave:
            made = leave.handed_on
        finally:
            count = self._handover.end()
        if self._handover.hidden_states_only:
            assert made is not None
            return torch.empty_like(made)
        return torch.empty(count, dtype=self.causal_lm.dtype, device=position_ids.device)

    def _arguments(self, position_ids: Tensor, input_ids: Tensor | None) -> dict[str, Any]:
        """Return what the model is called with.

        No attention mask and no cache: with either, transformers no longer tells packed documents apart. On a stage
        without tokens, token 0 everywhere only gives the model a shape and a device: what it makes of it is put aside.
        """
        arguments: dict[str, Any] = {"use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = position_ids
        arguments["input_ids"] = torch.zeros_like(position_ids) if input_ids is None else input_ids
        return arguments


class RemoteLayer(nn.Module):
    """Stands, without parameters, for a decoder layer that another stage owns.

    Args:
        layer: The layer, which answers where the model's code asks for an attribute such as ``attention_type``.
        tuple_length: How many values the layer returns in a tuple; 0 if it returns the hidden states alone.
    """

    def __init__(self, layer: nn.Module, *, tuple_length: int) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a submodule: its weights, on the meta device, are nobody's
        self.tuple_length = tuple_length
        self.__dict__["handover"] = None

    def hand_on_to(self, handover: Handover, number: int, *, first: bool) -> None:
        """Hand on what the layer is called with, as layer ``number``; the ``first`` one, hidden states too."""
        self.__dict__["handover"] = handover
        self.number, self.first = number, first

    @override
    def __getattr__(self, name: str) -> Any:
        if name in ("_parameters", "_buffers", "_modules"):
            raise AttributeError(name)
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Pass the hidden states on; after the stage's own layers, hand on and at last leave the model."""
        if self.handover is not None:
            self.handover.depart(self.number, self.first, ((hidden_states, *args), kwargs))
        return (hidden_states, *[None] * (self.tuple_length - 1)) if self.tuple_length else hidden_states


class EmptyStub(nn.Module):
    """Stands, without parameters, for a module that another stage owns and that this one never runs.

    Args:
        module: The module; its weights become plain empty tensors, as the model's code may initialise them or ask for
            their device.
        dtype: Type of the empty tensors.
        device: Where they are.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
        self.__dict__.update({name: torch.empty(0, dtype=dtype, device=device) for name in module._parameters})


class ZeroStub(EmptyStub):
    """Stands for a module before the layers: gives zeros of the same shape.

    Args:
        module: An embedding (``weight`` [count, size], called with indices), a linear layer, or a norm.
        dtype: Type of the zeros.
        device: Where they are.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(module, dtype, device)
        self._embeds = isinstance(module, nn.Embedding)
        size = "embedding_dim" if self._embeds else "out_features"
        self._size: int | None = getattr(module, size, None)
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros of the shape that the module's own result has."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        kept = first.shape if self._embeds else first.shape[:-1]
        return first.new_zeros(*kept, self._size or first.shape[-1], dtype=self._dtype)


class _StageEntry(Mixin):
    """Mixed into the layers of a stage that receives: swaps what they are called with for what was received.

    Into all of them, though mostly the first alone has something to swap: layers of one class are compiled once. Not a
    forward pre-hook: transformers before 5.23 checkpoints a layer's ``__call__``, hooks included, so a hook would run
    again in the recomputation, by when another micro-batch has been received. This runs outside the checkpoint.
    """

    mixin_place = MixinPlace.STAGE_ENTRY

    def receive_from(self, handover: Handover, number: int, *, entry: bool) -> None:
        """Receive as layer ``number``; the first one of a stage (``entry``), hidden states too."""
        self._arrive = partial(handover.arrive, number, entry=entry)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._arrive((args, kwargs))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]
