"""What torch's compiler does wrong, and how layers are kept from it: with the versions, and what to watch for.

* ``leave_functions_to_autograd``: up to 2.12 Dynamo traces an ``autograd.Function`` such that gradients can be wrong,
  without a word. With 2.11 they are zeros where its forward ends in a call that returns what it is given (``to`` of the
  same dtype, ``contiguous``, a sum in place), and a part is missing where it is given one tensor twice, or where it
  writes in place and what it returns is not used. 2.12 has mended the first; with 2.13 all are right. Remove with the
  support of 2.12.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.torch_version import TorchVersion

TRACES_RIGHTLY = "2.13"  # the first version that does
# Whose compiled gradients tests hold to those without: torch's, and tests/kernels/test_compiled_gradients.py.
TESTED = ("torch.", "lightning_pipelite.", "bitsandbytes.autograd._functions.MatMul4Bit")


def leave_functions_to_autograd(version: str = torch.__version__) -> None:
    """Let what is compiled from now on call each untested ``autograd.Function`` as it is, if it may be traced wrongly.

    The graph is cut in two there, which is slower, and right. A warning names each.

    Args:
        version: Of torch.
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
                f"torch {version} may compile wrong gradients of {name}, so that it is left out of what is compiled, "
                f"which is slower; install torch {TRACES_RIGHTLY} or later.",
                stacklevel=2,
            )
            unimplemented(gb_type="untested autograd.Function", context=name, explanation="See the warning.", hints=[])
        return traced(self, tx, args, kwargs)

    AutogradFunctionVariable.call_apply = call_apply  # type: ignore[method-assign]
