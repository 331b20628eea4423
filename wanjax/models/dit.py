"""Wan2.1's diffusion transformer: noisy latents, a timestep and conditions in, a velocity out.

Every block is `x += gate * self_attention(modulate(norm(x)))`, `x += cross_attention(norm(x))`,
`x += gate * ffn(modulate(norm(x)))`; shift, scale and gate come from the timestep and from a table
of the block's own. Image and text tokens are two arrays with keys and values of their own, and the
same normalised query looks at both. Source: Wan-Video/Wan2.1, `wan/modules/model.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from wanjax.attention import attention
from wanjax.errors import UserError
from wanjax.nn import (
    BIAS,
    NORM,
    LayerNorm,
    Linear,
    RMSNorm,
    gelu_exact,
    gelu_tanh,
    product,
    stack,
    xavier_uniform,
)
from wanjax.precision import ASKED, precision_of
from wanjax.remat import ATTENTION, Remat, checkpointed
from wanjax.rope import rotary_table, rotate
from wanjax.sharding import constrain, fill, whole

Rotary = tuple[Float[Array, "N E2"], Float[Array, "N E2"]]
KeysValues = tuple[Float[Array, "*n B M K E"], Float[Array, "*n B M K E"]]


class Context(NamedTuple):
    """Keys and values of text and image for one block's cross-attention, or for all `n` blocks."""

    text: KeysValues
    image: KeysValues | None


@dataclass(frozen=True)
class DiTConfig:
    """Architecture; the defaults are Wan2.1 I2V-14B. No `image_dim` makes it text-to-video.

    `image_positions` is the length of the learned positions added to the image tokens, which only
    the first-and-last-frame model has (514).
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_layers: int = 40
    num_heads: int = 40
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    image_dim: int | None = 1280
    image_positions: int | None = None
    eps: float = 1e-6

    @property
    def head_size(self) -> int:
        return self.dim // self.num_heads

    @property
    def kind(self) -> str:
        """What the official code calls this kind of model: t2v, i2v or flf2v."""
        if self.image_dim is None:
            return "t2v"
        return "i2v" if self.image_positions is None else "flf2v"


class Mlp(nnx.Module):
    """`down(gelu(up(x)))`, the tanh approximation of GELU."""

    def __init__(self, d_in: int, width: int, d_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = Linear(d_in, width, dtype=dtype, rngs=rngs)
        self.down = Linear(width, d_out, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C2"]:
        return self.down(gelu_tanh(self.up(x)))


class SelfAttention(nnx.Module):
    """Every video token attends to every other, with rotary positions."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.dim
        self.head_size = config.head_size
        self.q, self.k, self.v = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(d, d, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(d, eps=config.eps), RMSNorm(d, eps=config.eps)

    def __call__(
        self, x: Float[Array, "B N D"], rotary: Rotary, count: int
    ) -> Float[Array, "B N D"]:
        q = rotate(split_heads(self.norm_q(self.q(x)), self.head_size), rotary)
        k = rotate(split_heads(self.norm_k(self.k(x)), self.head_size), rotary)
        v = split_heads(self.v(x), self.head_size)
        out = attention(q, k, v, queries="tokens", keys="tokens", count=count, name=ATTENTION)
        return self.o(join_heads(out))


class CrossAttention(nnx.Module):
    """Video tokens attend to the text and, with keys and values of their own, to the image."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.dim
        self.head_size = config.head_size
        self.q, self.k, self.v = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(d, d, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(d, eps=config.eps), RMSNorm(d, eps=config.eps)
        if config.image_dim is not None:
            self.k_img, self.v_img = (Linear(d, d, dtype=dtype, rngs=rngs) for _ in range(2))
            self.norm_k_img = RMSNorm(d, eps=config.eps)

    def context(self, text: Float[Array, "B L D"], image: Float[Array, "B S D"] | None) -> Context:
        """Keys and values, which hang on neither the latents nor the timestep."""
        split = partial(split_heads, head_size=self.head_size)
        of_text = split(self.norm_k(self.k(text))), split(self.v(text))
        if image is None:
            return Context(of_text, None)
        of_image = split(self.norm_k_img(self.k_img(image))), split(self.v_img(image))
        return Context(of_text, of_image)

    def __call__(self, x: Float[Array, "B N D"], context: Context) -> Float[Array, "B N D"]:
        q = split_heads(self.norm_q(self.q(x)), self.head_size)
        out = attention(q, *context.text, queries="tokens")
        if context.image is not None:
            out = out + attention(q, *context.image, queries="tokens")
        return self.o(join_heads(out))


class Block(nnx.Module):
    """One transformer block; `modulation` is added to the timestep's six vectors. Of the tokens
    the first `count` are real."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, eps = config.dim, config.eps
        self.modulation = modulation(6, d, rngs)
        self.norm_self = LayerNorm(d, eps=eps, affine=False)
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.norm_cross = LayerNorm(d, eps=eps)
        self.cross_attn = CrossAttention(config, dtype=dtype, rngs=rngs)
        self.norm_ffn = LayerNorm(d, eps=eps, affine=False)
        self.ffn = Mlp(d, config.ffn_dim, d, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        time: Float[Array, "B 6 D"],
        context: Context,
        rotary: Rotary,
        count: int,
    ) -> Float[Array, "B N D"]:
        vectors = jnp.split(self.modulation[...] + time, 6, axis=1)
        shift_self, scale_self, gate_self, shift_ffn, scale_ffn, gate_ffn = vectors
        y = self.self_attn(modulate(self.norm_self, x, shift_self, scale_self), rotary, count)
        x = add_gated(x, y, gate_self)
        x = x + self.cross_attn(self.norm_cross(x), context)
        y = self.ffn(modulate(self.norm_ffn, x, shift_ffn, scale_ffn))
        return constrain(add_gated(x, y, gate_ffn), "batch", "tokens", None)


class ImageEmbed(nnx.Module):
    """CLIP tokens to the model's width: `norm_out(down(gelu(up(norm_in(x + positions)))))`."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config.image_dim
        if config.image_positions is not None:
            self.positions = nnx.Param(jnp.zeros((config.image_positions, c), NORM.storage))
        self.has_positions = config.image_positions is not None
        self.norm_in = LayerNorm(c, eps=1e-5)
        self.up = Linear(c, c, dtype=dtype, rngs=rngs)
        self.down = Linear(c, config.dim, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(config.dim, eps=1e-5)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S D"]:
        if self.has_positions:
            x = x + self.positions[...]
        return self.norm_out(self.down(gelu_exact(self.up(self.norm_in(x)))))


class Head(nnx.Module):
    """Tokens back to patches of velocity; modulated by the embedding before its projection."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.dim
        self.modulation = modulation(2, d, rngs)
        self.norm = LayerNorm(d, eps=config.eps, affine=False)
        patch = int(np.prod(config.patch_size))
        self.proj = Linear(d, patch * config.out_channels, kind="head", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], time: Float[Array, "B D"]) -> jax.Array:
        shift, scale = jnp.split(self.modulation[...] + time[:, None], 2, axis=1)
        return self.proj(modulate(self.norm, x.astype(NORM.compute), shift, scale))


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size, written as one matrix product."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.size = config.patch_size
        shape = (*config.patch_size, config.in_channels, config.dim)
        self.precision = precision_of("patch", dtype)
        kernel = xavier_uniform(rngs.params(), shape, self.precision.storage)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, None, "embed"))
        self.bias = nnx.Param(jnp.zeros(config.dim, BIAS), axes=("embed",))

    def __call__(self, x: Float[Array, "B t h w C"]) -> Float[Array, "B N D"]:
        a, b, c = self.size
        kernel = self.kernel[...]
        x = rearrange(x, "B (t a) (h b) (w c) C -> B (t h w) (a b c C)", a=a, b=b, c=c)
        y = product(x, kernel.reshape(-1, kernel.shape[-1]), self.precision)
        return y + self.bias[...].astype(y.dtype)


