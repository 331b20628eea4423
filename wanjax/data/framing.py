"""Frames of any size brought to the size of training: scaled to cover it, cropped at the centre."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def fit(
    frames: UInt8[np.ndarray, "T H0 W0 3"], height: int, width: int
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of `height` x `width`, each as `fit_picture` makes it."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([fit_picture(frame, height, width) for frame in frames])


def fit_picture(
    picture: UInt8[np.ndarray, "H0 W0 3"], height: int, width: int
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of `height` x `width` with its aspect kept: what juts out is cut off evenly.

    Bicubic, with the filter widened when it shrinks (Pillow's), so that fine detail does not alias.
    """
    source_height, source_width, _ = picture.shape
    if (source_height, source_width) == (height, width):
        return picture
    scale = 1 / enlargement(source_height, source_width, height, width)
    left = (source_width - width * scale) / 2
    top = (source_height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))


def enlargement(source_height: int, source_width: int, height: int, width: int) -> float:
    """How many times as large a picture becomes (below 1: it shrinks)."""
    return max(height / source_height, width / source_width)


def cut_away(source_height: int, source_width: int, height: int, width: int) -> float:
    """The share of a picture that juts out, from 0 to 1."""
    factor = enlargement(source_height, source_width, height, width)
    return 1 - height * width / (source_height * source_width * factor**2)
