"""The load-balancing loss of a mixture of experts whose layers are spread over several stages.

Fedus et al. 2021, "Switch Transformers" (https://arxiv.org/abs/2101.03961), equations 4 to 6. Transformers averages
over all layers before it multiplies,

    aux = E * sum_e f_e * P_e,   f_e = assignments to expert e / N,   P_e = probabilities of expert e / N,

with E experts and N = layers * tokens, so the loss is not a sum over layers or stages. But f_e and P_e are: their sums
travel with the hidden states, each stage adds its own, and the last one computes the loss. Its gradient comes back the
same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pipelite.shared.class_mixin import Mixin, MixinPlace, mix_in


@dataclass(frozen=True)
class RouterLoss:
    """Where a model's routers are, and how its loss is computed from them.

    Args:
        places: For each router's module name, the index of its logits in its output; None if they are the output.
        experts: The number of experts E.
        top_k: The number of experts that a token is sent to.
        coefficient: Factor of the loss when it is added to the cross-entropy.
    """

    places: dict[str, int | None]
    experts: int
    top_k: int
    coefficient: float

    def sums(self, logits: Tensor) -> Tensor:
        """Return each expert's number of assignments and sum of probabilities, float32 [2, experts].

        Args:
            logits: Logits of one router, [..., experts].
        """
        probabilities = logits.reshape(-1, self.experts).softmax(dim=-1)
        chosen = probabilities.topk(self.top_k, dim=-1).indices.flatten()
        assigned = torch.zeros(self.experts, device=logits.device).scatter_add_(
            0, chosen, torch.ones_like(chosen).float()
        )
        return torch.stack([assigned, probabilities.float().sum(dim=0)])

    def loss(self, sums: Tensor, tokens: int) -> Tensor:
        """Return the loss of a micro-batch, a float32 scalar, not yet multiplied by the coefficient.

        Args:
            sums: Sums over all routers, [2, experts].
            tokens: Number of tokens in the micro-batch.
        """
        assigned, probabilities = sums / (tokens * len(self.places))
        return self.experts * (assigned * probabilities).sum()


def find_router_loss(model: PreTrainedModel, tiny: PreTrainedModel, input_ids: Tensor) -> RouterLoss:
    """Find out how a class balances its routers by running a tiny model.

    Args:
        model: The real model; may be on the meta device.
        tiny: A model of the same class and depth, in evaluation mode.
        input_ids: Int64 [batch, seq], the input to run it on.

    Raises:
        ValueError: The class has no such loss, or a different one.
    """
    outputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
        for name, module in tiny.named_modules()
        if name
    ]
    with torch.no_grad():
        try:
            result = tiny(input_ids=input_ids, labels=input_ids, output_router_logits=True, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        plain = tiny(input_ids=input_ids, labels=input_ids, output_router_logits=False, use_cache=False)
    names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    if any(not hasattr(model, name) for name in names) or not isinstance(getattr(result, "aux_loss", None), Tensor):
        raise ValueError("its class has no auxiliary loss for its routers")
    experts, top_k, coefficient = (getattr(tiny, name) for name in names)
    found = RouterLoss(_places(result.router_logits, outputs), experts, top_k, coefficient)
    sums = torch.stack([found.sums(logits) for logits in result.router_logits]).sum(dim=0)
    loss = found.loss(sums, input_ids.numel())
    if not (
        torch.allclose(loss, result.aux_loss.float(), rtol=1e-4)
        and torch.allclose(result.loss - plain.loss, coefficient * loss, rtol=1e-3, atol=1e-5)
    ):
        raise ValueError("its class balances its routers with a loss other than that of the Switch Transformer")
    return RouterLoss(found.places, *(getattr(model, name) for name in names))


def _places(recorded: tuple[Tensor, ...], outputs: dict[str, Any]) -> dict[str, int | None]:
    places: dict[str, int | None] = {}
    for logits in recorded:
        for name, output in outputs.items():
            items = output if isinstance(output, (tuple, list)) else [output]
            index = next((i for i, item in enumerate(items) if item is logits), None)
            if index is not None:
                places[name] = index if isinstance(output, (tuple, list)) else None
                break
        else:
            raise ValueError("its routers' logits are not returned by any of its modules")
    if len(places) != len(recorded):
        raise ValueError("one module returns the logits of several routers")
    return places


class RouterSums:
    """Accumulates the sums of a stage's routers during its forward.

    Args:
        causal_lm: The stage's model.
        loss: The loss that defines these sums.
        names: Names of the routers that this stage has.
    """

    def __init__(self, causal_lm: nn.Module, loss: RouterLoss, names: list[str]) -> None:
        self.loss = loss
        self.gathers = False
        self._routers: list[Any] = []
        for name in names:
            router = mix_in(causal_lm.get_submodule(name), _CountedRouter)
            router.__dict__.update(_all=self, _place=loss.places[name], _sums=None)
            self._routers.append(router)

    def start(self) -> None:
        """Begin a forward."""
        self.gathers = True

    def finish(self, received: Tensor) -> Tensor:
        """End the forward; return its sums plus those ``received`` from earlier stages, float32 [2, experts]."""
        self.gathers = False
        for router in self._routers:
            assert router._sums is not None
            received, router._sums = received + router._sums, None
        return received


class _CountedRouter(Mixin):
    """Mixed into a router. Each router keeps its own sums, so that one compiled graph serves all layers."""

    mixin_place = MixinPlace.RECORD
    _all: RouterSums
    _place: int | None
    _sums: Tensor | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            # In recomputation too, which must save the same tensors as the first forward.
            sums = self._all.loss.sums(output if self._place is None else output[self._place])
            if self._all.gathers:
                self._sums = sums
        return output
