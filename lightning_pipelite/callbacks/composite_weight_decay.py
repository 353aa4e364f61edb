"""Weight decay on the product W = B·A of an adapter, rather than on A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.callbacks.support.control_decay import ControlPair, find_control, spectral_norm
from lightning_pipelite.callbacks.support.low_rank import Chunk, LowRank, chunks, find_low_rank, gram_matrices
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.over_ranks import logs_now, summarize
from lightning_pipelite.shared.tf32 import full_precision

_Plan = tuple[list[tuple[tuple[int, int], Chunk]], dict[int, list[ControlPair]]]


class CompositeWeightDecay(Callback):
    """Decays the product W = s·B·A of every LoRA layer after each optimizer step, and S of every Control Adapter.

    This is decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) for the penalty
    ½·‖W‖²_F, with the learning rate of that step: A ← A - lr·wd·s²·Bᵀ(BA) and B ← B - lr·wd·s²·(BA)Aᵀ, both from the
    values before. Decaying A and B separately would depend on how W is factored.

    BA is never formed: with the rank x rank matrices G_B = BᵀB and G_A = AAᵀ, the updates are G_B·A and B·G_A.

    For Control Adapters it is S ← S - lr·wd·S.

    It works with PEFT's LoRA layers under any strategy that does not shard the adapters. If a layer has several
    adapters, each decays separately; the magnitude of a DoRA does not decay. Parameters that the step does not train,
    because they are frozen or have no gradient, keep their values. It logs ``train/weight_decay_{avg,min,max}``: by how
    much a step's decay lowered the norms of all layers on all ranks.

    Example::

        Trainer(callbacks=[CompositeWeightDecay(10.0), AdapterNorms()])

    Args:
        weight_decay: The factor wd, 0 or more. With learning rates such as 2e-5, values of 1 to 20 are usual.

    Raises:
        ConfigurationError: If ``weight_decay`` is negative; from ``Trainer.fit``, if no rank has an adapter, one is
            more than a product or not in float32 (other dtypes would round so small a change away), or an optimizer has
            no learning rate or is wrapped by the strategy so that its steps cannot be hooked.
    """

    def __init__(self, weight_decay: float) -> None:
        if not weight_decay >= 0:
            raise ConfigurationError(f"CompositeWeightDecay: weight_decay must be 0 or more, not {weight_decay}.")
        self.weight_decay = weight_decay
        self._pairs: list[LowRank] = []
        self._controls: list[ControlPair] = []
        self._plans: dict[int, tuple[Any, _Plan]] = {}
        self._hooks: list[Any] = []
        self._steps = False
        self._lost: list[Tensor] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()  # left over from an earlier fit that ended with an error
        self._pairs, self._controls = find_low_rank(pl_module), find_control(pl_module)
        self._check(trainer, trainer.strategy.root_device)

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            # Only once per step, even if an optimizer's step calls that of its base class.
            if self._steps:
                self._steps = False
                self._after_step(optimizer, logs_now(trainer))

        # Not in on_train_batch_end: in the hook the learning rate is still the step's own, steps that a gradient scaler
        # skips do not count, and all other callbacks see the decayed weights.
        self._hooks = [optimizer.register_step_post_hook(after_step) for optimizer in trainer.optimizers]

    def _check(self, trainer: pl.Trainer, device: torch.device) -> None:
        trained = [p for pair in self._pairs for p in (pair.a, pair.b)] + [pair.s for pair in self._controls]
        coarse = {str(p.dtype) for p in trained if p.dtype != torch.float32}
        if self.weight_decay > 0 and coarse:
            raise ConfigurationError(
                f"CompositeWeightDecay: the adapter is in {', '.join(sorted(coarse))}, which rounds a step's decay "
                "away; set the adapter's dtype to float32, or weight_decay to 0."
            )
        if not summarize({"adapters": [torch.ones((), device=device)] if trained else []}, device):
            raise ConfigurationError(
                "CompositeWeightDecay: the model has neither PEFT LoRA layers nor Control Adapters; add an adapter, or "
                "leave the callback out."
            )
        if not all(hasattr(optimizer, "register_step_post_hook") for optimizer in trainer.optimizers):
            raise ConfigurationError(
                f"CompositeWeightDecay: {type(trainer.strategy).__name__} wraps the optimizer so that its steps cannot "
                "be hooked; use another strategy, such as ddp or pipelite."
            )
        if without := [each for each in trainer.optimizers if any("lr" not in group for group in each.param_groups)]:
            raise ConfigurationError(
                f"CompositeWeightDecay: {type(without[0]).__name__} has no learning rate to scale the decay by; use an "
                "optimizer that has one, or leave the callback out."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._steps = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, logs: bool) -> None:
        if self.weight_decay == 0:
            return
        lost: list[Tensor] | None = [] if logs else None
        chunked, controls = self._plan_of(optimizer)
        # Index -1 is for parameters that this optimizer does not train, which keep their values.
        decays = [float(group["lr"]) * self.weight_decay for group in optimizer.param_groups] + [0.0]
        with full_precision():
            for (group_a, group_b), chunk in chunked:
                decay_products(chunk, decays[group_a], decays[group_b], lost)
        for group, pairs in controls.items():
            before = [spectral_norm(pair) for pair in pairs] if logs else []
            torch._foreach_mul_([pair.s for pair in pairs], 1 - decays[group])
            if lost is not None:
                lost += [norm - spectral_norm(pair) for norm, pair in zip(before, pairs, strict=True)]
        if lost is not None:
            self._lost = (self._lost or []) + lost

    def _plan_of(self, optimizer: Optimizer) -> _Plan:
        """Return the optimizer's plan, rebuilt when its groups or the set of trained adapters have changed."""
        groups = [group["params"] for group in optimizer.param_groups]
        # As PyTorch's optimizers do, skip parameters without a gradient, unless all gradients have been freed already.
        released = all(p.grad is None for group in groups for p in group)

        def trains(*parameters: Tensor) -> tuple[bool, ...]:
            return tuple(p.requires_grad and (released or p.grad is not None) for p in parameters)

        trained = tuple(trains(pair.a, pair.b) for pair in self._pairs), trains(*(each.s for each in self._controls))
        known = [len(group) for group in groups], trained
        before, plan = self._plans.get(id(optimizer), (None, None))
        if plan is None or before != known:
            group_of = {p: index for index, group in enumerate(groups) for p in group if all(trains(p))}
            plan = self._plan(group_of)
            self._plans[id(optimizer)] = known, plan
        return plan

    def _plan(self, group_of: Mapping[Tensor, int]) -> _Plan:
        """Sort chunks and Control Adapters by the optimizer's groups of their parameters."""
        by_groups: dict[tuple[int, int], list[LowRank]] = {}
        for pair in self._pairs:
            if pair.a in group_of or pair.b in group_of:
                by_groups.setdefault((group_of.get(pair.a, -1), group_of.get(pair.b, -1)), []).append(pair)
        controls: dict[int, list[ControlPair]] = {}
        for control in self._controls:
            if control.s in group_of:
                controls.setdefault(group_of[control.s], []).append(control)
        return [(place, chunk) for place, pairs in by_groups.items() for chunk in chunks(pairs)], controls

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._lost is not None:
            lost, self._lost = self._lost, None
            for name, value in summarize({"weight_decay": lost}, trainer.strategy.root_device).items():
                pl_module.log(f"train/{name}", value, batch_size=1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()  # Lightning does not call teardown then

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._pairs, self._controls, self._plans = [], [], [], {}
        self._steps, self._lost = False, None


def decay_products(chunk: Chunk, decay_a: float, decay_b: float, lost: list[Tensor] | None) -> None:
    """Decay the products of a chunk of pairs in place, and append to ``lost`` by how much each norm falls.

    Args:
        chunk: Pairs of one shape and scale.
        decay_a: lr·wd for A.
        decay_b: lr·wd for B.
        lost: Float64 scalars, ‖W‖_F before minus after, are appended, one per pair; None to skip this.
    """
    chunk.refresh()
    a, b = chunk.stack()
    gram_a, gram_b = gram_matrices(a, b)
    square = chunk.scale**2
    # The larger one last, once the other's copy is freed, to lower the peak memory.
    if a.shape[2] <= b.shape[1]:
        chunk.write(chunk.downs, torch.baddbmm(a, gram_b, a, alpha=-decay_a * square))
        del a
        chunk.write(chunk.ups, torch.baddbmm(b, b, gram_a, alpha=-decay_b * square))
    else:
        chunk.write(chunk.ups, torch.baddbmm(b, b, gram_a, alpha=-decay_b * square))
        del b
        chunk.write(chunk.downs, torch.baddbmm(a, gram_b, a, alpha=-decay_a * square))
    if lost is not None:
        # A ← (I - c G_B) A turns G_A into (I - c G_B) G_A (I - c G_B). This avoids a second pass over A and B, and the
        # difference of two nearly equal float32 numbers.
        one = torch.eye(gram_a.shape[1], dtype=torch.float64, device=gram_a.device)
        left, right = (one - decay_a * square * gram_b.double()), (one - decay_b * square * gram_a.double())
        after = chunk.norms(left @ gram_a.double() @ left, right @ gram_b.double() @ right)
        lost.extend((chunk.norms(gram_a, gram_b) - after).unbind())
