"""Draws how long the stages of a pipeline compute and wait."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, GAP, LEFT, RIGHT, TEXT = 240, 26, 8, 80, 240, 18  # legible on TensorBoard's small cards
BUSY, WAITING = (31, 119, 180), (221, 221, 221)


def stage_bars(times: Mapping[int, tuple[float, float]]) -> npt.NDArray[np.uint8]:
    """Draw a bar for each stage on a common scale: busy in blue, then waiting in grey.

    Args:
        times: Busy and waiting seconds of a step, by stage.

    Returns:
        The picture, [height, width, 3].
    """
    longest = max(max(sum(each) for each in times.values()), 1e-30)
    font = ImageFont.load_default(size=TEXT)
    told = {number: f"{busy:.3g} s, {waiting:.3g} s waiting" for number, (busy, waiting) in times.items()}
    right = max(RIGHT, 12 + math.ceil(max(map(font.getlength, told.values()))))
    picture = Image.new("RGB", (LEFT + WIDTH + right, (BAR + GAP) * len(times) + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for row, (number, (busy, waiting)) in enumerate(sorted(times.items())):
        top = GAP + row * (BAR + GAP)
        middle = LEFT + round(WIDTH * busy / longest)
        end = LEFT + round(WIDTH * (busy + waiting) / longest)
        draw.rectangle((LEFT, top, end, top + BAR - 1), fill=WAITING)
        draw.rectangle((LEFT, top, middle, top + BAR - 1), fill=BUSY)
        draw.text((4, top + 2), f"stage {number}", fill="black", font=font)
        draw.text((end + 6, top + 2), told[number], fill="black", font=font)
    return np.asarray(picture)
