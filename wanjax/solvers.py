"""Solvers of the flow ODE: UniPC of order 2, DPM++ 2M, Euler; and LCM for few-step adapters.

Convention: `x = (1-sigma)*data + sigma*noise` and the network gives `v = noise - data`, so the
denoised estimate is `m = x - sigma*v`. Each of the three is linear in the state, so a solver is a
table of coefficients, computed once on the host in float64, and all share one pure `step`:

    m      = x - sigma*v
    x      = c_x*x + c_last*x_last + c_m*m + c_m1*m1 + c_m2*m2      (corrector; UniPC only)
    x_next = p_x*x + p_m*m + p_m1*m1                                (predictor)

LCM is for models that were distilled to say `m` in one step from any sigma: it goes to `m` and back
up to the next sigma by fresh noise (`renoise`), which the other three never add.

Sources: Wan-Video/Wan2.1 `wan/utils/fm_solvers_unipc.py` and `fm_solvers.py`; UniPC, arXiv
2302.04867; DPM-Solver++, arXiv 2211.01095; latent consistency models,
arXiv 2310.04378.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wanjax.errors import UserError, nearest
from wanjax.sharding import constrain_state


class Coefficients(NamedTuple):
    """One step's numbers, or (in a `Schedule`) arrays of them over the steps."""

    sigma: float
    c_x: float
    c_last: float
    c_m: float
    c_m1: float
    c_m2: float
    p_x: float
    p_m: float
    p_m1: float


@dataclass(frozen=True)
class Schedule:
    """`timesteps` (0...1000) to show the network, and the coefficients of every step, in fp32;
    `fresh` is how much new noise is added after each."""

    timesteps: Float[np.ndarray, " N"]
    sigmas: Float[np.ndarray, " N1"]
    coefficients: Coefficients
    fresh: Float[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.timesteps)

    def row(self, index: int) -> Coefficients:
        return Coefficients(*(column[index] for column in self.coefficients))


MOST_STEPS = 200_000  # far beyond use; the weights of every step are made beforehand


class State(NamedTuple):
    """What a multistep solver remembers: the sample, the previous one, two denoised estimates."""

    x: Float[Array, "..."]
    x_last: Float[Array, "..."]
    m1: Float[Array, "..."]
    m2: Float[Array, "..."]


def initial_noise(
    shape: tuple[int, ...], given: Float[np.ndarray, "..."] | None, seed: int
) -> Float[Array, "1 t h w C"]:
    """The noise of `seed` (0 to 2^64-1), or the given one, which must be of this shape."""
    if given is None:
        return jax.random.normal(seed_key(seed), (1, *shape), jnp.float32)
    noise = jnp.array(given, jnp.float32)  # a copy: the denoise step consumes its state
    if noise.shape not in (shape, (1, *shape)):
        raise UserError(f"noise has the shape {noise.shape} and this video needs {shape}.")
    return noise.reshape(1, *shape)


def check_seed(seed: int) -> None:
    """Refuse what is no seed."""
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed={seed} is not from 0 to {(1 << 64) - 1}; choose another.")


def seed_key(seed: int) -> Array:
    """JAX's seeds have 32 bits: the upper ones of a longer seed are folded in."""
    check_seed(seed)
    low, high = seed % (1 << 32), seed >> 32
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def initial_state(noise: Float[Array, "..."]) -> State:
    """The state before the first step; the history is zero and has zero weight there."""
    return State(noise, *(jnp.zeros_like(noise) for _ in range(3)))


def step(state: State, velocity: Float[Array, "..."], c: Coefficients) -> State:
    """One step of any solver, in fp32."""
    x, x_last, m1, m2 = state
    m = x - c.sigma * velocity
    x = c.c_x * x + c.c_last * x_last + c.c_m * m + c.c_m1 * m1 + c.c_m2 * m2
    return State(c.p_x * x + c.p_m * m + c.p_m1 * m1, x, m, m1)


@partial(jax.jit, donate_argnames="state")
def renoise(state: State, amount: Float[Array, ""], seed: Array, index: Int[Array, ""]) -> State:
    """The state after step `index` with so much fresh noise added; `seed` is a key."""
    noise = jax.random.normal(jax.random.fold_in(seed, index + 1), state.x.shape)
    return constrain_state(state._replace(x=state.x + amount * noise))


