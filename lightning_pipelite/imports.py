"""Imports of large libraries, which are most of what a short command takes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def quick_imports(*, compiles: bool) -> Iterator[None]:
    """Leave out of imports what takes a third of their time.

    There is no garbage in what they make, which stays to the end: it is never looked through, at the end neither.

    Args:
        compiles: Whether functions that a library compiles as it is imported shall be: bitsandbytes does so with some
            for CPUs, for which torch's compiler, the largest import of all, comes too.
    """
    if "torch" in sys.modules:  # nothing is left to gain, and there may be garbage
        yield
        return
    gc.disable()
    with contextlib.ExitStack() as stack:
        if not compiles:
            stack.enter_context(mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"))
        stack.callback(gc.enable)
        stack.callback(gc.freeze)
        yield
