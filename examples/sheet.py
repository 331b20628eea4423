"""Videos one above the other: as a sheet of moments side by side, or as a moving picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

BACKGROUND, INK = (24, 24, 26), (222, 222, 222)
GAP, LINE = 6, 18

Rows = Mapping[str, UInt8[np.ndarray, "T H W 3"]]


def contact_sheet(
    path: Path, rows: Rows, *, moments: int = 5, scale: int = 2, credit: str = ""
) -> None:
    """Save as a picture `moments` frames of every video, evenly spread, under the row's name.

    `credit` stands below, for films whose licence asks for it. Raises `ValueError` for videos of
    unequal shape.
    """
    count = _frames(rows)
    shown = np.linspace(0, count - 1, min(moments, count)).round().astype(int)
    _draw(rows, shown, scale, credit).save(path)


def moving_sheet(path: Path, rows: Rows, *, fps: float, scale: int = 2, credit: str = "") -> None:
    """Save all videos as one animated WebP that repeats after a second's rest; as above."""
    first, *others = (_draw(rows, [moment], scale, credit) for moment in range(_frames(rows)))
    durations = [round(1000 / fps)] * len(others) + [1000]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=75)


def _frames(rows: Rows) -> int:
    shapes = {frames.shape for frames in rows.values()}
    if len(shapes) != 1:
        raise ValueError(f"the videos have unequal shapes: {sorted(shapes)}")
    return shapes.pop()[0]


def _draw(rows: Rows, shown: Sequence[int], scale: int, credit: str) -> Image.Image:
    _, height, width, _ = next(iter(rows.values())).shape
    across, down = width * scale + GAP, LINE + height * scale + GAP
    foot = LINE if credit else 0
    size = (GAP + len(shown) * across, GAP + len(rows) * down + foot)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, (name, frames) in enumerate(rows.items()):
        top = GAP + row * down
        for column, moment in enumerate(shown):
            left = GAP + column * across
            draw.text((left, top), f"{name}, frame {moment + 1}", fill=INK)
            picture = Image.fromarray(frames[moment])
            picture = picture.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, top + LINE))
    if credit:
        draw.text((GAP, size[1] - foot - 2), credit, fill=INK)
    return sheet