def shift_sigmas(sigma: np.ndarray, shift: float) -> np.ndarray:
    """Wan's time shift: `s*sigma / (1 + (s-1)*sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_schedule(
    solver: str, steps: int, shift: float, sigmas: np.ndarray | None = None
) -> Schedule:
    """The official schedule of `solver` ("unipc", "dpm++", "euler", "lcm"), or one on `sigmas`.

    Official timesteps are `trunc(1000*sigma)`, as in Wan's schedulers; those of lcm and of explicit
    `sigmas` (N+1 values that fall to 0) are `1000*sigma` untruncated.
    """
    if solver not in SOLVERS:
        raise UserError(f"There is no solver '{solver}'{nearest(solver, SOLVERS)}")
    if sigmas is not None:
        sigmas = _checked(sigmas)
        timesteps = 1000 * sigmas[:-1]
    else:
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps={steps} is not a number of steps; use 1 to {MOST_STEPS:,}.")
        if not 0 < shift < math.inf:
            raise UserError(f"shift={shift:g} is not a positive number; use 5, for example.")
        start = 0.999 if solver == "unipc" else 1.0
        sigmas = shift_sigmas(np.linspace(start, 0, steps + 1)[:-1], shift)
        timesteps = 1000 * sigmas if solver == "lcm" else np.trunc(sigmas * 1000)
        # The official schedulers keep sigma in fp32; near 1 that rounding is what they integrate.
        sigmas = np.append(sigmas, 0).astype(np.float32).astype(np.float64)
    rows = SOLVERS[solver](sigmas)
    columns = [np.asarray(column, np.float32) for column in zip(*rows)]
    if not all(np.isfinite(column).all() for column in columns):
        raise UserError(f"shift={shift:g} leaves no usable schedule; use 5, for example.")
    fresh = sigmas[1:] if solver == "lcm" else np.zeros(len(timesteps))
    return Schedule(
        timesteps.astype(np.float32), sigmas, Coefficients(*columns), fresh.astype(np.float32)
    )


def _checked(sigmas: np.ndarray) -> np.ndarray:
    sigmas = np.asarray(sigmas, np.float64)
    falling = sigmas.ndim == 1 and len(sigmas) > 1 and bool(np.all(np.diff(sigmas) < 0))
    if not falling or sigmas[-1] != 0 or not sigmas[0] <= 1:
        raise UserError(
            "sigmas must be N+1 numbers that start at 1 or less and fall strictly to 0 for N "
            f"steps; got {np.array2string(sigmas, threshold=8)}."
        )
    return sigmas


def _log_snr(sigma: float) -> float:
    """`ln((1-sigma)/sigma)`, with the limits at 0 and 1."""
    if sigma <= 0:
        return math.inf
    return -math.inf if sigma >= 1 else math.log1p(-sigma) - math.log(sigma)


def _euler(sigmas: np.ndarray) -> list[Coefficients]:
    """`x + (sigma_next - sigma) * v`, written with the denoised estimate."""
    ratios = sigmas[1:] / sigmas[:-1]
    return [Coefficients(s, 1, 0, 0, 0, 0, r, 1 - r, 0) for s, r in zip(sigmas, ratios)]


def _lcm(sigmas: np.ndarray) -> list[Coefficients]:
    """`(1 - sigma_next) * m`; the noise of sigma_next is fresh, and added by `renoise`."""
    return [Coefficients(s, 1, 0, 0, 0, 0, 0, 1 - t, 0) for s, t in zip(sigmas, sigmas[1:])]


def _dpm_plus_plus(sigmas: np.ndarray) -> list[Coefficients]:
    """DPM++ 2M, midpoint; first order at both ends."""
    rows = []
    for i, s0 in enumerate(sigmas[:-1]):
        first_order = i in (0, len(sigmas) - 2)
        rows.append(Coefficients(s0, 1, 0, 0, 0, 0, *_predictor(sigmas, i, first_order)))
    return rows


def _unipc(sigmas: np.ndarray) -> list[Coefficients]:
    """UniPC of order 2 with B(h) = exp(-h)-1 ("bh2"), lower orders at both ends."""
    last = len(sigmas) - 2
    rows = []
    for i in range(last + 1):
        corrector = (1, 0, 0, 0, 0)
        if i > 0:
            # The corrector has the order that the predictor before it had: 1 in the first step.
            corrector = _corrector(sigmas, i, first_order=i == 1)
        first_order = i in (0, last)
        rows.append(Coefficients(sigmas[i], *corrector, *_predictor(sigmas, i, first_order)))
    return rows


def _predictor(sigmas: np.ndarray, i: int, first_order: bool) -> tuple[float, float, float]:
    """Weights of x, m and m1 in the step from sigma_i to sigma_(i+1); the same in both solvers.

    `st/s0*x - a*phi*m - a*phi*0.5*(m1 - m)/r` with `a = 1 - st`, `phi = exp(-h) - 1`. A logSNR of
    -inf (sigma 1) makes `1/r` zero, and one of +inf (sigma 0) makes `phi` -1.
    """
    s0, st = sigmas[i], sigmas[i + 1]
    h = _log_snr(st) - _log_snr(s0)
    weight = (1 - st) * math.expm1(-h)
    if first_order:
        return st / s0, -weight, 0.0
    inverse_r = h / (_log_snr(sigmas[i - 1]) - _log_snr(s0))
    return st / s0, -weight + 0.5 * weight * inverse_r, -0.5 * weight * inverse_r


def _corrector(sigmas: np.ndarray, i: int, first_order: bool) -> tuple[float, ...]:
    """Weights of x, x_last, m, m1 and m2 that redo the step into sigma_i, now that m is known."""
    s0, st = sigmas[i - 1], sigmas[i]
    h = _log_snr(st) - _log_snr(s0)
    weight = (1 - st) * math.expm1(-h)
    if first_order:
        return 0.0, st / s0, -0.5 * weight, -0.5 * weight, 0.0
    inverse_r = h / (_log_snr(sigmas[i - 2]) - _log_snr(s0))
    phi_1 = math.expm1(-h) / -h - 1
    phi_2 = phi_1 / -h - 0.5
    b_1, b_2 = phi_1 / math.expm1(-h), 2 * phi_2 / math.expm1(-h)
    # rho solves [[1, 1], [r, 1]] rho = b; written with 1/r so that r = -inf is harmless.
    rho_1 = (b_2 - b_1) * inverse_r / (1 - inverse_r)
    rho_2 = b_1 - rho_1
    older = -weight * rho_1 * inverse_r
    return 0.0, st / s0, -weight * rho_2, -weight * (1 - rho_2) - older, older


SOLVERS: dict[str, Callable[[np.ndarray], list[Coefficients]]] = {
    "unipc": _unipc,
    "dpm++": _dpm_plus_plus,
    "euler": _euler,
    "lcm": _lcm,
}
