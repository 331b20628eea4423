"""One door for attention. Softmax is computed in fp32 whatever the inputs' type."""

from jaxtyping import Array, Float

from wanjax.attention.reference import attend, biased, matmul_precision

__all__ = ["attention", "biased", "matmul_precision"]


def attention(
    query: Float[Array, "B N K E"], key: Float[Array, "B M K E"], value: Float[Array, "B M K E"]
) -> Float[Array, "B N K E"]:
    """`softmax(q k^T / sqrt(E)) v` for every head, in the inputs' type."""
    return attend(query, key, value)[0].astype(value.dtype)
