"""Layers shared by the networks. A matrix product runs in the type of its kernel.

That one rule is the precision policy: a network builds its matrices in the type it is asked for and
its norms, modulation and time embedding in fp32, and every layer follows what it holds.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from wanjax.attention import matmul_precision


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Glorot's uniform law; the last axis is the output, all before it the fan-in."""
    limit = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit).astype(dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`, with a slot where an adapter (`wanjax.lora`) may add its side path."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(xavier_uniform(rngs.params(), (d_in, d_out), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype), axes=axes[1:]) if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C2"]:
        kernel = self.kernel[...]
        x = x.astype(kernel.dtype)
        y = jnp.matmul(x, kernel, precision=matmul_precision(kernel.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.lora is not None:
            y = y + self.lora(x)
        return y


class LayerNorm(nnx.Module):
    """Layer normalisation in fp32, returned in the input's type; `affine=False` has no weights."""

    def __init__(self, width: int, *, eps: float, affine: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=("embed",)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=("embed",)) if affine else None

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` in fp32, returned in the input's type (T5's norm)."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, looked up by integer."""

    def __init__(self, count: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (count, width), jnp.float32).astype(dtype)
        self.table = nnx.Param(table, axes=(None, "embed"))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... C"]:
        return self.table[...][ids]


def conv(
    x: Float[Array, "B ... C"],
    kernel: Float[Array, "... C C2"],
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "B ... C2"]:
    """Channels-last convolution over the axes between batch and channels, in the kernel's type."""
    convolution = _conv_2d if kernel.ndim == 4 else _conv
    return convolution(tuple(strides), tuple(padding), x.astype(kernel.dtype), kernel)


def _conv(strides, padding, x, kernel, **dilation):
    spatial = "THW"[-(kernel.ndim - 2) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=matmul_precision(kernel.dtype),
        **dilation,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_2d(strides, padding, x, kernel):
    return _conv(strides, padding, x, kernel)


def _conv_2d_forward(strides, padding, x, kernel):
    return _conv(strides, padding, x, kernel), (x, kernel)


def _conv_2d_backward(strides, padding, inputs, dy):
    return jax.lax.platform_dependent(
        *inputs,
        dy,
        cpu=partial(_channels_last_backward, strides, padding),
        default=lambda x, kernel, dy: jax.vjp(partial(_conv, strides, padding), x, kernel)[1](dy),
    )


def _channels_last_backward(strides, padding, x, kernel, dy):
    """The gradients as convolutions with channels last like any other. XLA's own have other orders
    of axes, for which it has only naive loops on CPU inside of a scan (six times the time)."""
    space = list(zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strides, padding))
    to_x = [(k - 1 - low, n + low - 1 - (m - 1) * s) for n, m, k, s, (low, _) in space]
    to_kernel = [(low, k + (m - 1) * s - n - low) for n, m, k, s, (low, _) in space]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = _conv((1, 1), to_x, dy, turned, lhs_dilation=strides)
    by_channel = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dk = _conv((1, 1), to_kernel, *by_channel, rhs_dilation=strides)
    return dx, dk.transpose(1, 2, 0, 3)


_conv_2d.defvjp(_conv_2d_forward, _conv_2d_backward)


def stack(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers of one kind as a single module whose every parameter has a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(build, in_axes=0, out_axes=0))(rngs)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by the tanh approximation (Wan's feed-forward and text embedding, T5's gate)."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: jax.Array) -> jax.Array:
    """GELU by the error function (CLIP, and Wan's image embedding)."""
    return jax.nn.gelu(x, approximate=False)
