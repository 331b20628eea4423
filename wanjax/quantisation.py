"""A frozen base in 8 or 4 bits: each kernel of the blocks as codes and scales.

A block of 64 numbers along a kernel's fan-in shares one scale, its largest number; a code says
which fraction of it each number is. `int8` has 255 fractions in equal steps, `fp8` the numbers of
float8_e4m3, `nf4` the 16 quantiles of the normal law (Dettmers et al., arXiv 2305.14314), two to a
byte. One outlier spoils its own block, where with one scale a channel it would spoil the channel.

A kernel becomes numbers again just before its product, in fp32, and those are never kept: not for
the gradient either, for which they are made anew. Codes are not trained and never added to.
"""

import fnmatch
from collections.abc import Sequence
from functools import cache, partial
from statistics import NormalDist
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from wanjax.errors import UserError, nearest
from wanjax.nn import linears

Base = Literal["bfloat16", "int8", "fp8", "nf4"]
UNQUANTISED: Base = "bfloat16"
# Roles of the blocks. Modulation, norms and biases are no kernels; patches, text, image and time
# embeddings and the head are outside the blocks, have 2 % of the weights, and stay as they are.
RULES = ("self_attn.*", "cross_attn.*", "ffn.*")
BLOCK = 64
SCALE = jnp.bfloat16  # as good as fp32: codes are of the scale as it was rounded


class Code(NamedTuple):
    """How codes are stored, and the largest fraction of a scale that one can say."""

    dtype: np.dtype
    largest: float
    in_a_byte: int = 1


CODES: dict[str, Code] = {
    "int8": Code(np.dtype(np.int8), 127),
    "fp8": Code(np.dtype(jnp.float8_e4m3fn), 448),
    "nf4": Code(np.dtype(np.uint8), 1, in_a_byte=2),
}
_BY_TYPE = {code.dtype: code for code in CODES.values()}
NF4 = CODES["nf4"].dtype

Codes = Shaped[Array, "*n G J C2"]
Scales = Float[Array, "*n G C2"]


class QuantisedVariable(nnx.Variable):
    """Codes or scales: no `nnx.Param`, so that nothing trains them."""


