"""Rotary embedding over three axes: time, height and width each turn a part of every head.

A head of size E gives `2*(E//6)` channels to height and to width each and the rest to time; pairs
are adjacent channels, and on an axis of `d` channels pair j turns by `position * 10000^(-2j/d)`
(Wan2.1, `wan/modules/model.py`: `rope_params`, `rope_apply`).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def axis_sizes(head_size: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width: 128 gives 44, 42, 42."""
    side = 2 * (head_size // 6)
    return head_size - 2 * side, side, side


def rotary_table(
    grid: tuple[int, int, int], head_size: int
) -> tuple[Float[Array, "N E2"], Float[Array, "N E2"]]:
    """Cosines and sines for every token of a `t h w` grid in row-major order, fp32.

    Angles are computed per axis in float64 on the host, so the constants in a compiled program are
    small and exact; they are spread over the grid on the device.
    """
    cosines, sines = [], []
    for axis, (length, size) in enumerate(zip(grid, axis_sizes(head_size))):
        angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, size, 2) / size))
        shape = [1, 1, 1, size // 2]
        shape[axis] = length
        for parts, values in ((cosines, np.cos(angles)), (sines, np.sin(angles))):
            table = jnp.asarray(values, jnp.float32).reshape(shape)
            parts.append(jnp.broadcast_to(table, (*grid, size // 2)))
    tokens = (int(np.prod(grid)), head_size // 2)
    return (
        jnp.concatenate(cosines, -1).reshape(tokens),
        jnp.concatenate(sines, -1).reshape(tokens),
    )


def rotate(
    x: Float[Array, "B N K E"], table: tuple[Float[Array, "N E2"], Float[Array, "N E2"]]
) -> Float[Array, "B N K E"]:
    """Turn each adjacent pair of channels by its token's angle, in fp32; the type of x returns."""
    cos, sin = (part[:, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
