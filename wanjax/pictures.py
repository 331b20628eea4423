"""Pictures as requests name them, and what a request may ask of a model.

Through one reader a file, a `PIL.Image` of it and its array are the same picture: upright by its
EXIF tag, in sRGB by its colour profile, in 8 bits, what is transparent over black.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from wanjax.conditioning import size_for
from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig
from wanjax.types import PathLike

ImageLike = PathLike | Image.Image | np.ndarray

ORIENTATION = 0x0112  # the EXIF tag, and what brings each of its values upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PROFILED = ("RGB", "RGBA", "L", "CMYK")  # the modes whose colours a profile can speak of
_NOTES = 64 << 20  # bytes of text, or of a colour profile, that a PNG may carry; Pillow has 1 MiB
_EXIF = b"Exif\0\0"
_ROUNDING = 1e-6  # how far floats may lie outside [0, 1]


def read_picture(image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
    """A path, a PIL image, or an array as RGB.

    An array is `H W` or `H W C`, with 1 to 4 channels (grey or RGB, perhaps with alpha), of uint8,
    uint16, or floats in [0, 1]. Raises `UserError` for what is missing, damaged or no picture.
    """
    if isinstance(image, str | Path):
        with _opened(Path(image)) as picture:
            return _rgb(_pixels(picture, str(image)), str(image))
    name = "The picture given"
    if isinstance(image, Image.Image):
        with _readable(name):
            return _rgb(_pixels(image, name), name)
    try:
        return _rgb(np.asarray(image), name)
    except (TypeError, ValueError, RuntimeError) as error:  # a list of lists, a tensor with a past
        raise UserError(f"{name} is no array of numbers ({error}); give one [H W 3].") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with _readable(str(path)):
        with path.open("rb") as file:
            is_jpeg = file.read(2) == b"\xff\xd8"
        try:
            picture = Image.open(path)
        except UnidentifiedImageError:
            if not is_jpeg:
                raise
            picture = _jpeg_with_junk(path.read_bytes())
        with picture:
            yield picture


def _jpeg_with_junk(data: bytes) -> Image.Image:
    """Pillow reads the resolution out of EXIF while it opens a JPEG, and stumbles over some junk:
    hide the EXIF from it then, and give it back when the picture is open."""
    at = data.find(_EXIF)
    picture = Image.open(BytesIO(data.replace(_EXIF, _EXIF.lower(), 1)))
    picture.info["exif"] = data[at : at + 65533] if at >= 0 else b""
    return picture


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Pillow's errors in one sentence, its remarks unsaid, and room for a PNG's notes: ComfyUI
    writes its whole workflow into them."""
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _NOTES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"There is no picture {name}; check the name.") from error
    except IsADirectoryError as error:
        raise UserError(f"{name} is a folder and not a picture; name a file in it.") from error
    except PermissionError as error:
        raise UserError(f"{name} may not be read; change its permissions.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large a picture ({error}); make it smaller.") from error
    except Exception as error:  # a decoder may stumble in any way
        raise UserError(
            f"{name} cannot be read as a picture ({error}); save it again as PNG or JPEG."
        ) from error
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """A PIL image upright and in sRGB, as an array that `_rgb` takes."""
    image.load()
    turn = _turn(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name} has numbers of more than 16 bits; save it as an ordinary PNG.")
        image = Image.fromarray(values.astype(np.uint16))
    elif image.mode != "F":
        image = _in_srgb(image)
    return np.asarray(image if turn is None else image.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright; None for nothing, or where EXIF is junk."""
    try:
        return _TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # junk may be junk in any way
        return None


def _in_srgb(image: Image.Image) -> Image.Image:
    """RGB or RGBA, from the colours that the embedded profile means, if there is a usable one."""
    target = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode not in _PROFILED or target == "RGBA":
        image = image.convert(target)
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=target)
    except (KeyError, TypeError, ValueError, OSError, ImageCms.PyCMSError):
        return image.convert(target)  # none, a broken one, or one of another space


def _rgb(values: np.ndarray, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """Grey made RGB, what is transparent laid over black, and all in 8 bits."""
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not values.size or not 1 <= values.shape[-1] <= 4:
        raise UserError(f"{name} is an array {list(values.shape)}; give one [H W 3].")
    white, channels = _white(values, name), values.shape[-1]
    if values.dtype == np.uint8 and channels % 2:  # as it is, without a larger copy
        eight = values
    else:
        unit = values.astype(np.float32) / white
        colour, alpha = (unit, 1) if channels % 2 else (unit[..., :-1], unit[..., -1:])
        eight = np.round(np.clip(colour * alpha, 0, 1) * 255).astype(np.uint8)
    return np.array(np.broadcast_to(eight, (*eight.shape[:2], 3)))


def _white(values: np.ndarray, name: str) -> int:
    """The number that stands for white in an array of its type."""
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return 255 if values.dtype.itemsize == 1 else 65535
    if not jnp.issubdtype(values.dtype, np.floating):
        raise UserError(
            f"{name} is an array of {values.dtype}; give uint8 (0 to 255), uint16 (0 to 65535) or "
            "floats (0 to 1)."
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise UserError(
            f"{name} has floats from {low:g} to {high:g}; give floats from 0 to 1, or uint8."
        )
    return 1


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
    if not pictures and area == 480 * 832:
        return 480, 832  # Wan's own, which is not quite 9:16
    return size_for(*(pictures[0].shape[:2] if pictures else (9, 16)), area)
