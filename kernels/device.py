"""Where Triton's kernels run."""

from __future__ import annotations

import os

from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Tell whether kernels run on ``tensor``: on a GPU, and anywhere under Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
