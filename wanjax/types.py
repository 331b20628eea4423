"""The glossary of shapes, and the typed records that travel between modules.

Shapes, everywhere in this project (channels are always last):

| letter | meaning | letter | meaning |
|---|---|---|---|
| `B` | batch | `N` | video tokens, `t * (h/2) * (w/2)` |
| `T H W` | frames, height, width in pixels | `L` | text tokens (512) |
| `t h w` | on the latent grid: `t = (T-1)/4 + 1`, `h = H/8`, `w = W/8` | `S` | image tokens (257) |
| `C` | channels | `D` | model width; `F` feed-forward width |
| `K` | attention heads | `E` | head size |
| `R` | LoRA rank | | |
"""

from dataclasses import dataclass
from pathlib import Path
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

PathLike = str | Path


# Not checked at run time: as pytrees these two are also rebuilt with NumPy arrays (by the loader),
# shapes, shardings or gradients as leaves.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """What the denoiser is told beside the noisy latents, already computed by the encoders.

    `text` holds umT5 features, cut to the prompt's true length and zero-padded to `L`; `image` the
    CLIP tokens; `latents` the mask (4 channels) and the encoded first frame (16), in that order.
    `image` and `latents` are None for text-to-video models.
    """

    text: Float[Array, "B L C"]
    image: Float[Array, "B S C2"] | None = None
    latents: Float[Array, "B t h w C3"] | None = None


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Training examples: clean latents at the diffusion model's scale, and their conditions."""

    latents: Float[Array, "B t h w C"]
    condition: Condition


@dataclass(frozen=True)
class Conditioned:
    """A request whose encoders have run: what the denoiser needs, with and without the prompt."""

    positive: Condition
    negative: Condition
    height: int
    width: int
    frames: int


@dataclass(frozen=True)
class Clip:
    """A window of film: `frames` RGB, `fps` after resampling, `name` unique within its data set."""

    name: str
    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float
    caption: str
    source_fps: float


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt: ids and the mask that is 1 on real tokens (the end token included)."""

    ids: Int[np.ndarray, "B L"]
    mask: Int[np.ndarray, "B L"]
