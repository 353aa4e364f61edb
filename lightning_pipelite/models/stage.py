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
        start: Index of the first decoder layer that this stage owns.
        stop: Index after the last one.
        start_inputs: For each decoder layer of the model, which of its arguments only the first stage can compute;
            see :class:`~lightning_pipelite.models.MetaModel`.
        takes_positions: Whether ``causal_lm`` is called with ``position_ids``.
        packed: Whether a sequence may hold several documents. If not, one that does is an error.
        router_loss: The load-balancing loss of the model's routers, if they are balanced.
        fused_head: The head, if it is fused with the loss.
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
        """Announce how many documents a micro-batch has, which saves a host synchronisation on a GPU.

        If it is announced for one micro-batch, it must be announced for all of them before they run.
        """
        self._most_documents = max(self._most_documents or 0, count)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the stage.

        Args:
            inputs: ``(input_ids, position_ids, *extra)`` on the first stage, ``(hidden_states, position_ids, *extra)``
                on the others; ``input_ids`` and ``position_ids`` int64 [batch, seq], ``hidden_states`` [batch, seq,
                hidden] in the model's dtype (some models have several streams; if layers have other inputs that only
                the first stage can compute, one flat tensor holds everything). Positions restart at 0 where a packed
                document starts; attention then stays inside each document. ``extra`` are small integer tensors, passed
                on unchanged; while the stage runs, its model has them as ``extra_inputs``. If routers are balanced in
                training, the last tensor holds the sums over the routers of earlier stages.

        Returns:
            On the last stage the logits [batch, seq, vocabulary] in the model's dtype, or
            :class:`~lightning_pipelite.models.head.HeadInputs` if the head is fused with the loss; on the others
            ``(hidden_states, position_ids, *extra)`` for the next stage. If routers are balanced in training, the last
            stage returns ``(logits, loss)`` with their loss, a float32 scalar, and the others append their sums.

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
                "the data packs several documents into a sequence but packed is false; use one document per sequence."
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
        """Return an empty tensor of the shape and dtype that this stage, not the first one, receives.

        Args:
            position_ids: As passed to :meth:`forward`.
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
        """Return the arguments that the model is called with.

        No attention mask and no cache: with either, transformers no longer keeps packed documents apart. On a stage
        without tokens, token 0 everywhere only gives the model a shape and a device; what it computes from it is
        discarded.
        """
        arguments: dict[str, Any] = {"use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = position_ids
        arguments["input_ids"] = torch.zeros_like(position_ids) if input_ids is None else input_ids
        return arguments


class RemoteLayer(nn.Module):
    """Stands in, without parameters, for a decoder layer that another stage owns.

    Args:
        layer: The layer, from which the model's code can still read attributes such as ``attention_type``.
        tuple_length: How many values the layer returns in a tuple; 0 if it returns only the hidden states.
    """

    def __init__(self, layer: nn.Module, *, tuple_length: int) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights stay on the meta device
        self.tuple_length = tuple_length
        self.__dict__["handover"] = None

    def hand_on_to(self, handover: Handover, number: int, *, first: bool) -> None:
        """Hand on the arguments of layer ``number``; for the ``first`` one, hidden states too."""
        self.__dict__["handover"] = handover
        self.number, self.first = number, first

    @override
    def __getattr__(self, name: str) -> Any:
        if name in ("_parameters", "_buffers", "_modules"):
            raise AttributeError(name)
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Return the hidden states unchanged; after the stage's own layers, hand arguments on and finally leave."""
        if self.handover is not None:
            self.handover.depart(self.number, self.first, ((hidden_states, *args), kwargs))
        return (hidden_states, *[None] * (self.tuple_length - 1)) if self.tuple_length else hidden_states


class EmptyStub(nn.Module):
    """Stands in, without parameters, for a module that another stage owns and this one never runs.

    Args:
        module: The module; its weights become plain empty tensors, as the model's code may initialise them or read
            their device.
        dtype: Dtype of the empty tensors.
        device: Device of the empty tensors.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
        self.__dict__.update({name: torch.empty(0, dtype=dtype, device=device) for name in module._parameters})


class ZeroStub(EmptyStub):
    """Stands in for a module before the layers: returns zeros of the same shape.

    Args:
        module: An embedding (``weight`` [count, size], called with indices), a linear layer, or a norm.
        dtype: Dtype of the zeros.
        device: Device of the zeros.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(module, dtype, device)
        self._embeds = isinstance(module, nn.Embedding)
        size = "embedding_dim" if self._embeds else "out_features"
        self._size: int | None = getattr(module, size, None)
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros of the shape of the module's own result."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        kept = first.shape if self._embeds else first.shape[:-1]
        return first.new_zeros(*kept, self._size or first.shape[-1], dtype=self._dtype)


class _StageEntry(Mixin):
    """Mixed into the layers of a stage that receives: replaces their arguments with what was received.

    Mixed into all of them, though usually only the first has anything to replace, so that layers of one class are
    compiled once. Not a forward pre-hook: transformers before 5.23 checkpoints a layer's ``__call__``, hooks included,
    so a hook would run again in the recomputation, by which time another micro-batch has been received. This runs
    outside the checkpoint.
    """

    mixin_place = MixinPlace.STAGE_ENTRY

    def receive_from(self, handover: Handover, number: int, *, entry: bool) -> None:
        """Receive as layer ``number``; the first one of a stage (``entry``) receives hidden states too."""
        self._arrive = partial(handover.arrive, number, entry=entry)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._arrive((args, kwargs))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]
