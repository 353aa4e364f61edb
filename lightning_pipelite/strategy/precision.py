"""Lightning's precision plugin, which is where it calls backward and clips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipelite.strategy.gradients import clip_factor, scale_gradients

if TYPE_CHECKING:
    from lightning_pipelite.strategy.strategy import PipeLiteStrategy


class PipelinePrecision(Precision):
    """Leaves every dtype as it is; takes the gradients from the engine, and clips by their norm over all stages."""

    def __init__(self, strategy: PipeLiteStrategy) -> None:
        self._strategy = strategy

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._strategy.hand_over_gradients()

    @override
    def _wrap_closure(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._wrap_closure(*args, **kwargs)
        self._strategy.weights_change()
        return result

    @override
    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        model.log("train/grad_norm", self._strategy.gradient_norm(), batch_size=1)
        super()._clip_gradients(model, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        factor = clip_factor(self._strategy.gradient_norm(), float(clip_val))
        scale_gradients(self._strategy.stage_parameters(), factor)
