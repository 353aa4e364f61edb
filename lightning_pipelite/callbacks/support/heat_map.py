"""Draws a picture of one number per layer and module."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TEXT = 72, 22, 17  # minimum cell and font size: legible on TensorBoard's small cards
LEFT, RIGHT = 4, 6  # padding of a label
HEADING, MISSING = (235, 235, 235), (128, 128, 128)


def heat_map(values: Mapping[str, float]) -> npt.NDArray[np.uint8]:
    """Draw numbers as colours, from black (0) over red and yellow to white (the largest).

    Args:
        values: Numbers by the full names of modules. The first number in a name is the layer's.

    Returns:
        The picture, [height, width, 3]: layers as rows, the rest of the names as columns. Columns are labelled by the
        last parts of the names, as many as make them distinct, without ``_proj``. The corner shows the largest number;
        cells without a number are grey.
    """
    cells = {_place(name): value for name, value in values.items()}
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    largest = max(max(cells.values()), 1e-30)
    font = ImageFont.load_default(size=TEXT)
    labels = [f"to {largest:.2g}", *_labels(modules)]
    widths = [max(WIDTH, LEFT + math.ceil(font.getlength(label)) + RIGHT) for label in labels]
    lefts = [0, *itertools.accumulate(widths)]
    picture = Image.new("RGB", (lefts[-1], HEIGHT * (len(layers) + 1)), HEADING)
    draw = ImageDraw.Draw(picture)
    for left, label in zip(lefts, labels, strict=False):
        draw.text((left + LEFT, 1), label, fill="black", font=font)
    for row, layer in enumerate(layers, start=1):
        draw.text((LEFT, row * HEIGHT + 1), str(layer), fill="black", font=font)
        for column, module in enumerate(modules, start=1):
            value = cells.get((layer, module))
            colour = MISSING if value is None else _colour(value / largest)
            draw.rectangle((lefts[column], row * HEIGHT, lefts[column + 1] - 1, (row + 1) * HEIGHT - 1), fill=colour)
    return np.asarray(picture)


def _labels(modules: Sequence[str]) -> list[str]:
    """Return short distinct names: the last parts of each name, as many as that takes."""
    rows = [module.removesuffix("_proj").split(".") for module in modules]
    most = max(map(len, rows))
    sizes = [
        next(size for size in range(1, most + 1) if sum(other[-size:] == row[-size:] for other in rows) == 1)
        for row in rows
    ]
    return [".".join(row[-size:]) for row, size in zip(rows, sizes, strict=True)]


def _place(name: str) -> tuple[int, str]:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(match[1]), name[match.end() :]) if match else (0, name)


def _colour(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * min(max(3 * share - channel, 0.0), 1.0)) for channel in range(3))
    return red, green, blue
