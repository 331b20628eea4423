"""Layers that the networks share, where no reference has them as such."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from wanjax.nn import _conv, conv

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]


@pytest.mark.parametrize("inside", ["plain", "scan"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((9, 12), 3, 1, ((1, 1), (1, 1))),
        ((8, 12), 3, 2, ((0, 1), (0, 1))),
        ((9, 7), 3, 2, ((1, 0), (1, 1))),
        ((11, 11), 5, 4, ((2, 2), (2, 2))),
        ((8, 10), 1, 1, ((0, 0), (0, 0))),
    ],
)
def test_gradients_of_convolutions_are_xlas(size, kernel, stride, padding, inside):
    """Ours are written out, so that they are fast in a scan on CPU."""
    x = jax.random.normal(jax.random.key(0), (2, *size, 4))
    weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 4, 6))

    def loss(convolve, x, weights):
        once = lambda x: jnp.sin(convolve(x, weights)).sum()  # noqa: E731
        if inside == "plain":
            return once(x)
        return jax.lax.scan(lambda total, x: (total + once(x), None), 0.0, x[:, None])[0]

    ours = partial(conv, strides=(stride, stride), padding=padding)
    xlas = partial(_conv, (stride, stride), padding)
    found, expected = (jax.grad(partial(loss, f), (0, 1))(x, weights) for f in (ours, xlas))
    for a, b in zip(found, expected):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()
