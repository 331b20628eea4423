"""The vision tower of CLIP ViT-H/14, which turns a picture into the denoiser's image tokens.

Wan reads the tokens one block before the last, without the final norm. The last block, that norm
and the projection are kept all the same, unused, so that a checkpoint converted back is whole.
Source: Wan-Video/Wan2.1, `wan/modules/clip.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from wanjax.attention import attention
from wanjax.errors import UserError
from wanjax.nn import LayerNorm, Linear, gelu_exact, product, stack, xavier_uniform
from wanjax.precision import precision_of

KIND = "image tower"


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Architecture; the defaults are ViT-H/14. `projection_dim` is the width of the unused head."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    num_heads: int = 16
    num_layers: int = 32
    ffn_dim: int = 5120
    projection_dim: int | None = None
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """The class token and one for every patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


class SelfAttention(nnx.Module):
    """Every token attends to every token."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d = config.dim
        self.heads = config.num_heads
        self.q, self.k, self.v = (Linear(d, d, kind=KIND, dtype=dtype, rngs=rngs) for _ in range(3))
        self.o = Linear(d, d, axes=("mlp", "embed"), kind=KIND, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        q, k, v = (
            rearrange(f(x), "B S (K E) -> B S K E", K=self.heads) for f in (self.q, self.k, self.v)
        )
        return self.o(rearrange(attention(q, k, v), "B S K E -> B S (K E)"))


class Mlp(nnx.Module):
    """`down(gelu(up(x)))`, GELU exact."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.dim, config.ffn_dim
        self.up = Linear(d, f, kind=KIND, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, axes=("mlp", "embed"), kind=KIND, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(gelu_exact(self.up(x)))


class Block(nnx.Module):
    """One transformer layer with its norms in front."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_attn = LayerNorm(config.dim, eps=config.eps)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.norm_ffn = LayerNorm(config.dim, eps=config.eps)
        self.ffn = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + self.attn(self.norm_attn(x))
        return x + self.ffn(self.norm_ffn(x))


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size, written as one matrix product; no bias."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.size = config.patch_size
        self.precision = precision_of(KIND, dtype)
        shape = (self.size, self.size, 3, config.dim)
        kernel = xavier_uniform(rngs.params(), shape, self.precision.storage)
        self.kernel = nnx.Param(kernel, axes=(None, None, None, "embed"))

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        kernel = self.kernel[...]
        x = rearrange(x, "B (h a) (w b) C -> B (h w) (a b C)", a=self.size, b=self.size)
        return product(x, kernel.reshape(-1, kernel.shape[-1]), self.precision)


class CLIPVision(nnx.Module):
    """The tower. It computes in fp32 whatever `dtype` is asked for, and is stored accordingly."""

    def __init__(
        self, config: CLIPVisionConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs
    ):
        self.config = config
        d, key = config.dim, rngs.params
        self.precision = precision_of(KIND, dtype)
        storage = self.precision.storage

        def table(*shape: int) -> nnx.Param:
            values = jax.random.normal(key(), shape, jnp.float32) * d**-0.5
            return nnx.Param(values.astype(storage), axes=("embed",))

        self.patch_embedding = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.cls_embedding, self.pos_embedding = table(d), table(config.num_tokens, d)
        self.norm_pre = LayerNorm(d, eps=config.eps)
        self.blocks = stack(
            config.num_layers, lambda rngs: Block(config, dtype=dtype, rngs=rngs), rngs
        )
        self.norm_post = LayerNorm(d, eps=config.eps)
        if config.projection_dim is not None:
            self.head = nnx.Param(
                xavier_uniform(key(), (d, config.projection_dim), storage), axes=("embed", "mlp")
            )

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """All tokens, the class token first, after all blocks but the last.

        `pixels` are square, of the config's size, and normalised with CLIP's mean and deviation.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            height, width = pixels.shape[1:3]
            raise UserError(
                f"The image encoder takes pictures of {size}x{size} pixels and got "
                f"{width}x{height}; resize them first."
            )
        x = self.patch_embedding(pixels)
        first, positions = (
            table[...].astype(self.precision.compute)
            for table in (self.cls_embedding, self.pos_embedding)
        )
        first = repeat(first, "D -> B 1 D", B=x.shape[0])
        x = self.norm_pre(jnp.concatenate([first, x], axis=1) + positions)

        # By index, because a scan over all but the last block would copy those blocks first.
        def step(x, i):
            block = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, 0, False), blocks
            )
            return block(x), None

        blocks = self.blocks
        x, _ = jax.lax.scan(step, x, jnp.arange(self.config.num_layers - 1))
        return x