class QuantisedKernel(nnx.Module):
    """Stands where a `Linear` has its kernel, and gives it by `[...]`, in fp32.

    Of `G` blocks of `J` codes along the fan-in and `C2` outputs; stacked layers lead. A mesh splits
    the fan-in by whole blocks.
    """

    def __init__(self, codes: Codes, scales: Scales, axes: tuple[str | None, str | None]):
        self.codes = QuantisedVariable(codes, axes=(axes[0], None, axes[1]))
        self.scales = QuantisedVariable(scales, axes=axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel itself, `*n C C2`."""
        return kernel_shape(self.codes)

    def __getitem__(self, whole: type(...)) -> Float[Array, "*n C C2"]:
        return decode(self.codes[...], self.scales[...])


def kernel_shape(codes: nnx.Variable | jax.Array) -> tuple[int, ...]:
    """The shape of the kernel that codes stand for."""
    *lead, blocks, rows, width = codes.shape
    return (*lead, blocks * rows * _BY_TYPE[np.dtype(codes.dtype)].in_a_byte, width)


def check_base(base: str) -> None:
    """Refuse what is no kind of base."""
    if base != UNQUANTISED and base not in CODES:
        raise UserError(f"There is no base '{base}'{nearest(base, [UNQUANTISED, *CODES])}")


def quantise(model: nnx.Module, base: Base, rules: Sequence[str] = RULES) -> None:
    """Turn the kernels of the blocks into codes, in place, where `rules` name their roles (with *).

    All at once: what is large is quantised while it is loaded (`weights.load_network`). Raises
    `UserError` for a rule that matches no layer, or a fan-in that has no blocks.
    """
    check_base(base)
    if base == UNQUANTISED:
        return
    layers = dict(linears(model))
    for rule in rules:
        roles = fnmatch.filter(layers, rule)
        if not roles:
            raise UserError(
                f"The rule '{rule}' of what is quantised matches no layer of this model"
                f"{nearest(rule, layers)}"
            )
        for role in roles:
            layer = layers[role]
            block = block_size(layer.kernel.shape[-2], role)
            codes, scales = encode(_in_blocks(layer.kernel[...], block), CODES[base].dtype)
            layer.kernel = QuantisedKernel(codes, scales, layer.axes)


def block_size(fan_in: int, role: str) -> int:
    """The most numbers, up to 64, that share a scale: an even divisor of the fan-in."""
    if fan_in % 2:
        raise UserError(
            f"'{role}' has a fan-in of {fan_in:,}, which is odd, and its codes go by pairs; use "
            f"base={UNQUANTISED}."
        )
    return max(size for size in range(2, BLOCK + 1, 2) if fan_in % size == 0)


def _in_blocks(kernel: jax.Array, block: int) -> jax.Array:
    *lead, fan_in, width = kernel.shape
    return kernel.reshape(*lead, fan_in // block, block, width)


@partial(jax.jit, static_argnames="dtype")
def encode(blocks: Float[Array, "*n G B C2"], dtype: np.dtype) -> tuple[Codes, Scales]:
    """Codes of a type, and scales, of numbers in blocks."""
    largest = _BY_TYPE[np.dtype(dtype)].largest
    blocks = blocks.astype(jnp.float32)
    scales = (jnp.abs(blocks).max(-2) / largest).astype(SCALE)
    scales = jnp.where(scales < jnp.finfo(SCALE).tiny, 1, scales)  # of a block of zeros
    scales = jnp.where(jnp.isfinite(blocks).all(-2), scales, jnp.nan)  # NaN is to be seen
    fractions = blocks / scales.astype(jnp.float32)[..., None, :]
    if dtype == NF4:
        return _pack(_nearest_of_nf4(fractions)), scales
    fractions = fractions if dtype == CODES["fp8"].dtype else jnp.round(fractions)
    return fractions.clip(-largest, largest).astype(dtype), scales


def decode(codes: Codes, scales: Scales) -> Float[Array, "*n C C2"]:
    """The kernel, in fp32, by elementwise steps alone, which XLA can do where the product reads."""
    *lead, blocks, _, width = codes.shape
    if codes.dtype == NF4:
        nibbles = (codes[..., None, :] >> jnp.asarray([0, 4], NF4)[:, None]) & 15
        values = _value_of_nf4(nibbles.reshape(*lead, blocks, -1, width))
    else:
        values = codes.astype(jnp.float32)
    values = values * scales.astype(jnp.float32)[..., None, :]
    return values.reshape(*lead, -1, width)


@cache
def nf4_values() -> tuple[float, ...]:
    """The 16 numbers of nf4, from -1 to 1: quantiles of the normal law, 8 above zero, 7 below."""
    end, law = 0.9677083, NormalDist()
    above = [law.inv_cdf(0.5 + (end - 0.5) * i / 8) for i in range(1, 9)]
    below = [-law.inv_cdf(0.5 + (end - 0.5) * i / 7) for i in range(7, 0, -1)]
    return tuple(x / above[-1] for x in (*below, 0.0, *above))


def _nearest_of_nf4(x: jax.Array) -> jax.Array:
    values = nf4_values()
    between = [(a + b) / 2 for a, b in zip(values, values[1:])]
    return sum((x > edge).astype(NF4) for edge in between)


def _value_of_nf4(codes: jax.Array) -> jax.Array:
    """By the bits of a code, lowest first: TPUs are slow at reading from a table."""
    values = [jnp.float32(x) for x in nf4_values()]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2])]
    return values[0]


def _pack(codes: jax.Array) -> jax.Array:
    return codes[..., ::2, :] | codes[..., 1::2, :] << 4


def draw(codes: nnx.Variable, key: jax.Array) -> tuple[Codes, Scales]:
    """Random codes and constant scales of a stacked kernel, with variance 1/fan-in, drawn on the
    device a layer at a time: no weights are needed to time a program of the true sizes."""
    return _drawn(tuple(codes.shape), np.dtype(codes.dtype))(key)


@cache
def _drawn(shape: tuple[int, ...], dtype: np.dtype):
    count, blocks, _, width = shape
    fan_in = kernel_shape(jax.ShapeDtypeStruct(shape, dtype))[-2]
    levels = np.arange(-127, 128) if dtype != NF4 else np.asarray(nf4_values())
    scale = fan_in**-0.5 / levels.std()

    def layer(key: jax.Array) -> jax.Array:
        if dtype == NF4:
            return jax.random.bits(key, shape[1:], jnp.uint8)
        return jax.random.randint(key, shape[1:], -127, 128, jnp.int8).astype(dtype)

    def all_layers(key: jax.Array) -> tuple[Codes, Scales]:
        codes = jax.lax.map(layer, jax.random.split(key, count))
        return codes, jnp.full((count, blocks, width), scale, SCALE)

    return jax.jit(all_layers)
