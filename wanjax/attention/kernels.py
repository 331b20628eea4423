"""What computes attention on one device: TPU splash, GPU cuDNN, or the reference.

The chip is that of the mesh for which a program is traced (`jax.set_mesh`, which a compilation for
absent hardware sets too), never what happens to be on the host. Outside of a mesh no chip is known:
there the reference takes what is short, and what is long on a CPU only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jaxtyping import Array, Float

from wanjax.attention.reference import Count, attend
from wanjax.errors import UserError
from wanjax.remat import named, naming_residuals

# On accelerators the reference takes up to so many tokens: its many small products waste a chip.
# A single head, as that of a picture in the VAE, is little work at any length.
REFERENCE_LIMIT = 16_384
LANES = 128  # splash works on heads and blocks that are multiples of this
Output = tuple[Float[Array, "B N K E"], Float[Array, "B N K"]]


@dataclass(frozen=True)
class Blocks:
    """Splash's tiles: queries, keys in memory, keys multiplied at once; forward, then backward."""

    query: int
    key: int
    compute: int
    query_back: int
    key_back: int


# By `device_kind`. Backward tiles hold more per query, and v5 has half of v6's memory for them.
CHIPS = {
    "TPU v5 lite": Blocks(1024, 1024, 512, 512, 1024),
    "TPU v5": Blocks(1024, 2048, 256, 1024, 1024),
    "TPU v6 lite": Blocks(2048, 2048, 512, 1024, 2048),
    "TPU7x": Blocks(2048, 2048, 256, 1024, 2048),
}
OTHER_TPU = Blocks(512, 1024, 256, 512, 512)


def compute(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    count: int | None = None,
    *,
    name: str | None = None,
) -> Float[Array, "B N K E"]:
    """Attention on this device; differentiable. Keys from `count` on are padding. Where there is a
    `name`, the result and what else a gradient wants of it bear it."""
    platform, chip = _target()
    if platform == "tpu" and _splash_takes(query):
        return splash(query, key, value, count, CHIPS.get(chip, OTHER_TPU), name=name)
    if platform == "gpu" and _cudnn_takes(query):
        return cudnn(query, key, value, count, name=name)
    query = _reference_may(query, platform)
    # Its gradient wants no log-sum-exp: it computes each chunk's softmax again.
    return named(attend(query, key, value, count)[0].astype(query.dtype), name)


def compute_with_lse(
    query: Float[Array, "B N K E"],
    key: Float[Array, "B M K E"],
    value: Float[Array, "B M K E"],
    count: Count = None,
) -> Output:
    """As `compute`, with the log-sum-exp of the scores; both fp32, and without a gradient."""
    platform, chip = _target()
    if platform == "tpu" and _splash_takes(query):
        return splash_with_lse(query, key, value, count, CHIPS.get(chip, OTHER_TPU))
    if platform == "gpu" and _cudnn_takes(query):
        return cudnn_with_lse(query, key, value, count)
    return attend(_reference_may(query, platform), key, value, count)


