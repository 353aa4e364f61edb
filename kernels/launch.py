"""Launches of Triton kernels in a third of the usual host time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

WIDE = 2**31  # from which on Triton passes numbers in 64 bits

_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Compiled kernels by what Triton specialises them on, each with its constants in the order of its parameters."""


def launch(kernel: Any, grid: tuple[int, int, int], *args: Tensor | int, **constants: Any) -> None:
    """Compute ``kernel[grid](*args, **constants)``.

    At each launch Triton works out again which of its compiled kernels fits. Here they are looked up by what it
    specialises on: dtypes, which addresses and numbers are multiples of 16, which numbers are 1 or need 64 bits, and
    constants.

    Args:
        kernel: A kernel whose parameters end with its constants.
        grid: The number of programs.
        args: All arguments but the constants; numbers must be integers.
        constants: The constants, and launch options such as ``num_warps``.
    """
    if torch.compiler.is_dynamo_compiling() or not isinstance(kernel, JITFunction):  # the latter if it is interpreted
        kernel[grid](*args, **constants)
        return
    device = torch.cuda.current_device()
    # Of what is done here, calls take the longest.
    specialised: list[Any] = []
    for arg in args:
        if type(arg) is int:
            specialised.append((arg == 1, arg % 16 == 0, -WIDE <= arg < WIDE))
        else:
            specialised.append((arg.dtype, arg.data_ptr() % 16 == 0))  # type: ignore[union-attr]
    key = (id(kernel), device, *specialised, *constants.items())
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, values = found
    if _is_watched():
        compiled[grid](*args, *values)
    else:  # the same, without the arguments for hooks
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values)


def _is_watched() -> bool:
    """Tell whether a launch hook is set, such as that of Triton's profiler."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
