"""Solvers against the official schedules, a closed form, and an independent implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wanjax.errors import UserError
from wanjax.solvers import (
    Coefficients,
    initial_noise,
    initial_state,
    make_schedule,
    renoise,
    seed_key,
    step,
)

UNIPC_40_5 = (
    "999,994,989,983,978,972,965,959,952,944,937,929,920,911,902,892,882,870,859,846,833,818,803,"
    "786,768,749,728,706,681,654,624,591,555,514,468,416,356,288,208,113"
)
UNIPC_40_3 = (
    "999,991,982,973,963,954,944,933,922,911,899,887,874,861,847,832,817,801,785,767,749,730,710,"
    "688,666,642,617,590,562,531,499,465,428,388,345,299,249,195,136,71"
)
UNIPC_20_5 = "999,989,978,965,952,937,920,902,882,859,833,803,768,728,681,624,555,468,356,208"


def solve(velocity, noise: jax.Array, schedule) -> jax.Array:
    """Integrate from `noise` to data inside one `lax.scan`; `velocity(x, timestep)`."""

    def body(state, row):
        timestep, coefficients = row
        return step(state, velocity(state.x, timestep), coefficients), None

    rows = (jnp.asarray(schedule.timesteps), Coefficients(*map(jnp.asarray, schedule.coefficients)))
    return jax.lax.scan(body, initial_state(noise), rows)[0].x


@pytest.mark.parametrize(
    ("steps", "shift", "listed"), [(40, 5, UNIPC_40_5), (40, 3, UNIPC_40_3), (20, 5, UNIPC_20_5)]
)
def test_unipc_timesteps_are_the_official_ones(steps, shift, listed):
    schedule = make_schedule("unipc", steps, shift)
    assert schedule.timesteps.tolist() == [float(t) for t in listed.split(",")]


def test_official_sigmas_and_dpm_timesteps():
    unipc = make_schedule("unipc", 40, 5.0)
    np.testing.assert_allclose(unipc.sigmas[:3], [0.99979985, 0.99469477, 0.98937702], atol=5e-9)
    for solver in ("dpm++", "euler"):
        schedule = make_schedule(solver, 40, 5.0)
        assert schedule.timesteps[:5].tolist() == [1000, 994, 989, 984, 978]
        assert schedule.sigmas[0] == 1 and schedule.sigmas[-1] == 0


def gaussian_velocity(x, timestep, std=0.5):
    """The exact velocity field for data from N(0, std^2)."""
    sigma = timestep / 1000
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    return (sigma - (1 - sigma) * std**2) / variance * x


def gaussian_error(solver, steps):
    """Error at x=1, untruncated; the ODE maps x at sigma to 0.5*x/std(sigma)."""
    sigmas = make_schedule(solver, steps, 5.0).sigmas
    schedule = make_schedule(solver, steps, 5.0, sigmas=sigmas)
    got = float(solve(gaussian_velocity, jnp.ones(()), schedule))
    first = sigmas[0]
    return abs(got - 0.5 / np.sqrt((1 - first) ** 2 * 0.25 + first**2))


@pytest.mark.parametrize(("solver", "order"), [("unipc", 2), ("dpm++", 2), ("euler", 1)])
def test_converges_on_gaussian_data(solver, order):
    errors = [gaussian_error(solver, steps) for steps in (20, 40, 80)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < errors[0] / (3 if order == 1 else 8)


def test_unipc_errors_are_the_published_ones():
    for steps, expected in ((20, 0.057), (40, 0.0057), (80, 0.0020)):
        schedule = make_schedule("unipc", steps, 5.0)
        sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
        # The published figures hold with the sigma of each step, not its truncated timestep.
        state = initial_state(jnp.ones(()))
        for i in range(steps):
            state = step(state, gaussian_velocity(state.x, 1000 * sigmas[i]), schedule.row(i))
        first = schedule.sigmas[0]
        exact = 0.5 / np.sqrt((1 - first) ** 2 * 0.25 + first**2)
        assert abs(abs(float(state.x) - exact) - expected) < 0.1 * expected


def reference_unipc(velocity, x, sigmas):
    """Order 2 "bh2" written with a history list and a linear solve, in float64."""
    lam = lambda s: np.log(1 - s) - np.log(s)  # noqa: E731
    history, last_order, x_last = [], 0, None
    count = len(sigmas) - 1
    for i in range(count):
        m = x - sigmas[i] * velocity(x, i)
        if i > 0:
            s0, st = sigmas[i - 1], sigmas[i]
            h = lam(st) - lam(s0)
            hh, phi = -h, np.expm1(-h)
            ratios = [(lam(sigmas[i - 1 - k]) - lam(s0)) / h for k in range(1, last_order)] + [1.0]
            slopes = [(history[-1 - k] - history[-1]) / ratios[k - 1] for k in range(1, last_order)]
            h_phi, factorial, b = phi / hh - 1, 1, []
            for j in range(1, last_order + 1):
                b.append(h_phi * factorial / np.expm1(hh))
                factorial *= j + 1
                h_phi = h_phi / hh - 1 / factorial
            vander = np.array([[r**j for r in ratios] for j in range(last_order)])
            rho = [0.5] if last_order == 1 else np.linalg.solve(vander, b)
            total = sum(p * d for p, d in zip(rho, slopes)) + rho[-1] * (m - history[-1])
            x = st / s0 * x_last - (1 - st) * phi * history[-1] - (1 - st) * np.expm1(hh) * total
        order = min(2, count - i, last_order + 1)
        x_last, s0, st = x, sigmas[i], sigmas[i + 1]
        history.append(m)
        if i == count - 1:
            return m
        h = lam(st) - lam(s0)
        x = st / s0 * x - (1 - st) * np.expm1(-h) * m
        if order == 2:
            r = (lam(sigmas[i - 1]) - lam(s0)) / h
            x = x - (1 - st) * np.expm1(-h) * 0.5 * (history[-2] - m) / r
        last_order = order
    return x


@pytest.mark.parametrize("shift", [3.0, 5.0, 16.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_unipc_equals_a_direct_implementation(shift, steps):
    velocities = np.random.default_rng(steps).normal(size=(steps, 5))
    x = np.random.default_rng(99).normal(size=5)
    schedule = make_schedule("unipc", steps, shift)
    expected = reference_unipc(lambda _, i: velocities[i], x, schedule.sigmas)
    state = initial_state(jnp.asarray(x, jnp.float32))
    for i in range(steps):
        state = step(state, jnp.asarray(velocities[i], jnp.float32), schedule.row(i))
    np.testing.assert_allclose(state.x, expected, atol=4e-6 * max(1, np.abs(expected).max()))


def test_explicit_sigmas_start_at_one_without_nan():
    sigmas = [1.0, 0.9, 0.5, 0.2, 0.0]
    for solver in ("unipc", "dpm++", "euler"):
        schedule = make_schedule(solver, 0, 0, sigmas=sigmas)
        assert schedule.timesteps.tolist() == pytest.approx([1000, 900, 500, 200])
        got = solve(lambda x, t: 0.3 * x, jnp.ones(3), schedule)
        assert np.isfinite(got).all()


def test_the_last_step_gives_the_denoised_estimate():
    for solver in ("unipc", "dpm++", "euler"):
        schedule = make_schedule(solver, 5, 3.0)
        assert schedule.coefficients.p_x[-1] == 0 and schedule.coefficients.p_m[-1] == 1


def test_bad_requests_are_refused():
    with pytest.raises(UserError, match="unipc"):
        make_schedule("unipcc", 10, 5.0)
    for sigmas in (
        [1.0, 0.5], [0.5, 0.7, 0.0], [0.5, 0.5, 0.0], [1.1, 0.0], [0.0], [[1.0, 0.0]],
        [float("nan"), 0.0],
    ):  # fmt: skip
        with pytest.raises(UserError, match="sigmas"):
            make_schedule("unipc", 10, 5.0, sigmas=sigmas)
    with pytest.raises(UserError, match="steps"):
        make_schedule("euler", 0, 5.0)
    for shift in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UserError, match="not a positive number"):
            make_schedule("euler", 1, shift)


def test_the_least_of_requests_is_taken():
    np.testing.assert_array_equal(make_schedule("unipc", 9, 5.0, sigmas=[1, 0]).sigmas, [1, 0])
    np.testing.assert_allclose(make_schedule("euler", 2, 0.5).sigmas, [1, 1 / 3, 0], rtol=1e-6)
    assert len(make_schedule("euler", 1, 1.0)) == 1


def test_scan_equals_loop():
    schedule = make_schedule("unipc", 6, 5.0)
    x = jax.random.normal(jax.random.key(0), (4,))
    state = initial_state(x)
    for i in range(6):
        state = step(state, gaussian_velocity(state.x, schedule.timesteps[i]), schedule.row(i))
    np.testing.assert_allclose(state.x, solve(gaussian_velocity, x, schedule), rtol=1e-5)


def test_every_bit_of_a_seed_counts():
    noise = lambda seed: np.asarray(initial_noise((1, 2, 2, 4), None, seed))  # noqa: E731
    seeds = (0, 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1)
    assert len({noise(seed).tobytes() for seed in seeds}) == len(seeds)
    short = jax.random.normal(jax.random.key(7), (1, 1, 2, 2, 4))
    np.testing.assert_array_equal(noise(7), short)
    for seed in (-1, 1 << 64):
        with pytest.raises(UserError, match=f"seed={seed} is not from 0"):
            noise(seed)


def test_the_four_steps_of_lcm_are_the_published_ones():
    """Raw times 1000, 750, 500 and 250, shifted by 5; timesteps are not truncated."""
    schedule = make_schedule("lcm", 4, 5.0)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.9375, 5 / 6, 0.625, 0], rtol=1e-7)
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-7)
    np.testing.assert_array_equal(schedule.fresh, schedule.sigmas[1:].astype(np.float32))
    assert not any(make_schedule(s, 4, 5.0).fresh.any() for s in ("unipc", "dpm++", "euler"))


def test_lcm_goes_to_the_estimate_and_back_up_by_noise_that_was_never_used():
    """Against the recipe written out; and a perfect estimate is what comes out at the end."""
    schedule, key = make_schedule("lcm", 4, 5.0), seed_key(7)
    state = initial_state(initial_noise((2, 3), None, 7))
    data, x, noises = jnp.full((1, 2, 3), 0.25), np.asarray(state.x), [np.asarray(state.x)]
    velocity = lambda x, sigma: jnp.sin(3 * x) if sigma > 0.7 else (x - data) / sigma  # noqa: E731
    for i, sigma in enumerate(schedule.sigmas[:-1]):
        after = schedule.sigmas[i + 1]
        denoised = x - sigma * np.asarray(velocity(x, sigma))
        state = step(state, velocity(state.x, sigma), schedule.row(i))
        np.testing.assert_allclose(state.x, (1 - after) * denoised, atol=1e-5)
        before = np.asarray(state.x)
        state = renoise(state, schedule.fresh[i], key, np.int32(i))
        x = np.asarray(state.x)
        noises.append((x - before) / max(after, 1e-9))
    np.testing.assert_allclose(state.x, data, atol=1e-6)
    for i, one in enumerate(noises[:-1]):
        assert 0.3 < one.std() < 2
        assert not any(np.allclose(one, other, atol=1e-3) for other in noises[:i])
