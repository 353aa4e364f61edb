"""A command that is over in seconds, most of which would be Python's own."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

_UNCOMPILED = "TORCHDYNAMO_DISABLE"


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Look for no garbage: imports make none, but are looked through again and again, a fifth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def short_lived() -> Iterator[None]:
    """Run without what pays off only later.

    Garbage is not looked for. And what libraries compile as they are imported (bitsandbytes some functions for CPUs) is
    not compiled: torch's compiler is itself a long import.
    """
    before = os.environ.get(_UNCOMPILED)
    try:
        os.environ[_UNCOMPILED] = "1"
        with without_collection():
            yield
    finally:
        if before is None:
            del os.environ[_UNCOMPILED]
        else:
            os.environ[_UNCOMPILED] = before


def end_at_once() -> NoReturn:
    """End the process without taking apart what was imported, which takes a second; memory goes back all the same."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
