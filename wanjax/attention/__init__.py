"""One door for attention: `attention(q, k, v)` for `B N K E` arrays, on one device or on a mesh.

Behind the door are two layers. `exchange.py` brings tokens and heads together where a sequence is
split over devices (Ulysses, ring, or both); `kernels.py` computes on one device, by the fastest
exact kernel of the chip (TPU splash, GPU cuDNN) or by `reference.py`. The door has a `shard_map` of
its own, so that callers name axes and know nothing of devices, and no compiler has to guess how to
split a kernel. Softmax is fp32 whatever the inputs' type, and fp32 inputs are multiplied in fp32.
"""

from functools import partial

import jax
from jaxtyping import Array, Float

from wanjax.attention.exchange import shared
from wanjax.attention.kernels import compute
from wanjax.attention.reference import biased
from wanjax.sharding import check_heads, spec

__all__ = ["attention", "biased"]


def attention(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    *,
    queries: str | None = None,
    keys: str | None = None,
    count: int | None = None,
    name: str | None = None,
) -> Float[Array, "B N K E"]:
    """`softmax(q k^T / sqrt(E)) v` for every head, in the inputs' type; differentiable.

    `queries` and `keys` name the axes of N and M (`wanjax.sharding.RULES`) that may be split over
    devices. Keys without a name, as those of text and image, are whole on every device and are
    never exchanged. Keys from `count` on are padding. With a `name` a remat policy may save what
    each device computed (`wanjax.remat`). Raises `UserError` for heads that the mesh does not
    divide.
    """
    count = None if count == key.shape[1] else count
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return compute(query, key, value, count, name=name)
    by_query = spec(("batch", queries, None, None), query.shape, mesh)
    by_key = spec(("batch", keys, None, None), key.shape, mesh)
    if keys is not None and by_key == by_query and by_key[1:]:
        ring, ulysses = mesh.shape["ring"], mesh.shape["ulysses"]
        check_heads(query.shape[2], ulysses)
        here = partial(shared, count=count, name=name, ring=ring, ulysses=ulysses)
    else:
        here = partial(compute, count=count, name=name)
        by_key = spec(("batch", None, None, None), key.shape, mesh)
    split = jax.shard_map(
        here, mesh=mesh, in_specs=(by_query, by_key, by_key), out_specs=by_query, check_vma=False
    )
    return split(query, key, value)
