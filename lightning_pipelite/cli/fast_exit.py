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
def short_lived() -> Iterator[None]:
    """Run without what pays off only later.

    Garbage is not looked for: imports make none, but are looked through again and again. And what libraries compile as
    they are imported (bitsandbytes some functions for CPUs) is not compiled: torch's compiler is itself a long import.
    """
    was_enabled, before = gc.isenabled(), os.environ.get(_UNCOMPILED)
    gc.disable()
    try:
        os.environ[_UNCOMPILED] = "1"
        yield
    finally:
        if before is None:
            del os.environ[_UNCOMPILED]
        else:
            os.environ[_UNCOMPILED] = before
        if was_enabled:
            gc.enable()


def end_at_once() -> NoReturn:
    """End the process without taking apart what was imported, which takes a second; memory goes back all the same."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
