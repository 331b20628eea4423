"""Causal convolutions over video, chunk by chunk, and the frames that they remember in between.

Where every layer looks only at the past, a video of any length can go through in chunks of a few
frames, with the result of the whole at the memory of a chunk. A video is one frame longer than its
whole chunks, so the first chunk is that frame behind blank ones, which no convolution may see.
One program serves all chunks, the first one too: compilers for TPU take ten seconds and more for
each large convolution, and blank frames cost no more than three frames of a video.

What a convolution must still know of the chunks before is kept in a `Memory`, a list of arrays in
the order of the calls. It is a value that `lax.scan` carries, not an `nnx.Variable`: its shapes
depend on the video, nothing of it outlives a call, and a network holds parameters only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from wanjax.nn import BIAS, conv, xavier_uniform
from wanjax.precision import precision_of

Network = Callable[[Array, "Memory"], Array]


class Memory:
    """What the causal layers remember between chunks, in the order in which they ask for it.

    `first` says (a boolean, under jit a traced one) whether this is the first chunk. Where `past`
    is None nothing was remembered yet, which is how a chunk tells the shapes of what it keeps.
    """

    def __init__(self, first: bool | Array = True, past: list | None = None):
        self.first = first
        self.kept: list = []
        self._past = None if past is None else iter(past)

    def part(self) -> list | None:
        """What a part of the network keeps in a memory of its own; add its successor to `kept`."""
        return None if self._past is None else next(self._past)

    def shown(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """`x` without its blank frames: zeros before the last frame of the first chunk."""
        blank = (jnp.arange(x.shape[1]) < x.shape[1] - 1)[:, None, None, None]
        return x if x.shape[1] == 1 else jnp.where(blank & self.first, 0, x)

    def prepend(self, x: Float[Array, "B T H W C"], count: int) -> Float[Array, "B T2 H W C"]:
        """`x` behind the `count` frames before it (zeros at the start), whose last are kept."""
        if self._past is None:
            x = jnp.pad(x, [(0, 0), (count, 0), (0, 0), (0, 0), (0, 0)])
        else:
            x = jnp.concatenate([next(self._past), x], axis=1)
        self.kept.append(x[:, -count:])
        return x


@dataclass(frozen=True)
class Tiling:
    """`count` tiles over `width` columns of an input, which a network turns into `scale` times as
    many. A column of its output depends on `reach` columns of the input to each side, so a tile
    sees that many more than it shows. At the border of the picture a tile ends where the picture
    does, so that what a convolution sees beyond is the same.

    Starts are multiples of `align`, which a network that halves the width needs.
    """

    width: int
    count: int
    reach: int
    scale: Fraction
    align: int = 1

    @property
    def core(self) -> int:
        """Columns of the input for which a tile answers."""
        return -(-self.width // (self.count * self.align)) * self.align

    @property
    def margin(self) -> int:
        """Columns that a tile sees beyond each border of its core."""
        return -(-self.reach // self.align) * self.align

    @property
    def seen(self) -> int:
        """Columns of the input that a tile takes."""
        return min(self.width, self.core + 2 * self.margin)

    @property
    def shown(self) -> int:
        """Columns of the output that a tile gives."""
        return int(self.core * self.scale)

    @property
    def cores(self) -> list[int]:
        """Where the cores begin; the last ones may overlap, and agree where they do."""
        return [min(i * self.core, self.width - self.core) for i in range(self.count)]

    @property
    def starts(self) -> list[int]:
        """Where the input of each tile begins."""
        last = self.width - self.seen
        return [min(max(0, core - self.margin), last) for core in self.cores]

    @property
    def inside(self) -> list[int]:
        """Where in its own output the columns begin that a tile shows."""
        return [int((core - start) * self.scale) for core, start in zip(self.cores, self.starts)]


def in_tiles(
    network: Network, x: Float[Array, "B T H W C"], memory: Memory, tiling: Tiling
) -> Float[Array, "B T2 H2 W2 C2"]:
    """`network` over tiles of the width one after another, with the result of the whole.

    Each tile has a memory of its own. They are stacked, and each gives way in place to its
    successor: at 720p all of them are 7 GiB.
    """
    if tiling.count == 1:
        return network(x, memory)

    def one(past: list | None, start: Array) -> tuple[Array, list]:
        own = Memory(memory.first, past)
        y = network(jax.lax.dynamic_slice_in_dim(x, start, tiling.seen, axis=3), own)
        return y, own.kept

    def turn(stack: list, tile: tuple[Array, Array, Array]) -> tuple[list, Array]:
        index, start, inside = tile
        y, kept = one(jax.tree.map(lambda pasts: pasts[index], stack), start)
        stack = jax.tree.map(lambda pasts, new: pasts.at[index].set(new), stack, kept)
        return stack, jax.lax.dynamic_slice_in_dim(y, inside, tiling.shown, axis=3)

    tiles = jnp.arange(tiling.count), jnp.asarray(tiling.starts), jnp.asarray(tiling.inside)
    stack = memory.part()
    if stack is None:
        _, kept = jax.eval_shape(one, None, tiles[1][0])
        stack = [jnp.zeros((tiling.count, *past.shape), past.dtype) for past in kept]
    kept, shown = jax.lax.scan(turn, stack, tiles)
    memory.kept.append(kept)
    _, *size, channels = shown.shape
    size[3] = int(tiling.width * tiling.scale)
    whole = jnp.zeros((*size, channels), shown.dtype)
    for core, columns in zip(tiling.cores, shown):
        at = int(core * tiling.scale)
        whole = whole.at[:, :, :, at : at + tiling.shown].set(columns)
    return whole


def stream(
    network: Network, x: Float[Array, "B T H W C"], chunk: int
) -> Float[Array, "B T2 H2 W2 C2"]:
    """`network` over a video of a first frame and whole chunks of `chunk` frames."""

    def step(past: list | None, chunk: tuple[Array, Array]) -> tuple[list, Array]:
        first, frames = chunk
        memory = Memory(first, past)
        y = network(frames, memory)
        return memory.kept, y

    x = jnp.pad(x, [(0, 0), (chunk - 1, 0), (0, 0), (0, 0), (0, 0)])
    chunks = rearrange(x, "b (n t) h w c -> n b t h w c", t=chunk)
    first = jnp.arange(len(chunks)) == 0
    shapes, _ = jax.eval_shape(step, None, (first[0], chunks[0]))
    nothing = jax.tree.map(lambda kept: jnp.zeros(kept.shape, kept.dtype), shapes)
    _, y = jax.lax.scan(step, nothing, (first, chunks))
    blank = y.shape[2] - 1
    return rearrange(y, "n b t h w c -> b (n t) h w c")[:, blank:]


def convolve(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "t h w C C2"], stride: int
) -> Float[Array, "B T2 H W C2"]:
    """3-D convolution: "valid" over time with `stride`, "same" over height and width.

    On accelerators this is XLA's 3-D convolution. On CPU its 2-D one is much the faster (the whole
    VAE: 1.7 times), so there a frame is the sum of its taps in time, one 2-D convolution each.
    """
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_convolve_frames, stride), default=partial(_convolve, stride)
    )


def _convolve(stride: int, x: Array, kernel: Array) -> Array:
    padding = [(0, 0), *((n // 2, n // 2) for n in kernel.shape[1:3])]
    return conv(x, kernel, strides=(stride, 1, 1), padding=padding)


def _convolve_frames(stride: int, x: Array, kernel: Array) -> Array:
    padding = [(n // 2, n // 2) for n in kernel.shape[1:3]]
    taps = kernel.shape[0]
    frames = [
        sum(conv(x[:, start + i], kernel[i], strides=(1, 1), padding=padding) for i in range(taps))
        for start in range(0, x.shape[1] - taps + 1, stride)
    ]
    return jnp.stack(frames, axis=1)


class CausalConv(nnx.Module):
    """3-D convolution of the VAE that sees no later frame."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: tuple[int, int, int] = (3, 3, 3),
        stride: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.precision = precision_of("vae", dtype)
        kernel = xavier_uniform(rngs.params(), (*size, d_in, d_out), self.precision.storage)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros(d_out, BIAS))

    def __call__(self, x: Float[Array, "B T H W C"], memory: Memory) -> Float[Array, "B T2 H W C2"]:
        kernel = self.kernel[...]
        x = memory.shown(x.astype(self.precision.compute))
        y = convolve(memory.prepend(x, kernel.shape[0] - self.stride), kernel, self.stride)
        return y + self.bias[...].astype(y.dtype)
