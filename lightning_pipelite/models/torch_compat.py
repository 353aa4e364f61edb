"""Workarounds for bugs of torch's compiler, with the affected versions and when to remove them.

* ``leave_functions_to_autograd``: up to 2.12, Dynamo can trace an ``autograd.Function`` so that its gradients are
  silently wrong. With 2.11 they are zeros if its forward ends in a call that returns its own input (``to`` of the same
  dtype, ``contiguous``, an in-place sum), and part of them is missing if it gets one tensor twice, or if it writes in
  place and its output is not used. 2.12 fixed the first bug; with 2.13 all are fixed. Remove when 2.12 is no longer
  supported.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.torch_version import TorchVersion

TRACES_RIGHTLY = "2.13"  # the first version that does
# Functions whose compiled gradients are tested against eager ones: by torch's tests, and by
# tests/kernels/test_compiled_gradients.py.
TESTED = ("torch.", "lightning_pipelite.", "bitsandbytes.autograd._functions.MatMul4Bit")


def leave_functions_to_autograd(version: str = torch.__version__) -> None:
    """Keep untested ``autograd.Function`` classes out of all graphs compiled from now on, if tracing may be wrong.

    Each causes a graph break, which is slower but correct, and a warning that names it.

    Args:
        version: The version of torch.
    """
    from torch._dynamo.exc import unimplemented
    from torch._dynamo.variables.misc import AutogradFunctionVariable

    traced = AutogradFunctionVariable.call_apply
    if TorchVersion(version) >= TRACES_RIGHTLY or traced.__module__ == __name__:
        return

    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        name = f"{self.fn_cls.__module__}.{self.fn_cls.__qualname__}"
        if not name.startswith(TESTED):
            warnings.warn(
                f"torch {version} may compute wrong gradients of {name} if it is compiled, so it is left uncompiled, "
                f"which is slower; install torch {TRACES_RIGHTLY} or later.",
                stacklevel=2,
            )
            unimplemented(gb_type="untested autograd.Function", context=name, explanation="See the warning.", hints=[])
        return traced(self, tx, args, kwargs)

    AutogradFunctionVariable.call_apply = call_apply  # type: ignore[method-assign]
