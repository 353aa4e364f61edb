"""A picture of one number per layer and module."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TEXT = 72, 22, 17  # of a cell, and its letters: legible on TensorBoard's small cards
HEADING, MISSING = (235, 235, 235), (128, 128, 128)


def heat_map(values: Mapping[str, float]) -> npt.NDArray[np.uint8]:
    """Draw numbers as colours, from black (0) over red and yellow to white (the largest).

    Args:
        values: Numbers by the full names of modules. The first number in a name is the layer's.

    Returns:
        The picture, [height, width, 3]: layers as rows, the rest of the names as columns, of which the last parts are
        written without ``_proj``; in the corner the largest number; grey where there is none.
    """
    cells = {_place(name): value for name, value in values.items()}
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    largest = max(max(cells.values()), 1e-30)
    picture = Image.new("RGB", (WIDTH * (len(modules) + 1), HEIGHT * (len(layers) + 1)), HEADING)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=TEXT)
    draw.text((2, 1), f"to {largest:.2g}", fill="black", font=font)
    for column, module in enumerate(modules, start=1):
        draw.rectangle((column * WIDTH, 0, (column + 1) * WIDTH, HEIGHT - 1), fill=HEADING)
        draw.text((column * WIDTH + 4, 1), module.rpartition(".")[2].removesuffix("_proj"), fill="black", font=font)
    for row, layer in enumerate(layers, start=1):
        draw.text((4, row * HEIGHT + 1), str(layer), fill="black", font=font)
        for column, module in enumerate(modules, start=1):
            corner = (column * WIDTH, row * HEIGHT)
            value = cells.get((layer, module))
            colour = MISSING if value is None else _colour(value / largest)
            draw.rectangle((*corner, corner[0] + WIDTH - 1, corner[1] + HEIGHT - 1), fill=colour)
    return np.asarray(picture)


def _place(name: str) -> tuple[int, str]:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return (int(match[1]), name[match.end() :]) if match else (0, name)


def _colour(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * min(max(3 * share - channel, 0.0), 1.0)) for channel in range(3))
    return red, green, blue
