"""What the model is told of a picture: one function for encoding, training and sampling.

A picture becomes (1) a video of itself followed by grey frames, which the VAE encodes, (2) a mask
that is 1 on its latent frame, (3) the input of the CLIP tower. `preprocess="official"` follows
Wan-Video/Wan2.1 `wan/image2video.py` (bicubic without antialias; CLIP's picture squashed),
`"diffusers"` follows `WanImageToVideoPipeline` (PIL Lanczos; shortest edge and centre crop).

Wan's own sizes have the picture's aspect. At any other, which only we allow, the frame is covered
by the picture's centre as in training (`data/framing.py`); diffusers squashes it.
"""

import math
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from wanjax.errors import UserError, nearest
from wanjax.models.clip import CLIPVision
from wanjax.models.umt5 import UMT5
from wanjax.models.vae import VAE
from wanjax.text import zero_padding
from wanjax.types import Tokens

PREPROCESS = ("official", "diffusers")
CLIP_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)

Picture = UInt8[np.ndarray, "H0 W0 3"]


@dataclass(frozen=True)
class Prepared:
    """A picture (or two) ready for the encoders: `video` in about [-1, 1], `mask` 0 or 1, `clip`
    normalised, one picture per conditioned frame."""

    video: Float[np.ndarray, "T H W 3"]
    mask: Float[np.ndarray, "t h w 4"]
    clip: Float[np.ndarray, "P _ _ 3"]


