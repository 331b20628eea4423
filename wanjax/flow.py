"""The training objective: rectified flow with Wan's time shift.

    x_t = (1-t)*data + t*noise,   target = noise - data,   loss = mean |v(x_t, 1000*t) - target|^2

with `t = s*u / (1 + (s-1)*u)`, u from the timestep law; the same map from sigma to timestep as in
sampling. Source: Wan technical report (arXiv 2503.20314); Esser et al., arXiv 2403.03206.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wanjax.errors import UserError, nearest
from wanjax.models.dit import DiT
from wanjax.types import Batch

TIMESTEP_LAWS = ("uniform", "logit_normal")


def sample_times(
    key: jax.Array, count: int, *, law: str, shift: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """Times in (0, 1): uniform or logit-normal, then shifted."""
    if law == "uniform":
        u = jax.random.uniform(key, (count,), minval=1e-5)
    elif law == "logit_normal":
        u = jax.nn.sigmoid(jax.random.normal(key, (count,)))
    else:
        raise UserError(f"There is no timestep law '{law}'{nearest(law, TIMESTEP_LAWS)}")
    return shift * u / (1 + (shift - 1) * u)


def losses_at(
    model: DiT, batch: Batch, times: Float[Array, " B"], noise: Float[Array, "B t h w C"]
) -> Float[Array, " B"]:
    """Each example's loss at a given time with a given noise."""
    data = batch.latents.astype(jnp.float32)
    t = times[:, None, None, None, None]
    noisy = (1 - t) * data + t * noise
    c = batch.condition
    velocity = model(noisy, 1000 * times, c.text, c.image, c.latents)
    return jnp.mean((velocity - (noise - data)) ** 2, axis=(1, 2, 3, 4))


def draw(
    key: jax.Array, shape: Sequence[int], *, law: str, shift: float | Float[Array, ""]
) -> tuple[Float[Array, " B"], Float[Array, "B t h w C"]]:
    """Times and noise for a batch of latents of this shape; all randomness of a step is here."""
    key_time, key_noise = jax.random.split(key)
    times = sample_times(key_time, shape[0], law=law, shift=shift)
    return times, jax.random.normal(key_noise, shape)
