"""How devices that share a sequence attend to all of it. Everything here runs inside `shard_map`.

**Ulysses**: an all-to-all turns a part of the tokens of all heads into all tokens of a part of the
heads; each device then attends alone, and a second all-to-all turns the result back. **Ring**: keys
and values go around while every device keeps its queries; partial results join by their log-sum-exp
(`out = sum_i exp(lse_i - lse) out_i`). Both together: Ulysses inside of each member of the ring.

Sources: DeepSpeed-Ulysses, arXiv 2309.14509; ring attention, arXiv 2310.01889.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wanjax.attention.kernels import Output, compute, compute_with_lse
from wanjax.attention.reference import HIDDEN, Count, attend_gradients
from wanjax.remat import named


def shared(
    query: Float[Array, "B n K E"],
    key: Float[Array, "B n K E"],
    value: Float[Array, "B n K E"],
    count: int | None,
    *,
    name: str | None,
    ring: int,
    ulysses: int,
) -> Float[Array, "B n K E"]:
    """This device's tokens after they attended to those of all devices of the sequence; tokens from
    `count` on, over the whole sequence, are padding. What bears `name` lies between the exchanges:
    a gradient that computes a block again repeats these, whatever it kept."""
    if ulysses > 1:
        query, key, value = (
            jax.lax.all_to_all(x, "ulysses", split_axis=2, concat_axis=1, tiled=True)
            for x in (query, key, value)
        )
    if ring > 1:
        out = ring_attention(ring, count, name, query, key, value)
    else:
        out = compute(query, key, value, count, name=name)
    if ulysses > 1:
        out = jax.lax.all_to_all(out, "ulysses", split_axis=1, concat_axis=2, tiled=True)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_attention(size: int, count: int | None, name: str | None, query, key, value):
    """Attention over the mesh's axis `ring`, of `size` devices; exact, forward and gradient."""
    return _forward(size, count, query, key, value)[0].astype(query.dtype)


def _forward(size, count, query, key, value) -> Output:
    def visit(carry, step):
        keys, out, lse = carry
        keys = _pass_on(keys, size)
        return (
            keys,
            *_join(out, lse, *_look_at(query, keys, _real(size, count, keys, step))),
        ), None

    keys = (key, value)
    start = (keys, *_look_at(query, keys, _real(size, count, keys, 0)))
    (_, out, lse), _ = jax.lax.scan(visit, start, jnp.arange(1, size))
    return out, lse


def _forward_and_keep(size, count, name, query, key, value):
    out, lse = _forward(size, count, query, key, value)
    out, lse = named((out.astype(query.dtype), lse), name)
    return out, (query, key, value, out, lse)


def _backward(size, count, name, kept, change):
    """Keys and values go around again, and their gradients go with them until they are home."""
    query, key, value, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * change.astype(jnp.float32), axis=-1)

    def gradients(keys, step):
        real = _real(size, count, keys, step)
        found = attend_gradients(query, *keys, change, lse, delta, real)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)

    def visit(carry, step):
        keys, to_query, to_keys = carry
        keys, to_keys = _pass_on((keys, to_keys), size)
        dq, *dkv = gradients(keys, step)
        to_keys = tuple(a + b for a, b in zip(to_keys, dkv))
        return (keys, to_query + dq, to_keys), None

    dq, *dkv = gradients((key, value), 0)
    start = ((key, value), dq, tuple(dkv))
    (_, dq, dkv), _ = jax.lax.scan(visit, start, jnp.arange(1, size))
    dk, dv = _pass_on(dkv, size)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype)


ring_attention.defvjp(_forward_and_keep, _backward)


def _pass_on(tree, size: int):
    """Give what is held to the next device of the ring."""
    around = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "ring", around), tree)


def _real(size: int, count: int | None, keys, step) -> Count:
    """How many of the keys that are here after `step` exchanges are not padding."""
    if count is None:
        return None
    length = keys[0].shape[1]
    owner = (jax.lax.axis_index("ring") - step) % size
    return jnp.clip(count - owner * length, 0, length)


def _look_at(query, keys, real: Count) -> Output:
    """Attention to the keys that are here; where none is real it has no weight."""
    if real is None:
        return compute_with_lse(query, *keys)
    out, lse = compute_with_lse(query, *keys, jnp.maximum(real, 1))
    return jnp.where(real > 0, out, 0.0), jnp.where(real > 0, lse, HIDDEN)


def _join(out, lse, part, part_lse) -> Output:
    """Two softmaxes over different keys as one over all of them."""
    whole = jnp.logaddexp(lse, part_lse)
    weigh = lambda x, own: x * jnp.exp(own - whole)[..., None]  # noqa: E731
    return weigh(out, lse) + weigh(part, part_lse), whole