def size_for(picture_height: int, picture_width: int, area: int) -> tuple[int, int]:
    """Height and width of about `area` pixels with the picture's aspect, both divisible by 16."""
    if area < 256:
        raise UserError(f"area={area} is less than one patch of 16x16; use 256 pixels or more.")
    aspect = picture_height / picture_width
    height = round(math.sqrt(area * aspect) // 8 // 2 * 2) * 8
    width = round(math.sqrt(area / aspect) // 8 // 2 * 2) * 8
    return height, width


def check_size(frames: int, height: int, width: int) -> None:
    """Refuse what the networks cannot take, naming the nearest that they can."""
    if frames < 1 or frames % 4 != 1:
        near = max(1, round((frames - 1) / 4) * 4 + 1)
        raise UserError(f"frames={frames} is not 4n+1; use {near}, for example.")
    for name, size in (("height", height), ("width", width)):
        if size < 16 or size % 16:
            near = max(16, round(size / 16) * 16)
            raise UserError(f"{name}={size} is not divisible by 16; use {near}, for example.")


def prepare(
    picture: Picture,
    *,
    frames: int,
    height: int,
    width: int,
    last_picture: Picture | None = None,
    preprocess: str = "official",
    clip_size: int = 224,
) -> Prepared:
    """Everything the encoders need to know of a first frame, and of a last one if it is given."""
    if preprocess not in PREPROCESS:
        raise UserError(f"There is no preprocess '{preprocess}'{nearest(preprocess, PREPROCESS)}")
    check_size(frames, height, width)
    pictures = [picture] if last_picture is None else [picture, last_picture]
    for given in pictures:
        _warn_of_aspect(given, height, width, preprocess)
    video = np.zeros((frames, height, width, 3), np.float32)
    for index, given in zip((0, -1), pictures):
        video[index] = _frame(given, height, width, preprocess)
    given_frames = np.zeros(frames, np.float32)
    given_frames[[0, -1][: len(pictures)]] = 1
    clip = np.stack([_clip_input(given, clip_size, preprocess) for given in pictures])
    return Prepared(video, mask_for(given_frames, height // 8, width // 8), clip)


def mask_for(given: Float[np.ndarray, " T"], h: int, w: int) -> Float[np.ndarray, "t h w 4"]:
    """Which pixel frames are given, as 4 channels per latent frame; the first counts four times."""
    per_latent = np.concatenate([np.repeat(given[:1], 4), given[1:]]).reshape(-1, 1, 1, 4)
    return np.broadcast_to(per_latent, (len(per_latent), h, w, 4)).astype(np.float32)


def image_tokens(
    image_encoder: CLIPVision, pictures: Float[np.ndarray, "P H W 3"]
) -> Float[Array, "1 S C"]:
    """CLIP's tokens of the picture(s), joined along S."""
    tokens = encode_pixels(image_encoder, pictures)
    return tokens.reshape(1, -1, tokens.shape[-1])


def picture_condition(vae: VAE, prepared: Prepared) -> Float[Array, "1 t h w 20"]:
    """The condition that the picture(s) give: mask, then latents."""
    latents = vae.encode(prepared.video[None])
    return jnp.concatenate([jnp.asarray(prepared.mask)[None], latents], axis=-1)


def encode_text(text_encoder: UMT5, tokens: Tokens) -> list[Float[np.ndarray, "L C"]]:
    """umT5 features of each prompt, zero after its end; one at a time, to bound memory."""
    features = []
    for ids, mask in zip(tokens.ids, tokens.mask):
        encoded = encode_ids(text_encoder, ids[None], mask[None])
        features.append(np.asarray(zero_padding(encoded, mask[None])[0]))
    return features


@jax.jit
def encode_pixels(image_encoder: CLIPVision, pixels: Float[Array, "B H W 3"]) -> jax.Array:
    """CLIP's tokens, one program for each number of pictures."""
    return image_encoder(pixels)


@jax.jit
def encode_ids(text_encoder: UMT5, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """umT5's last hidden state, one program for each length."""
    return text_encoder(ids, mask)


def centre(picture: Picture, height: int, width: int) -> UInt8[np.ndarray, "H1 W1 3"]:
    """The largest centred part of a picture with the aspect of `height` x `width`.

    A difference that is no more than `size_for` makes by rounding is left, to be squashed as Wan
    does it.
    """
    tall, wide = picture.shape[:2]
    if wide * height < tall * (width + 16) and tall * width < wide * (height + 16):
        return picture
    rows = min(tall, max(1, round(wide * height / width)))
    columns = min(wide, max(1, round(tall * width / height)))
    top, left = (tall - rows) // 2, (wide - columns) // 2
    return picture[top : top + rows, left : left + columns]


def _warn_of_aspect(picture: Picture, height: int, width: int, preprocess: str) -> None:
    lost = 1 - centre(picture, height, width).size / picture.size
    if lost > 0.05:
        tall, wide = picture.shape[:2]
        done = f"{lost:.0%} of it is cut off" if preprocess == "official" else "it is squashed"
        warnings.warn(
            f"The picture of {wide}x{tall} has another aspect than the video of {width}x{height}: "
            f"{done}; choose a height and width of its aspect to avoid that.",
            stacklevel=3,
        )


def _frame(picture: Picture, height: int, width: int, preprocess: str) -> np.ndarray:
    if preprocess == "official":
        return resize_bicubic(_signed(centre(picture, height, width)), height, width)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return _signed(np.asarray(resized))


def _clip_input(picture: Picture, size: int, preprocess: str) -> np.ndarray:
    if preprocess == "official":
        unit = resize_bicubic(_signed(picture), size, size) * 0.5 + 0.5
    else:
        unit = _shortest_edge_crop(picture, size).astype(np.float32) / 255
    return ((unit - CLIP_MEAN) / CLIP_STD).astype(np.float32)


def _shortest_edge_crop(picture: Picture, size: int) -> Picture:
    """Resize the shorter edge to `size` (PIL bicubic) and crop the centre, as CLIP's processor."""
    height, width = picture.shape[:2]
    short = min(height, width)
    new_height, new_width = int(size * height / short), int(size * width / short)
    resized = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


def _signed(picture: Picture) -> np.ndarray:
    return picture.astype(np.float32) / 255 * 2 - 1


def resize_bicubic(
    image: Float[np.ndarray, "H0 W0 C"], height: int, width: int
) -> Float[np.ndarray, "H W C"]:
    """Cubic convolution with a = -0.75, half-pixel centres, no antialias and no clamp.

    This is `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`; values may
    overshoot the input's range.
    """
    rows, columns = (_cubic_taps(a, b) for a, b in zip(image.shape, (height, width)))
    picked = np.einsum("hkwc,hk->hwc", image[rows[0]], rows[1])
    return np.einsum("hwkc,wk->hwc", picked[:, columns[0]], columns[1]).astype(np.float32)


def _cubic_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """For each target position: the 4 source indices (clamped at the border) and their weights."""
    position = (np.arange(target) + 0.5) * source / target - 0.5
    left = np.floor(position)
    offsets = np.arange(-1, 3)
    distance = np.abs(position[:, None] - (left[:, None] + offsets))
    a = -0.75
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance <= 1, near, far).astype(np.float32)
    indices = np.clip(left[:, None] + offsets, 0, source - 1).astype(int)
    return indices, weights
