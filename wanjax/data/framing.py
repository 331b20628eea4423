"""Frames of any size brought to the size of training: scaled to cover it, cropped at the centre."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def fit(
    frames: UInt8[np.ndarray, "T H0 W0 3"], height: int, width: int
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of `height` x `width` with their aspect kept: what juts out is cut off evenly.

    Bicubic, with the filter widened when it shrinks (Pillow's), so that fine detail does not alias.
    """
    _, source_height, source_width, _ = frames.shape
    if (source_height, source_width) == (height, width):
        return frames
    scale = min(source_height / height, source_width / width)
    left = (source_width - width * scale) / 2
    top = (source_height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame))
        resized[index] = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return resized
