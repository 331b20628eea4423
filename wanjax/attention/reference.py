"""The reference: exact attention on any platform, head by head and `CHUNK` queries at a time.

    out = softmax(q k^T / sqrt(E)) v,    lse = log sum exp(q k^T / sqrt(E))

Scores and softmax are fp32 whatever the inputs' type. A gradient computes each chunk's softmax
again, so that no more than one chunk of one head is ever held: `CHUNK x M` numbers, never `N x N`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from wanjax.precision import matmul_precision

# Fewer queries read all keys and values for too little work; more fall out of a CPU's cache.
CHUNK = 256
HIDDEN = jnp.finfo(jnp.float32).min  # the score of a key that is not there; finite, so never NaN
Count = int | Int[Array, ""] | None


def attend(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    count: Count = None,
) -> tuple[Float[Array, "B N K E"], Float[Array, "B N K"]]:
    """The output, fp32, and the log-sum-exp of the scores. Keys from `count` on are padding."""
    return over_chunks(partial(_attend, count=count), (query,), (key, value))


def _attend(q, k, v, count):
    """One chunk of queries of one head."""
    s = scores(q, k, count)
    lse = jax.nn.logsumexp(s, axis=-1)
    return _weigh(jnp.exp(s - lse[:, None]), v), lse


def attend_gradients(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    change: Float[Array, "B N K E"],
    lse: Float[Array, "B N K"],
    delta: Float[Array, "B N K"],
    count: Count = None,
) -> tuple[Float[Array, "B N K E"], Float[Array, "B M K E"], Float[Array, "B M K E"]]:
    """What these keys contribute to the gradients of q, k and v, where `lse` is that of all keys.

    With `p = exp(s - lse)`, `ds = p * (change v^T - delta)` and `delta = sum_e change * out`: which
    is the gradient of `<change, p v> - <delta, sum_m p>` with `lse` held fixed.
    """

    def weigh(q, lse, k, v):
        p = jnp.exp(scores(q, k, count) - lse[:, None])
        return _weigh(p, v), p.sum(-1)

    def parts(query, key, value):
        return over_chunks(weigh, (query, lse), (key, value))

    back = jax.vjp(parts, query, key, value)[1]
    return back((change.astype(jnp.float32), -delta))


def scores(q: Float[Array, "N E"], k: Float[Array, "M E"], count: Count) -> Float[Array, "N M"]:
    """Scaled scores of one head in fp32; those of padding are `HIDDEN`."""
    s = jnp.einsum(
        "ne,me->nm",
        q,
        k,
        preferred_element_type=jnp.float32,
        precision=matmul_precision(q.dtype),
    )
    s = s * q.shape[-1] ** -0.5
    return s if count is None else jnp.where(jnp.arange(len(k)) < count, s, HIDDEN)


def _weigh(weights, v):
    return jnp.matmul(
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=matmul_precision(v.dtype),
    )


def over_chunks(
    body: Callable, by_query: tuple[jax.Array, ...], by_key: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """`body` for `CHUNK` rows of the arrays `by_query` (`B N K ...`) and all of `by_key`, of one
    head at a time. The last chunk is filled up with zeros, so a length need not divide."""
    batch, length, heads = by_query[0].shape[:3]
    size = min(CHUNK, length)
    count = -(-length // size)

    @jax.checkpoint
    def one_chunk(queries, keys):
        return body(*queries, *(x.astype(like.dtype) for x, like in zip(keys, by_key)))

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "b (c n) k ... -> (b k) c n ...", n=size)

    def one_head(given):
        queries, keys = given
        # In fp32, as the gradients of keys and values are sums over all chunks.
        keys = tuple(x.astype(jnp.float32) for x in keys)
        return jax.lax.map(lambda chunk: one_chunk(chunk, keys), queries)

    keys = tuple(rearrange(x, "b m k ... -> (b k) m ...") for x in by_key)
    out = jax.lax.map(one_head, (tuple(map(split, by_query)), keys))
    join = partial(rearrange, pattern="(b k) c n ... -> b (c n) k ...", b=batch, k=heads)
    return jax.tree.map(lambda x: join(x)[:, :length], out)


def biased(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    bias: Float[Array, "#B K N M"],
) -> Float[Array, "B N K E"]:
    """`softmax(q k^T + bias) v` without a scale, as umT5 has it, for a prompt's few hundred tokens:
    the whole of the scores is held, as the bias is."""
    precision = matmul_precision(query.dtype)
    s = jnp.einsum(
        "bnke,bmke->bknm", query, key, preferred_element_type=jnp.float32, precision=precision
    )
    weights = jax.nn.softmax(s + bias, axis=-1).astype(value.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights, value, precision=precision)
