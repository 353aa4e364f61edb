"""Keeps models runnable on the CPU and the meta device when GPU-only kernel packages are installed.

flash-linear-attention, mamba-ssm and causal-conv1d support GPUs only. transformers uses them for a model's linear
attention, state-space scans and convolutions whenever they can be imported, whatever device the tensors are on; but the
trial of a tiny model runs on the CPU, and a plan on the meta device.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_pipelite.models.transformers_compat import torch_path

TOLD = ("cu_seqlens", "seq_idx")  # these tell kernels where documents begin; the torch fallbacks ignore them


def lend_to_gpus_alone(model: nn.Module) -> None:
    """Make the code of ``model`` call kernels of other packages for GPU tensors only, and torch fallbacks elsewhere.

    The functions are replaced in the modules that define the model, so this affects all models of that code in the
    process.
    """
    for code in {type(module).__module__ for module in model.modules()}:
        functions = vars(sys.modules[code])
        for name, function in list(functions.items()):
            if (own := torch_path(function)) is not None:
                functions[name] = _by_device(function, own)


def _by_device(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(own).parameters  # the kernel may accept more

    @functools.wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if given.device.type not in ("cpu", "meta"):
            return kernel(*args, **kwargs)
        if told := [name for name in TOLD if kwargs.get(name) is not None]:
            raise NotImplementedError(f"{own.__name__} in torch does not support packed documents ({told[0]})")
        return own(*args, **{name: value for name, value in kwargs.items() if name in parameters})

    return run
