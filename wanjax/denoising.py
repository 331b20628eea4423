"""The denoise step: classifier-free guidance around the denoiser, and one step of the solver.

What does not change from step to step is computed once for a video, before the first.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wanjax.models.dit import Context, DiT
from wanjax.sharding import constrain, constrain_state
from wanjax.solvers import Coefficients, State, step
from wanjax.types import Condition


class Rows(NamedTuple):
    """What the denoiser is told in every step, for both branches of guidance as one batch."""

    context: Context
    condition: Float[Array, "B t h w C3"] | None


@jax.jit
def prepare_rows(dit: DiT, conditions: tuple[Condition, ...]) -> Rows:
    """What does not change from step to step, computed once; the prompt's branch comes first."""
    c = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
    context = jax.tree.map(
        lambda x: constrain(x, None, "batch", None, None, None), dit.context(c.text, c.image)
    )
    return Rows(context, c.latents)


@partial(jax.jit, static_argnames="guided", donate_argnames="state")
def denoise_step(
    dit: DiT,
    state: State,
    timestep: Float[Array, ""],
    coefficients: Coefficients,
    rows: Rows,
    guidance: Float[Array, ""],
    *,
    guided: bool,
) -> State:
    """One solver step under classifier-free guidance, `v = v_n + g * (v_p - v_n)`; both branches
    run as one batch. Not `guided` means g = 1: only the prompt's branch runs."""
    copies = 1 + guided
    x = jnp.concatenate([state.x] * copies)
    velocity = dit.denoise(x, jnp.full(copies, timestep), rows.context, rows.condition)
    if guided:
        towards, away = velocity[:1], velocity[1:]
        velocity = away + guidance * (towards - away)
    return constrain_state(step(state, velocity, coefficients))
