"""Layers shared by the networks. Each is of a kind, whose precision stands in one table.

`dtype` is the type that was asked for, `kind` the row of `wanjax.precision`: a layer casts its
input and its kernel to the row's compute type, in whatever type the kernel is stored.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from wanjax.precision import TABLE, Kind, Precision, matmul_precision, precision_of

NORM, BIAS = TABLE["norm"], TABLE["bias"].storage
STACK = "blocks"  # where networks have their stacked blocks


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Glorot's uniform law; the last axis is the output, all before it the fan-in."""
    limit = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit).astype(dtype)


def product(
    x: Float[Array, "... C"], kernel: Shaped[Array, "C C2"], precision: Precision
) -> Float[Array, "... C2"]:
    """`x @ kernel`, computed and returned in the compute type, whatever the kernel is stored in."""
    x, kernel = x.astype(precision.compute), kernel.astype(precision.compute)
    return jnp.matmul(x, kernel, precision=matmul_precision(x.dtype))


class Linear(nnx.Module):
    """`x @ kernel + bias`, with a slot where an adapter (`wanjax.lora`) may add its side path.

    In the place of the kernel may stand what gives it by `[...]` (`wanjax.quantisation`).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        bias: bool = True,
        kind: Kind = "matrix",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.precision, self.axes = precision_of(kind, dtype), axes
        kernel = xavier_uniform(rngs.params(), (d_in, d_out), self.precision.storage)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out, BIAS), axes=axes[1:]) if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C2"]:
        x = x.astype(self.precision.compute)
        multiply = lambda x, kernel: product(x, kernel[...], self.precision)  # noqa: E731
        if not isinstance(self.kernel, nnx.Variable):
            multiply = jax.checkpoint(multiply)  # what it gives is never kept for the gradient
        y = multiply(x, self.kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.lora is not None:
            y = y + self.lora(x)
        return y


class LayerNorm(nnx.Module):
    """Layer normalisation in fp32, returned in the input's type; `affine=False` has no weights."""

    def __init__(self, width: int, *, eps: float, affine: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, NORM.storage), axes=("embed",)) if affine else None
        self.bias = nnx.Param(jnp.zeros(width, NORM.storage), axes=("embed",)) if affine else None

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(NORM.accumulate)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` in fp32, returned in the input's type (T5's norm)."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, NORM.storage), axes=("embed",))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(NORM.accumulate)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, looked up by integer."""

    def __init__(
        self, count: int, width: int, *, kind: Kind = "matrix", dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.precision = precision_of(kind, dtype)
        table = jax.random.normal(rngs.params(), (count, width), jnp.float32)
        self.table = nnx.Param(table.astype(self.precision.storage), axes=(None, "embed"))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... C"]:
        return self.table[...][ids].astype(self.precision.compute)


def conv(
    x: Float[Array, "B ... C"],
    kernel: Float[Array, "... C C2"],
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "B ... C2"]:
    """Channels-last convolution over the axes between batch and channels, in the type of x."""
    convolution = _conv_2d if kernel.ndim == 4 else _conv
    return convolution(tuple(strides), tuple(padding), x, kernel.astype(x.dtype))


def _conv(strides, padding, x, kernel, **dilation):
    spatial = "THW"[-(kernel.ndim - 2) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=matmul_precision(x.dtype),
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


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every `Linear` of the stacked blocks, with its role in a block (`cross_attn.q`)."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and path[0] == STACK:
            yield ".".join(map(str, path[1:])), module


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by the tanh approximation (Wan's feed-forward and text embedding, T5's gate)."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: jax.Array) -> jax.Array:
    """GELU by the error function (CLIP, and Wan's image embedding)."""
    return jax.nn.gelu(x, approximate=False)
