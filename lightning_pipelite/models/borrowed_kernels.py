"""Lets a model run on the CPU and the meta device where kernels of other packages are installed for it.

flash-linear-attention, mamba-ssm and causal-conv1d know GPUs alone. transformers takes them for a model's linear
attention, state-space scans and convolutions as soon as they can be imported, whatever device the tensors are on; but
the trial of a tiny model is on the CPU, and a plan on the meta device.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_pipelite.models.transformers_compat import torch_path

TOLD = ("cu_seqlens", "seq_idx")  # how kernels are told where documents begin; torch's ways would pass it over


def lend_to_gpus_alone(model: nn.Module) -> None:
    """Let what the code of ``model`` borrows from other packages run where tensors are on a GPU, and torch's elsewhere.

    For all models of this code in this process: it calls such functions by their names in its module.
    """
    for code in {type(module).__module__ for module in model.modules()}:
        functions = vars(sys.modules[code])
        for name, function in list(functions.items()):
            if (own := torch_path(function)) is not None:
                functions[name] = _by_device(function, own)


def _by_device(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(own).parameters  # a kernel may take more

    @functools.wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if given.device.type not in ("cpu", "meta"):
            return kernel(*args, **kwargs)
        if told := [name for name in TOLD if kwargs.get(name) is not None]:
            raise NotImplementedError(f"{own.__name__} in torch knows of no documents ({told[0]})")
        return own(*args, **{name: value for name, value in kwargs.items() if name in parameters})

    return run