class DiT(nnx.Module):
    """The denoiser. `dtype` is the type asked for, which decides what `wanjax.precision` says.

    `residual` is the type of the stream that the blocks add to, and is never coarser than what they
    add: bfloat16 takes half the memory, float32 a third of the error (docs/precision.md).
    """

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.remat: Remat = "full"
        self.residual = "float32"
        self.compute = precision_of("matrix", dtype).compute
        d = config.dim
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.text_embed = Mlp(config.text_dim, d, d, dtype=dtype, rngs=rngs)
        self.time_embed = TimeEmbed(config, dtype=dtype, rngs=rngs)
        self.time_projection = Linear(d, 6 * d, kind="time path", dtype=dtype, rngs=rngs)
        if config.image_dim is not None:
            self.image_embed = ImageEmbed(config, dtype=dtype, rngs=rngs)
        self.blocks = stack(
            config.num_layers, lambda rngs: Block(config, dtype=dtype, rngs=rngs), rngs
        )
        self.head = Head(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B t h w 16"],
        timestep: Float[Array, " B"],
        text: Float[Array, "B L C"],
        image: Float[Array, "B S C2"] | None = None,
        condition: Float[Array, "B t h w C3"] | None = None,
    ) -> Float[Array, "B t h w 16"]:
        """The velocity `noise - data`, fp32. `timestep` is on the scale 0...1000 and stays fp32."""
        return self.denoise(latents, timestep, self.context(text, image), condition)

    def context(
        self, text: Float[Array, "B L C"], image: Float[Array, "B S C2"] | None = None
    ) -> Context:
        """What the cross-attention of all blocks looks at: once for all the steps of a video."""
        self._check_context(text, image)
        text = constrain(self.text_embed(text), "batch", None, None)
        if image is not None:
            image = constrain(self.image_embed(image), "batch", None, None)

        def project(_: None, cross: CrossAttention) -> tuple[None, Context]:
            return None, whole(cross).context(text, image)

        if self.remat != "none":  # products are kept, so that their weights are not gathered again
            project = jax.checkpoint(project, policy=jax.checkpoint_policies.dots_saveable)
        return jax.lax.scan(project, None, self.blocks.cross_attn)[1]

    def denoise(
        self,
        latents: Float[Array, "B t h w 16"],
        timestep: Float[Array, " B"],
        context: Context,
        condition: Float[Array, "B t h w C3"] | None = None,
    ) -> Float[Array, "B t h w 16"]:
        """As a call of the model, with the context that `context` made."""
        self._check(latents, timestep, condition)
        x = latents if condition is None else jnp.concatenate([latents, condition], axis=-1)
        grid = tuple(s // p for s, p in zip(x.shape[1:4], self.config.patch_size))
        stream = jnp.promote_types(ASKED[self.residual], self.compute)
        x = self.patch_embed(x).astype(stream)
        count = x.shape[1]
        x = constrain(fill(x, "tokens", axis=1), "batch", "tokens", None)

        time = self.time_embed(timestep)
        time_blocks = rearrange(self.time_projection(jax.nn.silu(time)), "B (n D) -> B n D", n=6)
        table = rotary_table(grid, self.config.head_size)
        rotary = tuple(fill(part, "tokens", axis=0) for part in table)

        def step(x: jax.Array, given: tuple[Block, Context]) -> tuple[jax.Array, None]:
            block, context = given
            return whole(block)(x, time_blocks, context, rotary, count), None

        x, _ = jax.lax.scan(checkpointed(step, self.remat), x, (self.blocks, context))
        x = constrain(self.head(x, time), "batch", "tokens", None)[:, :count]
        (t, h, w), (a, b, c) = grid, self.config.patch_size
        return rearrange(
            x, "B (t h w) (a b c C) -> B (t a) (h b) (w c) C", t=t, h=h, w=w, a=a, b=b, c=c
        )

    def _check(self, latents, timestep, condition):
        if any(n % p for n, p in zip(latents.shape[1:4], self.config.patch_size)):
            raise UserError(
                f"Latents of {latents.shape[1:4]} (t, h, w) do not divide into patches of "
                f"{self.config.patch_size}; use sizes in pixels that are divisible by 16."
            )
        if timestep.shape != latents.shape[:1]:
            raise UserError(
                f"timestep has the shape {timestep.shape} and the batch {latents.shape[:1]}; "
                "give one number for every example."
            )
        channels = latents.shape[-1] + (0 if condition is None else condition.shape[-1])
        if channels != self.config.in_channels:
            raise UserError(
                f"The model takes {self.config.in_channels} latent channels and got {channels}; "
                "image-to-video models need `condition` (mask and first frame), others none."
            )

    def _check_context(self, text, image):
        if text.shape[-1] != self.config.text_dim:
            raise UserError(
                f"The text features are {text.shape[-1]} wide and the model takes "
                f"{self.config.text_dim}; encode the prompt with this model's text encoder."
            )
        if (image is None) != (self.config.image_dim is None):
            raise UserError(
                "An image-to-video model needs the CLIP tokens of its picture as `image`, "
                "and a text-to-video model takes none."
            )


class TimeEmbed(nnx.Module):
    """Sinusoids of the timestep through a small network; fp32, or 937 would become 936."""

    def __init__(self, config: DiTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.freq_dim = config.freq_dim
        d, kind = config.dim, "time path"
        self.up = Linear(config.freq_dim, d, kind=kind, dtype=dtype, rngs=rngs)
        self.down = Linear(d, d, kind=kind, dtype=dtype, rngs=rngs)

    def __call__(self, timestep: Float[Array, " B"]) -> Float[Array, "B D"]:
        half = self.freq_dim // 2
        frequencies = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
        angles = timestep.astype(jnp.float32)[:, None] * frequencies
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.down(jax.nn.silu(self.up(waves)))


def split_heads(x: Float[Array, "B N D"], head_size: int) -> Float[Array, "B N K E"]:
    return rearrange(x, "B N (K E) -> B N K E", E=head_size)


def join_heads(x: Float[Array, "B N K E"]) -> Float[Array, "B N D"]:
    return rearrange(x, "B N K E -> B N (K E)")


def modulation(count: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A table of vectors that are added to the timestep's: shifts, scales and gates."""
    table = jax.random.normal(rngs.params(), (count, width), NORM.storage) / np.sqrt(width)
    return nnx.Param(table, axes=(None, "embed"))


def modulate(norm: LayerNorm, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`norm(x) * (1 + scale) + shift` in fp32, returned in the type of x."""
    return (norm(x.astype(NORM.compute)) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + gate * y` in fp32, returned in the type of x."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)
