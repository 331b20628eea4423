"""The denoise step: classifier-free guidance around the denoiser, and one step of the solver.

What does not change from step to step is computed once for a video, before the first.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wanjax.models.dit import Context, DiT
from wanjax.sharding import constrain, constrain_state
from wanjax.solvers import Coefficients, State, step
from wanjax.types import Condition

Branches = Literal["together", "in-turn"]


class Rows(NamedTuple):
    """What the denoiser is told in every step, a row for each branch of guidance."""

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


@partial(jax.jit, static_argnames=("guided", "branches"), donate_argnames="state")
def denoise_step(
    dit: DiT,
    state: State,
    timestep: Float[Array, ""],
    coefficients: Coefficients,
    rows: Rows,
    guidance: Float[Array, ""],
    *,
    guided: bool,
    branches: Branches = "together",
) -> State:
    """One solver step under classifier-free guidance, `v = v_n + g * (v_p - v_n)`. Not `guided`
    means g = 1: only the prompt's branch runs."""
    run = _in_turn if branches == "in-turn" else _together
    velocity = run(dit, state.x, timestep, rows, 1 + guided)
    if guided:
        towards, away = velocity[:1], velocity[1:]
        velocity = away + guidance * (towards - away)
    return constrain_state(step(state, velocity, coefficients))


def _together(dit: DiT, x: Array, timestep: Array, rows: Rows, count: int) -> Array:
    """The velocity of every branch, as one batch."""
    x = jnp.concatenate([x] * count)
    return dit.denoise(x, jnp.full(count, timestep), rows.context, rows.condition)


def _in_turn(dit: DiT, x: Array, timestep: Array, rows: Rows, count: int) -> Array:
    """The velocity of every branch, one after the other: half the memory of activations, and on a
    mesh each weight crosses the wire once for each branch."""

    def one(i: Array) -> Array:
        row = lambda axis: lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1, axis)  # noqa: E731
        context = jax.tree.map(row(1), rows.context)  # behind the axis of the blocks
        return dit.denoise(x, timestep[None], context, jax.tree.map(row(0), rows.condition))

    return jax.lax.map(one, jnp.arange(count))[:, 0]
