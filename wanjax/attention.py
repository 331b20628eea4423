"""One door for attention. Softmax is computed in fp32 whatever the inputs' type.

The reference runs on any platform and is exact; it works through the queries in chunks, so that the
scores of one chunk, never the whole `N x N` matrix, are held at a time.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from wanjax.precision import matmul_precision

# Scores held at once by the reference, in elements (fp32): 64 Mi elements are 256 MiB.
CHUNK_ELEMENTS = 1 << 26


def attention(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    *,
    bias: Float[Array, "#B K N M"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N K E"]:
    """`softmax(scale * q k^T + bias) v` for every head; `scale` defaults to `1/sqrt(E)`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, length, heads, _ = query.shape
    chunk = _chunk_length(length, CHUNK_ELEMENTS // (batch * heads * key.shape[1]))
    if chunk == length or bias is not None:
        return _attend(query, key, value, bias, scale)
    chunks = rearrange(query, "b (c n) k e -> c b n k e", n=chunk)
    out = jax.lax.map(lambda q: _attend(q, key, value, None, scale), chunks)
    return rearrange(out, "c b n k e -> b (c n) k e")


def _chunk_length(length: int, limit: int) -> int:
    """The largest divisor of `length` that is at most `limit` (at least 1)."""
    if length <= limit:
        return length
    return max(d for d in range(1, max(limit, 1) + 1) if length % d == 0)


def _attend(query, key, value, bias, scale):
    precision = matmul_precision(query.dtype)
    scores = jnp.einsum(
        "bnke,bmke->bknm",
        query,
        key,
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    scores = scores * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights, value, precision=precision)
