"""How much arithmetic the denoiser takes, by formula: no program is compiled for it.

One multiplication and addition are two FLOP. A forward pass of `N` video tokens has, in each
block, `2N (6 D^2 + 2 D F)` for its matrices, `4 N^2 D` for self-attention and `4 N (L+S) D` for
cross-attention; the keys and values of text and image are computed once for a video. Adapters,
norms and embeddings of time are left out: together less than a hundredth.
"""

from dataclasses import dataclass
from math import prod

from jax.extend.core import Jaxpr, jaxprs_in_params

from wanjax.models.dit import DiTConfig

BACKWARD_OF_ATTENTION = 2.5
"""Products in the gradient of attention for each one in it: scores again, and four more for two."""


@dataclass(frozen=True)
class Forward:
    """FLOP of one forward pass over one video, by kind."""

    matrices: float
    attention: float
    cross_attention: float
    context: float

    @property
    def total(self) -> float:
        """All of it, the context included."""
        return self.matrices + self.attention + self.cross_attention + self.context


def tokens(config: DiTConfig, latents: tuple[int, int, int]) -> int:
    """Tokens of a grid of latents (t, h, w)."""
    return prod(n // p for n, p in zip(latents, config.patch_size, strict=True))


def forward(config: DiTConfig, latents: tuple[int, int, int]) -> Forward:
    """One forward pass over latents of this grid (t, h, w)."""
    n, d, blocks = tokens(config, latents), config.dim, config.num_layers
    patch = prod(config.patch_size)
    ends = 2 * n * d * patch * (config.in_channels + config.out_channels)
    words = config.text_len + _image_tokens(config)
    embed = 2 * config.text_len * d * (config.text_dim + d)
    embed += 2 * _image_tokens(config) * (config.image_dim or 0) * ((config.image_dim or 0) + d)
    return Forward(
        matrices=blocks * 2 * n * (6 * d * d + 2 * d * config.ffn_dim) + ends,
        attention=blocks * 4 * n * n * d,
        cross_attention=blocks * 4 * n * words * d,
        context=blocks * 4 * words * d * d + embed,
    )


def _image_tokens(config: DiTConfig) -> int:
    return 0 if config.image_dim is None else config.image_positions or 257


def denoise_step(config: DiTConfig, latents: tuple[int, int, int], *, guided: bool) -> float:
    """FLOP of a step of sampling; the context has been computed before."""
    once = forward(config, latents)
    return (once.total - once.context) * (1 + guided)


def train_step(
    config: DiTConfig,
    latents: tuple[int, int, int],
    *,
    windows: int = 1,
    remat: str = "none",
    full: bool = False,
) -> float:
    """FLOP of a training step over `windows` windows. `remat` says what is computed again for the
    gradient (`none`: the model's own work, which speed is measured by); `full` trains all weights
    and so has a second product behind each matrix."""
    once = forward(config, latents)
    attention = once.attention + once.cross_attention
    work = once.total + (1 + full) * (once.matrices + once.context)
    work += BACKWARD_OF_ATTENTION * attention
    again = {
        "none": 0.0,
        "save_attention": once.matrices + once.cross_attention,
        "full": once.matrices + attention,
        "offload": once.matrices + attention,
    }[remat]
    return windows * (work + again)


def counted(jaxpr: Jaxpr) -> float:
    """FLOP of every product and convolution in a traced program, bodies of scans as often as they
    run: for networks that have no formula here."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            inner = prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = equation.invars[1].aval
            inner = kernel.size // kernel.shape[outputs]
            total += 2 * inner * equation.outvars[0].aval.size
        times = equation.params.get("length", 1)
        inside = [counted(inner) for inner in jaxprs_in_params(equation.params)]
        alternatives = equation.primitive.name in ("cond", "platform_index")
        total += times * (max(inside, default=0) if alternatives else sum(inside))
    return total


def traffic(config: DiTConfig, latents: tuple[int, int, int], *, rows: int, passes: int) -> float:
    """Bytes of activations that `passes` passes over the blocks must read or write for `rows`
    videos: 2 for each number that a matrix reads or writes, and 4 for the residual stream, three
    times a block, with its norms. Weights are not in it."""
    n, d = tokens(config, latents), config.dim
    in_block = 2 * (14 * d + 2 * config.ffn_dim) + 3 * 10 * d
    return float(rows * passes * config.num_layers * n * in_block)
