"""The kernels behind the door against the reference, and which of them a program gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.meshes import distance
from tests.real_size import equations
from wanjax.attention import attention, kernels
from wanjax.attention.reference import CHUNK, attend, attend_gradients
from wanjax.errors import UserError

pytestmark = pytest.mark.compiles

BLOCKS = kernels.Blocks(query=256, key=256, compute=128, query_back=128, key_back=256)
# Queries and keys: neither fills its last block; the third has keys of less than one.
LENGTHS = [(300, 300), (513, 641), (260, 77)]


def arrays(n: int, m: int, heads: int = 1, head_size: int = 128, dtype=np.float32):
    """Queries, keys, values and a change of the output; queries are large, for sharp softmaxes."""
    rng = np.random.default_rng(n)
    normal = lambda length: rng.standard_normal((2, length, heads, head_size)).astype(dtype)  # noqa: E731
    return 2 * normal(n), normal(m), normal(m), normal(n)


def with_gradient(function, q, k, v, change):
    out, back = jax.vjp(function, q, k, v)
    return (out, *back(change))


def written_out(q, k, v):
    """Attention as one formula in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnke,bmke->bknm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bknm,bmke->bnke", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("n", [1, 40, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_the_reference_is_the_formula(n):
    q, k, v, _ = arrays(n, 90, heads=2, head_size=20)
    assert distance(attention(q, k, v), written_out(q, k, v)) <= 1e-6


@pytest.mark.parametrize("n, m", LENGTHS)
def test_splash_equals_the_reference(n, m):
    given = arrays(n, m)
    splash = lambda q, k, v: kernels.splash(q, k, v, None, BLOCKS, interpret=True)  # noqa: E731
    got, expected = with_gradient(splash, *given), with_gradient(attention, *given)
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) <= 1e-5


def test_padding_is_never_seen():
    """Keys from `count` on, whatever they hold, change nothing; their gradient is zero."""
    q, k, v, change = arrays(300, 400)
    count = 290
    k[:, count:], v[:, count:] = 1e3, 1e6
    expected = with_gradient(attention, q, k[:, :count], v[:, :count], change)
    splash = lambda *x: kernels.splash(*x, count, BLOCKS, interpret=True)  # noqa: E731
    for function in (splash, lambda *x: attention(*x, count=count)):
        out, dq, dk, dv = with_gradient(function, q, k, v, change)
        got = out, dq, dk[:, :count], dv[:, :count]
        assert max(map(distance, got, expected)) <= 1e-5
        assert not np.any(dk[:, count:]) and not np.any(dv[:, count:])


def test_log_sum_exp_of_splash_and_of_the_reference():
    q, k, v, _ = arrays(300, 300)
    given = (q, k, v, 290)
    got = kernels.splash_with_lse(*given, BLOCKS, interpret=True)
    for a, b in zip(got, attend(*given), strict=True):
        assert distance(a, b) <= 1e-5


def test_gradients_of_parts_of_the_keys_add_up():
    """What the ring does: each part's gradients by the log-sum-exp of the whole."""
    q, k, v, change = arrays(300, 300, head_size=16)
    out, lse = attend(q, k, v)
    delta = jnp.sum(out * change, -1)
    expected = with_gradient(lambda *x: attend(*x)[0], q, k, v, change)[1:]
    parts = [
        attend_gradients(q, k[:, a:b], v[:, a:b], change, lse, delta)
        for a, b in ((0, 170), (170, 300))
    ]
    assert distance(parts[0][0] + parts[1][0], expected[0]) <= 1e-5
    for i in (1, 2):
        assert distance(np.concatenate([p[i] for p in parts], 1), expected[i]) <= 1e-5


def shapes(length: int, dtype=jnp.bfloat16, head_size: int = 128):
    return [jax.ShapeDtypeStruct((1, length, 2, head_size), dtype)] * 3


def on(platform: str, kind: str):
    """The context of a program for one such chip."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "ring", "ulysses"), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def primitives(length: int, **kind) -> set[str]:
    jaxpr = jax.make_jaxpr(attention)(*shapes(length, **kind)).jaxpr
    return {equation.primitive.name for equation in equations(jaxpr)}


@pytest.mark.parametrize("chip", [*kernels.CHIPS, "TPU of tomorrow"])
def test_a_program_for_a_tpu_has_splash_whatever_the_host(chip):
    with on("tpu", chip):
        assert "pallas_call" in primitives(75_600)
        assert "pallas_call" in primitives(300)
        assert "pallas_call" not in primitives(14_400, dtype=jnp.float32, head_size=384)
    with on("cpu", "cpu"):
        assert "pallas_call" not in primitives(75_600)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_long_shapes_without_a_fast_kernel_are_refused_by_name(platform):
    message = "Attention of 20,000 tokens with heads of 128 in float32 .* takes up to 16,384; use"
    with on(platform, "chip"):
        with pytest.raises(UserError, match=message):
            primitives(20_000, dtype=jnp.float32)
        with pytest.raises(UserError, match="heads of 100 in bfloat16"):
            primitives(20_000, head_size=100)
        primitives(16_384, dtype=jnp.float32)
    with on("cpu", "cpu"):
        primitives(20_000, dtype=jnp.float32)


def test_outside_of_a_mesh_the_platform_is_that_of_the_lowering():
    traced = jax.jit(jax.grad(lambda *x: attention(*x).sum())).trace(*shapes(20_000, jnp.float32))
    traced.lower(lowering_platforms=("cpu",))
    with pytest.raises(UserError, match="20,000 tokens .* does not know its chip; call it under"):
        traced.lower(lowering_platforms=("tpu",))
    jax.jit(attention).trace(*shapes(4_000)).lower(lowering_platforms=("tpu",))