def _target() -> tuple[str | None, str | None]:
    """Platform ("cpu", "tpu", "gpu") and chip of the mesh, or None outside of one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (None, None) if device is None else (device.platform, device.device_kind)


def _splash_takes(query: jax.Array) -> bool:
    # Splash multiplies fp32 in bf16, and fp32 here means fp32.
    return query.dtype == jnp.bfloat16 and query.shape[-1] % LANES == 0


def _cudnn_takes(query: jax.Array) -> bool:
    head_size = query.shape[-1]
    return query.dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128


def _reference_may(query: jax.Array, platform: str | None) -> jax.Array:
    """The query, or a `UserError` where the reference would waste an accelerator."""
    _, length, heads, head_size = query.shape
    if platform == "cpu" or length <= REFERENCE_LIMIT or heads == 1:
        return query
    what = f"Attention of {length:,} tokens with heads of {head_size} in {query.dtype.name}"
    if platform is None:
        return only_on_cpu.bind(
            query, message=f"{what} does not know its chip; call it under "
            "`jax.set_mesh(wanjax.sharding.make_mesh())`.",
        )  # fmt: skip
    raise UserError(
        f"{what} has no fast kernel on this {platform.upper()}, and the reference takes up to "
        f"{REFERENCE_LIMIT:,}; use bfloat16, or fewer frames or pixels."
    )


# The identity on a CPU; lowered for any other platform it is refused.
only_on_cpu = Primitive("only_on_cpu")
only_on_cpu.def_impl(jax.jit(lambda x, message: only_on_cpu.bind(x, message=message),
                             static_argnames="message"))  # fmt: skip
only_on_cpu.def_abstract_eval(lambda x, message: x)
ad.deflinear2(only_on_cpu, lambda change, _, message: [change])
mlir.register_lowering(only_on_cpu, lambda context, x, message: [x], platform="cpu")


def _refuse(context, x, message):
    raise UserError(message)


mlir.register_lowering(only_on_cpu, _refuse)


def splash(
    query,
    key,
    value,
    count: Count,
    blocks: Blocks,
    *,
    name: str | None = None,
    interpret: bool = False,
):
    """TPU splash attention, whole blocks of real keys and a mask over what fills the last ones."""
    kept = {"save_residuals": False, "residual_checkpoint_name": name}
    run, length = _splash(query, key, blocks, kept, interpret=interpret)
    out = run(query, key, value, count)
    return rearrange(out[:, :, :length], "B K N E -> B N K E")


def splash_with_lse(query, key, value, count: Count, blocks: Blocks, *, interpret: bool = False):
    run, length = _splash(query, key, blocks, {"save_residuals": True}, interpret=interpret)
    out, (lse,) = run(query, key, value, count)
    out = rearrange(out[:, :, :length], "B K N E -> B N K E").astype(jnp.float32)
    return out, rearrange(lse[:, :, :length], "B K N -> B N K").astype(jnp.float32)


def _splash(query, key, blocks: Blocks, kept: dict[str, Any], *, interpret: bool):
    """A function of q, k, v and the count of real keys; and the number of queries."""
    (_, n, heads, head_size), m = query.shape, key.shape[1]
    sizes = _block_sizes(n, m, blocks)
    n_full, m_full = (
        _up(n, sizes.block_q, sizes.block_q_dkv),
        _up(m, sizes.block_kv, sizes.block_kv_dkv),
    )
    kernel = make_splash_mha(
        MultiHeadMask([FullMask((n_full, m_full))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        **kept,
    )

    def run(query: jax.Array, key: jax.Array, value: jax.Array, count: Count) -> Callable:
        q, k, v = (rearrange(x, "B N K E -> B K N E") for x in (query, key, value))
        q = (q.astype(jnp.float32) * head_size**-0.5).astype(q.dtype)
        q, k, v = _fill(q, n_full), _fill(k, m_full), _fill(v, m_full)
        segments = None
        if count is not None or m_full > m:
            real = jnp.arange(m_full) < (m if count is None else count)
            # Queries that fill a block look at real keys too: what sees nothing becomes NaN.
            segments = SegmentIds(jnp.ones(n_full, jnp.int32), real.astype(jnp.int32))
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)

    return run, n


def _block_sizes(n: int, m: int, blocks: Blocks) -> BlockSizes:
    """The chip's blocks, smaller where the sequence is."""
    fit = lambda block, length: min(block, _up(length, LANES))  # noqa: E731
    q, kv = fit(blocks.query, n), fit(blocks.key, m)
    q_back, kv_back = fit(blocks.query_back, n), fit(blocks.key_back, m)
    within = lambda block: max(c for c in (128, 256, 512) if c <= blocks.compute and not block % c)  # noqa: E731
    return BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=within(kv),
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_kv_dkv_compute=within(kv_back),
        block_q_dq=q_back,
        block_kv_dq=kv_back,
    )


def _up(length: int, *blocks: int) -> int:
    """The least multiple of every block that is at least `length`."""
    step = max(blocks)
    assert all(step % block == 0 for block in blocks)
    return -(-length // step) * step


def _fill(x: Float[Array, "B K N E"], length: int) -> Float[Array, "B K M E"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def cudnn(query, key, value, count: int | None, *, name: str | None = None):
    """cuDNN's fused attention. Padding is told by the number of real keys: a mask would become a
    bias of `N x N`."""
    q, k, v, count = _for_cudnn(query, key, value, count)

    def run(q, k, v):
        lengths = _lengths(q, count)
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    run = run if name is None else naming_residuals(run, name)
    return run(q, k, v)[:, : query.shape[1]]


def cudnn_with_lse(query, key, value, count: Count):
    # The public function rounds the log-sum-exp to bf16, with which parts join 1 % wrong.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    q, k, v, count = _for_cudnn(query, key, value, count)
    padding = {}
    if count is not None:
        lengths = {"q_seqlen": _lengths(q, q.shape[1]), "kv_seqlen": _lengths(q, count)}
        padding = {"mask_type": MaskType.PADDING, **lengths}
    scale = q.shape[-1] ** -0.5
    out, lse = dot_product_attention(q, k, v, scale=scale, return_residual=True, **padding)
    length = query.shape[1]
    return out[:, :length].astype(jnp.float32), rearrange(lse, "B K N -> B N K")[:, :length]


def _for_cudnn(query, key, value, count: Count):
    """The arrays at even lengths, which its gradient wants, and how many keys are real."""
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
    if key.shape[1] % 2 and count is None:
        count = key.shape[1]
    return even(query), even(key), even(value), count


def _lengths(query, count: Count):
    return None if count is None else jnp.full(query.shape[0], count, jnp.int32)
