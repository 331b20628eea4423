"""Pictures as requests name them, and what a request may ask of a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wanjax.conditioning import size_for
from wanjax.data.video import read_image
from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig
from wanjax.types import PathLike

ImageLike = PathLike | Image.Image | np.ndarray


def read_picture(image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
    """A path, a PIL image or an array (uint8, or float in [0, 1]) as RGB uint8."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(f"An image is an array [H W 3], not {list(array.shape)}; convert it first.")
    if array.dtype == np.uint8:
        return array
    return np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)


def check_pictures(config: DiTConfig, folder: Path, image: object, last_image: object) -> None:
    """Refuse a picture too many or too few for the kind of model in `folder`."""
    if (image is None) != (config.image_dim is None):
        need = "needs a picture" if image is None else "is text-to-video and takes no picture"
        remedy = "give one as `image`" if image is None else "leave `image` out"
        raise UserError(f"The model in {folder} {need}; {remedy}.")
    if (last_image is None) != (config.image_positions is None):
        need = "needs" if last_image is None else "takes no"
        remedy = "give one as `last_image`" if last_image is None else "leave `last_image` out"
        raise UserError(f"The model in {folder} {need} last picture; {remedy}.")


def choose_size(
    height: int | None, width: int | None, area: int, pictures: Sequence[np.ndarray]
) -> tuple[int, int]:
    """The size asked for, or the one of `area` pixels with the first picture's aspect."""
    if (height is None) != (width is None):
        raise UserError("Give both height and width, or neither (the picture's aspect decides).")
    if height is not None:
        return height, width
    return size_for(*(pictures[0].shape[:2] if pictures else (9, 16)), area)
