"""Wan2.1's causal video VAE: video in [-1, 1] to normalised latents, and back.

Both halves run chunk by chunk (`wanjax.causal`), four frames, one latent, at a time, in one program
whatever the video's length; the first frame, alone in its chunk, is not seen over time. Large
pictures go through the highest resolutions in tiles, each with what it must see beyond its borders,
so that there are no seams.
After `wan/modules/vae.py` of Wan-Video/Wan2.1.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from wanjax.attention import attention
from wanjax.causal import CausalConv, Memory, Tiling, in_tiles, stream
from wanjax.errors import UserError
from wanjax.nn import BIAS, NORM, Linear, conv, xavier_uniform
from wanjax.precision import precision_of
from wanjax.sharding import PictureAxes, picture_axes, split_picture

AnyArray = Array | np.ndarray

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    """The architecture, Wan2.1's by default, and the statistics that normalise its latents."""

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_dim: int = 16
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the encoder's stages; the decoder has the same, backwards."""
        return tuple(self.base_dim * m for m in self.dim_mult)

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels to a latent, over time, height and width: (4, 8, 8)."""
        space = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space

    def video_shape(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of a video whose latents are `t h w`."""
        (t, h, w), (frames, height, width) = grid, self.stride
        return (t - 1) * frames + 1, h * height, w * width


class Conv2D(nnx.Module):
    """A 3x3 convolution of every frame."""

    def __init__(self, d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.precision = precision_of("vae", dtype)
        kernel = xavier_uniform(rngs.params(), (3, 3, d_in, d_out), self.precision.storage)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros(d_out, BIAS))

    def __call__(
        self, x: Float[Array, "B T H W C"], *, stride: int, padding: tuple[int, int]
    ) -> Float[Array, "B T H2 W2 C2"]:
        frames = rearrange(x.astype(self.precision.compute), "b t h w c -> (b t) h w c")
        y = conv(frames, self.kernel[...], strides=(stride, stride), padding=(padding, padding))
        y = y + self.bias[...].astype(y.dtype)
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


def pointwise(d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    """A convolution whose kernel is one point: the same product at every position."""
    return Linear(d_in, d_out, axes=(None, None), kind="vae", dtype=dtype, rngs=rngs)


class Norm(nnx.Module):
    """`x / max(|x|, 1e-12) * sqrt(C) * scale` over the channels, in fp32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width, NORM.storage))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(NORM.accumulate)
        square = jnp.maximum((y * y).sum(-1, keepdims=True), 1e-24)
        return (y * jax.lax.rsqrt(square / x.shape[-1]) * self.scale[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two causal convolutions beside a shortcut, which is a product only if the width changes."""

    def __init__(self, d_in: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_in = Norm(d_in)
        self.conv_in = CausalConv(d_in, d_out, dtype=dtype, rngs=rngs)
        self.norm_out = Norm(d_out)
        self.conv_out = CausalConv(d_out, d_out, dtype=dtype, rngs=rngs)
        self.shortcut = None if d_in == d_out else pointwise(d_in, d_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], memory: Memory) -> Float[Array, "B T H W C2"]:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.conv_in(jax.nn.silu(self.norm_in(x)), memory)
        return shortcut + self.conv_out(jax.nn.silu(self.norm_out(y)), memory)


class SpatialAttention(nnx.Module):
    """Self-attention of one head over the positions of each frame, beside a shortcut."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = Norm(width)
        self.qkv = pointwise(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = pointwise(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        batch, _, height, width, _ = x.shape
        x = split_picture(x)  # every position sees the whole frame, which is small here
        qkv = rearrange(self.qkv(self.norm(x)), "b t h w (n c) -> n (b t) (h w) 1 c", n=3)
        y = attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(rearrange(y, "(b t) (h w) 1 c -> b t h w c", b=batch, h=height))
        return split_picture(x, picture_axes(height, width))


class Middle(nnx.Module):
    """The lowest resolution: two residual blocks around an attention."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.block_in = ResidualBlock(width, width, dtype=dtype, rngs=rngs)
        self.attention = SpatialAttention(width, dtype=dtype, rngs=rngs)
        self.block_out = ResidualBlock(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], memory: Memory) -> Float[Array, "B T H W C"]:
        return self.block_out(self.attention(self.block_in(x, memory)), memory)


class Downsample(nnx.Module):
    """Halves height and width and, if `time`, the frames after the first."""

    def __init__(self, width: int, time: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.space = Conv2D(width, width, dtype=dtype, rngs=rngs)
        self.time = CausalConv(width, width, (3, 1, 1), 2, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "B T H W C"], memory: Memory) -> Float[Array, "B T2 h w C"]:
        x = self.space(x, stride=2, padding=(0, 1))
        if self.time is None:
            return x
        return jnp.where(memory.first, x[:, 1::2], self.time(x, memory))

    def reach(self, after: int) -> int:
        """Columns to a side that are seen where `after` of the result are."""
        return 2 * after + 2


