"""The umT5 encoder, which turns a prompt's tokens into the features that the denoiser attends to.

A T5 v1.1 encoder with one difference: every layer has a table of relative position biases of its
own. Attention is `softmax(q k^T + bias) v`, without the usual `1/sqrt(E)`, and the feed-forward is
`down(gelu(gate(x)) * up(x))`. Source: Wan-Video/Wan2.1, `wan/modules/t5.py`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from wanjax.attention import biased
from wanjax.nn import Embedding, Linear, RMSNorm, gelu_tanh, stack


@dataclass(frozen=True)
class UMT5Config:
    """Architecture; the defaults are umT5-xxl. A head has `attention_dim / num_heads` channels."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    num_heads: int = 64
    ffn_dim: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


class SelfAttention(nnx.Module):
    """Attention over the prompt; `bias` holds the relative positions and the mask."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, a = config.dim, config.attention_dim
        self.heads = config.num_heads
        self.q, self.k, self.v = (
            Linear(d, a, bias=False, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.o = Linear(a, d, axes=("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], bias: Float[Array, "B K L L"]) -> jax.Array:
        q, k, v = (
            rearrange(f(x), "B L (K E) -> B L K E", K=self.heads) for f in (self.q, self.k, self.v)
        )
        return self.o(rearrange(biased(q, k, v, bias), "B L K E -> B L (K E)"))


class GatedMlp(nnx.Module):
    """`down(gelu(gate(x)) * up(x))`, the tanh approximation of GELU."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.dim, config.ffn_dim
        self.gate, self.up = (Linear(d, f, bias=False, dtype=dtype, rngs=rngs) for _ in range(2))
        self.down = Linear(f, d, axes=("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(gelu_tanh(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One encoder layer. The position biases are fp32, as are the scores that they are added to."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_attn = RMSNorm(config.dim, eps=config.eps)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.position_bias = Embedding(
            config.num_buckets, config.num_heads, kind="position bias", dtype=dtype, rngs=rngs
        )
        self.norm_ffn = RMSNorm(config.dim, eps=config.eps)
        self.ffn = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        buckets: Int[Array, "L L"],
        visible: Float[Array, "B 1 1 L"],
    ) -> Float[Array, "B L D"]:
        bias = rearrange(self.position_bias(buckets), "q k K -> 1 K q k") + visible
        x = x + self.attn(self.norm_attn(x), bias)
        return x + self.ffn(self.norm_ffn(x))


class UMT5(nnx.Module):
    """The encoder. Matrices, and with them the residual stream, are in `dtype`; norms are fp32."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.dim, dtype=dtype, rngs=rngs)
        self.blocks = stack(
            config.num_layers, lambda rngs: Block(config, dtype=dtype, rngs=rngs), rngs
        )
        self.norm = RMSNorm(config.dim, eps=config.eps)

    def __call__(self, tokens: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The last hidden state at all `L` positions, where no token sees one whose mask is 0.

        What stands on the masked positions themselves means nothing; `wanjax.text.zero_padding`
        clears it, as the denoiser expects.
        """
        buckets = jnp.asarray(relative_buckets(self.config, tokens.shape[1]))
        lowest = jnp.finfo(jnp.float32).min
        visible = jnp.where(mask[:, None, None, :] != 0, 0.0, lowest)

        def step(x, block):
            return block(x, buckets, visible), None

        x, _ = jax.lax.scan(step, self.token_embedding(tokens), self.blocks)
        return self.norm(x)


def relative_buckets(config: UMT5Config, length: int) -> Int[np.ndarray, "L L"]:
    """The row of the bias table for every query and key, from the key's distance to the query.

    Half of the buckets are for keys on the right. Of each half, the first half holds one distance
    each, and the rest grows logarithmically up to `max_distance`, beyond which all is one bucket.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = config.num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # In fp32 like the reference, so that a distance on a border falls to the same side of it.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(config.max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)
