"""Precision is one table: how each kind of layer is stored, computes, and sums.

The networks build their layers from it, loading casts to it, and `python -m convert --dtype` writes
by it, all for the type that was *asked for*. It follows the official code: bf16 for the large
products under fp32 norms, modulation, timestep path, head and VAE (Wan-Video/Wan2.1,
`wan/modules/model.py`, `vae.py`). Where float32 is asked for, all is fp32.

A layer casts its input to the compute type, whatever type its kernel is stored in. Latents, the
solver's state and the condition are fp32 always; the residual stream is a setting of the DiT.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from wanjax.errors import UserError, nearest

F32, F16, BF16 = (np.dtype(t) for t in (jnp.float32, jnp.float16, jnp.bfloat16))
ASKED = {"float32": F32, "bfloat16": BF16}


@dataclass(frozen=True)
class Precision:
    """How one kind of layer works: `storage` of its parameters, in files and on the device;
    `compute`, to which it casts what it multiplies and in which it answers; `accumulate`, in which
    sums, norms' statistics and softmaxes are formed."""

    storage: np.dtype
    compute: np.dtype
    accumulate: np.dtype = F32


Kind = Literal[
    "matrix", "patch", "position bias", "image tower", "vae", "time path", "head", "norm", "bias"
]

WHOLE = Precision(storage=F32, compute=F32)

# What each kind of layer has where bfloat16 is asked for.
TABLE: dict[Kind, Precision] = {
    # Blocks and embeddings of the DiT and of umT5, which was published in bf16.
    "matrix": Precision(storage=BF16, compute=BF16),
    # The DiT's first product sees the fp32 latents: 0.1 TF of a forward's 6,500 at 720p81.
    "patch": Precision(storage=BF16, compute=F32),
    # umT5's, added to fp32 scores.
    "position bias": Precision(storage=BF16, compute=F32),
    # CLIP's officially runs in fp16, which TPUs do not multiply in. A picture costs 0.3 TF, once.
    "image tower": Precision(storage=F16, compute=F32),
    "vae": WHOLE,
    "time path": WHOLE,
    "head": WHOLE,
    # Modulation is of this kind too.
    "norm": WHOLE,
    "bias": WHOLE,
}


def precision_of(kind: Kind, asked: DTypeLike) -> Precision:
    """The row of `kind` where `asked` is bfloat16, and fp32 throughout where it is float32."""
    return WHOLE if parse_dtype(asked) == F32 else TABLE[kind]


def matmul_precision(compute: DTypeLike) -> jax.lax.Precision:
    """fp32 means fp32: TPUs and GPUs would otherwise multiply it in bf16 or TF32. Products of
    16-bit numbers are exact in fp32, and there XLA sums them by itself."""
    return jax.lax.Precision.HIGHEST if compute == F32 else jax.lax.Precision.DEFAULT


def parse_dtype(dtype: str | DTypeLike) -> np.dtype:
    """ "bfloat16" or "float32", by name or as a type."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ASKED:
        raise UserError(f"There is no precision '{name}'{nearest(name, ASKED)}")
    return ASKED[name]


def is_coarser(dtype: np.dtype, than: np.dtype) -> bool:
    """Whether a floating type keeps fewer digits than another."""
    return jnp.finfo(dtype).nmant < jnp.finfo(than).nmant
