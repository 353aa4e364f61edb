"""The stages of a plan as a table and as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shutil import get_terminal_size

from lightning_pipelite.planning.planner import Planner
from lightning_pipelite.planning.settings import gib
from lightning_pipelite.planning.stages import StageMemory, step

GIB = 2**30
BAR = 44  # characters of a bar
KINDS = {  # kinds of memory in a stage: their character and name
    "weights": ("█", "weights"),
    "gradients": ("▓", "gradients"),
    "optimizer": ("▒", "optimizer"),
    "activations": ("░", "activations"),
    "transient": ("▚", "temporary"),
    "reserve": ("·", "reserve"),
}

SIZES = {  # attributes of a stage by the titles of their columns
    "weights": "weights",
    "grads": "gradients",
    "optim.": "optimizer",
    "activ.": "activations",
    "temp.": "transient",
    "loss": "loss",
    "reserve": "reserve",
    "total": "total",
}
SPARED = ("params", "loss")  # left out on narrow terminals: weights include params, activ. and temp. include loss


def stage_lines(planner: Planner, stages: Sequence[StageMemory]) -> list[str]:
    """Return the lines of the table and the bars, and a line on what is sent between stages."""
    widest = max(stage.total for stage in stages)
    sizes, limits = planner.devices.memory_of_stages(len(stages)), planner.limits(len(stages))
    scale = max(widest, *sizes, 0)
    unit, base = ("GiB", GIB) if widest >= GIB else ("MiB", 2**20)
    columns = {
        "stage": [str(number) for number in range(len(stages))],
        "layers": [span_of(planner, stage) for stage in stages],
        "params": [_count(stage.parameters) for stage in stages],
        **{title: [f"{getattr(stage, name) / base:.2f}" for stage in stages] for title, name in SIZES.items()},
        "time": [_time(stage.seconds) for stage in stages],
    }
    if len(_table(columns)[0]) + len(f" ({unit})") > get_terminal_size((120, 24)).columns:  # a pipe counts as wide
        columns = {title: cells for title, cells in columns.items() if title not in SPARED}
    head, *rows = _table(columns)
    lines = [f"{head} ({unit})", *rows]
    lines.append("")
    for number, stage in enumerate(stages):
        fits = not limits or stage.total <= limits[number]
        lines.append(f"{number:>5} {_bar(stage, scale, fits)} {gib(stage.total)}")
    lines.append("      " + " ".join(f"{mark} {name}" for mark, name in KINDS.values()))
    if sent := [stage.sent for stage in stages[:-1]]:
        waits = 1 - step(stages, planner.micro_batches).efficiency
        each = ", ".join(sorted({gib(size) for size in sent}))
        lines.append(f"      bubble {waits:.0%} of the time; {each} per step over each boundary")
    return lines


def _table(columns: Mapping[str, Sequence[str]]) -> list[str]:
    wide = {title: max(len(title), 4, *map(len, cells)) for title, cells in columns.items()}
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    return [" ".join(f"{cell:>{width}}" for cell, width in zip(row, wide.values(), strict=True)) for row in rows]


def span_of(planner: Planner, stage: StageMemory) -> str:
    """Return the decoder layers of a stage, such as ``0-15``; several pieces are joined by a plus."""
    layers = planner.layers.meta_model.groups
    return "+".join(f"{layers[start]}-{layers[stop] - 1}" for start, stop in stage.spans)


def _bar(stage: StageMemory, scale: int, fits: bool) -> str:
    marks, so_far = "", 0
    for name, (mark, _) in KINDS.items():
        so_far += getattr(stage, name)
        marks += mark * (round(BAR * so_far / scale) - len(marks))
    room = BAR - len(marks)
    return f"|{marks}{' ' * room}{'|' if fits else '> does not fit'}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"