class Upsample(nnx.Module):
    """Doubles height and width and, if `time`, the frames after the first; halves the channels."""

    def __init__(self, width: int, time: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.time = (
            CausalConv(width, 2 * width, (3, 1, 1), dtype=dtype, rngs=rngs) if time else None
        )
        self.space = Conv2D(width, width // 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T h w C"], memory: Memory) -> Float[Array, "B T2 H W C2"]:
        if self.time is not None:
            y = self.time(jnp.where(memory.first, 0, x), memory)  # the first frame is never seen
            y = rearrange(y, "b t h w (n c) -> b (t n) h w c", n=2)
            x = jnp.where(memory.first, x.repeat(2, axis=1), y)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return self.space(x, stride=1, padding=(1, 1))

    def reach(self, after: int) -> int:
        """Columns to a side that are seen where `after` of the result are."""
        return -(-(after + 1) // 2)


class Stage(nnx.Module):
    """Residual blocks at one resolution, and the change to the next (None after the last)."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        count: int,
        resample: Downsample | Upsample | None,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        widths = (d_in, *(d_out,) * count)
        self.blocks = nnx.List(
            ResidualBlock(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(widths)
        )
        self.resample = resample

    def __call__(
        self, x: Float[Array, "B T H W C"], memory: Memory
    ) -> Float[Array, "B T2 H2 W2 C2"]:
        for block in self.blocks:
            x = block(x, memory)
        return x if self.resample is None else self.resample(x, memory)

    def reach(self, after: int) -> int:
        """Columns to a side that are seen where `after` of the result are."""
        after = after if self.resample is None else self.resample.reach(after)
        return after + 2 * len(self.blocks)  # two convolutions each


# The stages at the highest resolutions, whose arrays are the largest, and how many elements one
# frame of them may have (fp32: 128 MiB); beyond that they work through the width in tiles.
LARGE = 2
TILE_ELEMENTS = 1 << 25


def tiles(batch: int, height: int, width: int, channels: int) -> int:
    """Into how many tiles pictures of full resolution are cut."""
    return -(-batch * height * width * channels // TILE_ELEMENTS)


class Encoder(nnx.Module):
    """Video to the moments of its latents, before their last product."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = (config.base_dim, *config.widths)
        self.conv_in = CausalConv(3, widths[0], dtype=dtype, rngs=rngs)
        stages = []
        for (d_in, d_out), time in zip(pairwise(widths), (*config.temporal_downsample, None)):
            down = None if time is None else Downsample(d_out, time, dtype=dtype, rngs=rngs)
            count = config.num_res_blocks
            stages.append(Stage(d_in, d_out, count, down, dtype=dtype, rngs=rngs))
        self.stages = nnx.List(stages)
        self.middle = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = Norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W 3"], memory: Memory) -> Float[Array, "B t h w C"]:
        smaller = 2 ** (len(self.stages) - 1)
        axes = picture_axes(x.shape[2] // smaller, x.shape[3] // smaller)
        x = in_tiles(self._large, split_picture(x, axes), memory, self._tiling(x, axes))
        for stage in self.stages[LARGE:]:
            x = stage(x, memory)
        x = self.middle(x, memory)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), memory)

    def _large(self, x: Float[Array, "B T H W 3"], memory: Memory) -> Float[Array, "B T2 H2 W2 C"]:
        x = self.conv_in(x, memory)
        for stage in self.stages[:LARGE]:
            x = stage(x, memory)
        return x

    def _tiling(self, x: Float[Array, "B T H W 3"], axes: PictureAxes) -> Tiling:
        reach, smaller = 0, 1
        for stage in reversed(self.stages[:LARGE]):
            reach = stage.reach(reach)
            smaller *= 1 if stage.resample is None else 2
        batch, _, height, width, _ = x.shape
        count = 1 if any(axes) else tiles(batch, height, width, self.conv_in.kernel.shape[-1])
        return Tiling(width, count, reach + 1, Fraction(1, smaller), align=smaller)


class Decoder(nnx.Module):
    """Latents, after their first product, to video."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.conv_in = CausalConv(config.z_dim, width, dtype=dtype, rngs=rngs)
        self.middle = Middle(width, dtype=dtype, rngs=rngs)
        stages = []
        for d_out, time in zip(config.widths[::-1], (*config.temporal_downsample[::-1], None)):
            up = None if time is None else Upsample(d_out, time, dtype=dtype, rngs=rngs)
            count = config.num_res_blocks + 1
            stages.append(Stage(width, d_out, count, up, dtype=dtype, rngs=rngs))
            width = d_out // 2
        self.stages = nnx.List(stages)
        self.norm_out = Norm(config.widths[0])
        self.conv_out = CausalConv(config.widths[0], 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w C"], memory: Memory) -> Float[Array, "B T H W 3"]:
        axes = picture_axes(*x.shape[2:4])
        x = self.middle(self.conv_in(split_picture(x, axes), memory), memory)
        for stage in self.stages[:-LARGE]:
            x = stage(x, memory)
        return in_tiles(self._large, x, memory, self._tiling(x, axes))

    def _large(self, x: Float[Array, "B T H W C"], memory: Memory) -> Float[Array, "B T H2 W2 3"]:
        for stage in self.stages[-LARGE:]:
            x = stage(x, memory)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), memory)

    def _tiling(self, x: Float[Array, "B T H W C"], axes: PictureAxes) -> Tiling:
        reach, larger = 1, 1
        for stage in reversed(self.stages[-LARGE:]):
            reach = stage.reach(reach)
            larger *= 1 if stage.resample is None else 2
        batch, _, height, width, _ = x.shape
        size = (batch, larger * height, larger * width)
        count = 1 if any(axes) else tiles(*size, self.conv_out.kernel.shape[-2])
        return Tiling(width, count, reach, Fraction(larger))


class VAE(nnx.Module):
    """The whole autoencoder, which is fp32 whatever `dtype` is asked for.

    `encode` and `decode` are compiled, once for each size of video.
    """

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant = pointwise(2 * config.z_dim, 2 * config.z_dim, dtype=dtype, rngs=rngs)
        self.post_quant = pointwise(config.z_dim, config.z_dim, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, video: Float[AnyArray, "B T H W 3"]) -> Float[Array, "B t h w C"]:
        """Normalised latents (the mean, nothing is drawn), fp32, of a video in [-1, 1].

        A video without 4n+1 frames, or whose sides are not multiples of 8, is a `UserError`.
        """
        _check_video(video, self.config.stride)
        return self._encode(jnp.asarray(video))

    def decode(self, latents: Float[AnyArray, "B t h w C"]) -> Float[Array, "B T H W 3"]:
        """The video, fp32 and clamped to [-1, 1], of normalised latents: 4(t-1)+1 frames."""
        if latents.ndim != 5 or latents.shape[-1] != self.config.z_dim or 0 in latents.shape:
            raise UserError(
                f"Latents of shape {latents.shape} cannot be decoded; "
                f"give them as (batch, frames, height, width, {self.config.z_dim})."
            )
        return self._decode(jnp.asarray(latents))

    def moments(self, video: Float[Array, "B T H W 3"]) -> tuple[Array, Array]:
        """Mean and log variance `B t h w C` of the latents, before they are normalised, fp32."""
        moments = self.quant(stream(self.encoder, video, self.config.stride[0]))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def reconstruct(self, z: Float[Array, "B t h w C"]) -> Float[Array, "B T H W 3"]:
        """The video, fp32 and not clamped, of latents that are not normalised."""
        return stream(self.decoder, self.post_quant(z), 1).astype(jnp.float32)

    @jax.jit
    def _encode(self, video):
        mean, std = self._statistics()
        return (self.moments(video)[0] - mean) / std

    @jax.jit
    def _decode(self, latents):
        mean, std = self._statistics()
        return jnp.clip(self.reconstruct(latents.astype(jnp.float32) * std + mean), -1, 1)

    def _statistics(self) -> tuple[Array, Array]:
        mean, std = self.config.latents_mean, self.config.latents_std
        return jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)


def _check_video(video: AnyArray, stride: tuple[int, int, int]) -> None:
    if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
        raise UserError(
            f"A video of shape {video.shape} and type {video.dtype} cannot be encoded; "
            "give it as floats in [-1, 1] of shape (batch, frames, height, width, 3)."
        )
    _, frames, height, width, _ = video.shape
    if frames < 1 or (frames - 1) % stride[0]:
        raise UserError(
            f"A video of {frames} frames cannot be encoded; the number must be {stride[0]}n+1 "
            f"(for instance {max(frames - 1, 0) // stride[0] * stride[0] + 1})."
        )
    if height < 1 or width < 1 or height % stride[1] or width % stride[2]:
        raise UserError(
            f"A video of {height}x{width} pixels (height x width) cannot be encoded; "
            f"both must be multiples of {stride[1]}."
        )
