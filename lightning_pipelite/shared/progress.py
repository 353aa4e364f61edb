"""Progress of a piece of work: a bar in a terminal, otherwise an occasional line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from tqdm import tqdm
from typing_extensions import Self

Style = Literal["auto", "rich", "plain", "lines"]
T = TypeVar("T")
PLAIN_BAR = 20
"""Width of the bar, in characters, in dumb terminals."""


def _is_first() -> bool:
    """Tell whether this process shows progress, by Lightning's rank where Lightning is used: exporting does without."""
    return getattr(rank_zero_only, "rank", 0) == 0


class View(Protocol):
    """Where progress is shown, on standard error."""

    def due(self) -> bool:
        """Tell whether enough time has passed to show something new."""

    def update(self, done: int, total: int | None, text: str, *shorter: str) -> None:
        """Show how much is done, of a total that may be unknown, and the first of the texts that fits."""

    def print(self, line: str) -> None:
        """Print a line to standard output without breaking the bar."""

    def close(self) -> None:
        """End the bar; nothing may be shown afterwards."""


def view(label: str, *, style: Style = "auto", stays: bool = False) -> View:
    """Choose how progress is shown: ``rich`` in a terminal, ``plain`` (tqdm) in a dumb one or a notebook, else lines.

    Args:
        label: What is being done, such as "tokenising".
        style: The choice, if it is not left to this function.
        stays: Leave the bar on the screen when it is closed.
    """
    if style == "auto":
        console = Console(stderr=True)
        in_colour = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
        style = "rich" if in_colour else "plain" if console.is_terminal or console.is_jupyter else "lines"
    if style == "rich":
        return _Rich(label, stays)
    return _Plain(label, stays) if style == "plain" else _Lines(label)


def first_that_fits(texts: Sequence[str], room: int) -> str:
    """Return the first text that has at most ``room`` characters, or the last text if none has."""
    return next((text for text in texts if len(text) <= room), texts[-1])


def duration(seconds: float) -> str:
    """Format seconds as 1:23, or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows the progress of a piece of work on rank 0; nested within another one, it is silent.

    Use it as a context manager.

    Args:
        label: What is being done, such as "tokenising".
        total: The number of units, if known.
        unit: The unit that is shown, such as "tensors".
        scale: How much of what is counted makes one such unit, such as 1e6 for bytes shown in MB.
    """

    _under_way = False

    def __init__(self, label: str, total: int | None = None, unit: str = "", scale: float = 1) -> None:
        self._label, self._total, self._unit, self._scale = label, total, unit, scale
        self._done = 0
        self._view: View | None = None

    def __enter__(self) -> Self:
        if not Progress._under_way and _is_first():
            Progress._under_way = True
            self._view, self._start = view(self._label), time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._view is not None:
            Progress._under_way = False
            self._view.close()
            self._view = None

    def advance(self, units: int = 1) -> None:
        """Count further units as done."""
        self.reach(self._done + units)

    def reach(self, done: int) -> None:
        """Set how many units are done."""
        self._done = done
        if self._view is None or not self._view.due():
            return
        elapsed = time.monotonic() - self._start
        of_total = "" if self._total is None else f" of {self._shown(self._total)}"
        text = f"{self._shown(done)}{of_total} {self._unit}, {duration(elapsed)}"
        if self._total is not None and 0 < done < self._total:
            text += f", {duration(elapsed / done * (self._total - done))} left"
        self._view.update(done, self._total, text)

    def _shown(self, units: int) -> str:
        return f"{units:,}" if self._scale == 1 else f"{units / self._scale:,.1f}"


def track(items: Iterable[T], label: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield items, and show how many are done.

    Args:
        items: The items; if they have a length, it is the default total.
        label: As in :class:`Progress`.
        unit: As in :class:`Progress`.
        total: The number of items.
    """
    if total is None:
        with suppress(TypeError):
            total = len(items)  # type: ignore[arg-type]
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def from_tqdm(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Show transformers' bars like all others here; for ``transformers.utils.logging.set_tqdm_hook``."""
    if not args:
        return factory(*args, **kwargs)
    return track(args[0], str(kwargs.get("desc", "working")).lower(), "tensors", kwargs.get("total"))


class _Paced:
    """Tells when it is time to show something new."""

    pause = 0.1  # seconds

    def __init__(self) -> None:
        self._last = -math.inf

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.pause


def _bar_width(console: Console) -> int:
    return max(8, min(40, console.width - 112))


class _Rich(_Paced):
    def __init__(self, label: str, stays: bool) -> None:
        super().__init__()
        console = Console(stderr=True)
        self._beside = len(label) + 2  # with the spaces between columns
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=len(label))),
            BarColumn(bar_width=_bar_width(console)),
            TextColumn(
                "{task.fields[text]}",
                markup=False,
                style="default",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            expand=True,
            auto_refresh=False,
            transient=not stays,
            redirect_stdout=sys.stdout.isatty(),  # otherwise output meant for a file would be shown
        )
        self._task = self._bar.add_task(label, total=None, text="")
        self._bar.start()
        self._bar.console.show_cursor(True)  # rich hides it, for good if the process is killed

    def update(self, done: int, total: int | None, text: str, *shorter: str) -> None:
        self._last = time.monotonic()
        room = self._bar.console.width - self._beside - _bar_width(self._bar.console)
        shown = first_that_fits([text, *shorter], room)
        self._bar.update(self._task, completed=done, total=total, text=shown, refresh=True)

    def print(self, line: str) -> None:
        print(line, flush=True)  # sys.stdout is rich's, if it is the terminal

    def close(self) -> None:
        self._bar.stop()


class _Plain(_Paced):
    def __init__(self, label: str, stays: bool) -> None:
        super().__init__()
        self._label = label
        shape = f"{{desc}} |{{bar:{PLAIN_BAR}}}| {{unit}}"
        self._bar = tqdm(desc=label, leave=stays, unit="", bar_format=shape, file=sys.stderr, dynamic_ncols=True)

    def update(self, done: int, total: int | None, text: str, *shorter: str) -> None:
        self._last = time.monotonic()
        columns = self._bar.format_dict["ncols"] or 80
        room = columns - len(f"{self._label} |{'':{PLAIN_BAR}}| ") - 1  # tqdm leaves the last column free
        self._bar.total, self._bar.n, self._bar.unit = total, done, first_that_fits([text, *shorter], room)
        self._bar.refresh()

    def print(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


class _Lines(_Paced):
    """Prints a line at most every ten seconds, the first after ten: what is done sooner needs none."""

    pause = 10.0

    def __init__(self, label: str) -> None:
        self._label, self._last = label, time.monotonic()

    def update(self, done: int, total: int | None, text: str, *shorter: str) -> None:
        self._last = time.monotonic()
        share = f" ({100 * done / total:.0f} %)" if total else ""
        print(f"{self._label}{share}: {text}", file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        pass
