"""Maps a function over batches in parallel processes, in order, with few batches in memory."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_FEW = 4  # up to this many batches, starting processes does not pay off

_function: Callable[[Any], Any] | None = None


def map_in_order(function: Callable[[In], Out], batches: Iterable[In]) -> Iterator[Out]:
    """Apply a function to each batch.

    Worker processes are forked, one per core, so the function may hold anything, such as a tokenizer; only batches and
    results are sent between processes. At most two batches per worker are in flight. The workers end with this process,
    even if it is killed.

    Args:
        function: The function; it must not use threads.
        batches: The batches; read in this process.

    Yields:
        The results in the order of the batches.

    Raises:
        RuntimeError: If a worker was killed, for example for lack of memory.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, _FEW + 1))
    # On other systems, forking is not safe, and a process cannot be made to end with its parent.
    processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(first) <= _FEW or processes == 1:
        yield from map(function, itertools.chain(first, batches))
        return

    global _function
    _function = function
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else the tokenizer warns about the fork
    executor = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("fork"), initializer=_start, initargs=(os.getpid(),)
    )
    pending: deque[Future[Out]] = deque()
    try:
        for batch in itertools.chain(first, batches):
            pending.append(executor.submit(_apply, batch))
            if len(pending) >= 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError("A tokenisation worker process was killed, possibly because memory ran out.") from error
    finally:
        executor.shutdown(cancel_futures=True)
        _function = None


def _start(parent: int) -> None:
    # A process that outlived its parent would wait for work forever, holding the parent's lock on the cache.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _apply(batch: Any) -> Any:
    assert _function is not None
    return _function(batch)
