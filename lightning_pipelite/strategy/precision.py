"""Lightning's precision plugin, through which it calls backward and clips gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.strategy.gradients import clip_factor, scale_gradients

if TYPE_CHECKING:
    from lightning_pipelite.strategy.training import PipelineTraining


class PipelinePrecision(Precision):
    """Leaves every dtype as it is; takes the gradients from the engine, and clips by their norm over all stages."""

    def __init__(self, training: PipelineTraining) -> None:
        self._training = training
        self._norm: Tensor | None = None  # of the current gradients, if known

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._training.hand_over_gradients()

    @override
    def _wrap_closure(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._wrap_closure(*args, **kwargs)
        self._training.weights_change()
        return result

    @override
    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Log the norm, and clip: Lightning's last call before the optimizer steps."""
        norms = self._training.gradient_norms()
        model.log("train/grad_norm", norms.total, batch_size=1)
        # A module's own clipping may change the gradients in any way, before and after it calls ours.
        own = is_overridden("configure_gradient_clipping", model)
        self._norm = None if own else norms.total
        super()._clip_gradients(model, *args, **kwargs)
        clipped = self._norm if self._norm is not None and not own else self._training.gradient_norms().total
        self._norm = None
        self._training.require_finite(norms, clipped)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        norm = self._norm if self._norm is not None else self._training.gradient_norms().total
        factor = clip_factor(norm, float(clip_val))
        scale_gradients(self._training.parameters, factor)
        self._norm = norm * factor

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if any(p.grad is not None for p in self._training.parameters):  # torch's fails without any, unlike that by norm
            super().clip_grad_by_value(optimizer, clip_val)
        self._norm = None
