"""The true programs of every job, at any size, from shapes alone.

Nothing is computed and no weight exists: networks are abstract, arrays are `ShapeDtypeStruct`s that
say where they would lie. What is traced here can be read as a jaxpr, or compiled for a chip that
is not there.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from wanjax.conditioning import encode_ids, encode_pixels
from wanjax.denoising import Branches, Rows, denoise_step, prepare_rows
from wanjax.models import NETWORKS, Config
from wanjax.models.dit import DiTConfig
from wanjax.models.vae import VAE, VAEConfig
from wanjax.quantisation import UNQUANTISED, Base
from wanjax.sharding import shardings, spec
from wanjax.solvers import Coefficients, State
from wanjax.training import TrainConfig, TrainState, make_optimizer, prepare_model, train_step
from wanjax.types import Batch, Condition
from wanjax.weights import abstract_network

Grid = tuple[int, int, int]
"""Latents (t, h, w)."""


@dataclass(frozen=True)
class Program:
    """A traced program and what it was given, arguments that it does not look at included."""

    traced: jax.stages.Traced
    given: tuple[Any, ...]

    def idle(self) -> int:
        """Bytes on one device of what is given and not looked at: weights of another program, which
        lie there all the same, and which a compiler does not count."""
        leaves = jax.tree.leaves(self.given)
        jaxpr = self.traced.jaxpr.jaxpr
        _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        return sum(bytes_of(x) for x, is_used in zip(leaves, used, strict=True) if not is_used)


def bytes_of(x: jax.ShapeDtypeStruct) -> int:
    """What an array takes on one device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * jnp.dtype(x.dtype).itemsize if _is_data(x) else 0


def _is_data(x: jax.ShapeDtypeStruct) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def denoise(
    config: DiTConfig,
    grid: Grid,
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    residual: str = "float32",
    base: Base = UNQUANTISED,
    branches: Branches = "together",
    guided: bool = True,
) -> Program:
    """One step of sampling one video."""
    dit = _network("dit", config, dtype, mesh, base)
    dit.residual = residual
    x = jax.ShapeDtypeStruct((1, *grid, config.out_channels), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    start = State(x, x, x, x), number, Coefficients(*[number] * len(Coefficients._fields))
    with on(mesh):
        told = (_condition(config, grid, 1),) * (1 + guided)
        rows = jax.eval_shape(prepare_rows, dit, told)
        rows = Rows(placed(rows.context, mesh, None, "batch"), placed(rows.condition, mesh))
        given = dit, *placed(start, mesh), rows, placed(number, mesh)
        return Program(denoise_step.trace(*given, guided=guided, branches=branches), given)


def train(
    config: DiTConfig, grid: Grid, settings: TrainConfig, mesh: Mesh | None = None
) -> Program:
    """One optimizer step as the settings say, over all the batches that it takes in turn."""

    def build():
        dtype = "float32" if settings.train == "full" else settings.dtype
        return prepare_model(abstract_network("dit", config, dtype, settings.base), settings)

    graph, trained, frozen = nnx.eval_shape(build)
    trained, frozen = placed_state(trained, mesh), placed_state(frozen, mesh)
    optimizer = make_optimizer(settings)
    batch = settings.batch
    latents = jax.ShapeDtypeStruct((batch, *grid, config.out_channels), jnp.bfloat16)
    examples = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((settings.accumulate, *x.shape), x.dtype),
        Batch(latents, _condition(config, grid, batch, jnp.bfloat16)),
    )
    step = placed(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    given = (
        TrainState(step, trained, _moments(optimizer, trained, mesh)),
        frozen,
        placed(examples, mesh, None, "batch"),
        placed(jax.eval_shape(lambda: jax.random.key(0)), mesh),
        placed(jax.ShapeDtypeStruct((), jnp.float32), mesh),
    )
    static = {"graph": graph, "optimizer": optimizer, "law": settings.timestep_law}
    with on(mesh):
        return Program(train_step.trace(*given, **static), given)


def _moments(optimizer, trained: nnx.State, mesh: Mesh | None):
    """The optimizer's state, which lies where its parameters lie."""
    moments = jax.eval_shape(optimizer.init, trained)
    if mesh is None:
        return moments

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return placed(leaf, mesh)
        if not hasattr(leaf.get_value(), "shape"):
            return leaf  # an optimizer of two parts leaves gaps in the state of each
        axes = leaf.get_metadata().get("axes") or ()
        return leaf.replace(placed(leaf.get_value(), mesh, *_leading(axes, leaf.shape)))

    return jax.tree.map(place, moments, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _leading(axes: tuple, shape: tuple[int, ...]) -> tuple:
    """Axes that name the trailing dimensions, with None for those before."""
    return (None,) * (len(shape) - len(axes)) + tuple(axes)


def encode(config: VAEConfig, video: tuple[int, int, int], mesh: Mesh | None = None) -> Program:
    """Latents of one video of (frames, height, width)."""
    return _vae(config, VAE._encode, (1, *video, 3), mesh)


def decode(config: VAEConfig, grid: Grid, mesh: Mesh | None = None) -> Program:
    """The video of one grid of latents."""
    return _vae(config, VAE._decode, (1, *grid, config.z_dim), mesh)


def _vae(config: VAEConfig, half: Callable, shape: tuple[int, ...], mesh: Mesh | None) -> Program:
    vae = _network("vae", config, jnp.bfloat16, mesh)
    given = vae, placed(jax.ShapeDtypeStruct(shape, jnp.float32), mesh)
    with on(mesh):
        return Program(half.trace(*given), given)


def text(config: Config, length: int, dtype: DTypeLike, mesh: Mesh | None = None) -> Program:
    """umT5's features of one prompt."""
    encoder = _network("text_encoder", config, dtype, mesh)
    ids = placed(jax.ShapeDtypeStruct((1, length), jnp.int32), mesh)
    with on(mesh):
        return Program(encode_ids.trace(encoder, ids, ids), (encoder, ids, ids))


def image(config: Config, pictures: int, dtype: DTypeLike, mesh: Mesh | None = None) -> Program:
    """CLIP's tokens of a picture or two."""
    encoder = _network("image_encoder", config, dtype, mesh)
    size = config.image_size
    given = encoder, placed(jax.ShapeDtypeStruct((pictures, size, size, 3), jnp.float32), mesh)
    with on(mesh):
        return Program(encode_pixels.trace(*given), given)


def _network(
    name: str, config: Config, dtype: DTypeLike, mesh: Mesh | None, base: Base = UNQUANTISED
) -> nnx.Module:
    assert name in NETWORKS
    graph, state = nnx.split(abstract_network(name, config, dtype, base))
    return nnx.merge(graph, placed_state(state, mesh))


def _condition(config: DiTConfig, grid: Grid, batch: int, dtype=jnp.float32) -> Condition:
    """What the denoiser is told beside the noisy latents: text, CLIP tokens, mask and pictures."""
    text = jax.ShapeDtypeStruct((batch, config.text_len, config.text_dim), dtype)
    if config.image_dim is None:
        return Condition(text)
    tokens = config.image_positions or 257
    image = jax.ShapeDtypeStruct((batch, tokens, config.image_dim), dtype)
    channels = config.in_channels - config.out_channels
    return Condition(text, image, jax.ShapeDtypeStruct((batch, *grid, channels), dtype))


def placed(tree: Any, mesh: Mesh | None, *axes: str | None) -> Any:
    """The tree's arrays as shapes; on a mesh each lies by `axes`, whole where there are none."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = axes + (None,) * (len(x.shape) - len(axes)) if axes else (None,) * len(x.shape)
        where = None if mesh is None else NamedSharding(mesh, spec(names, x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, tree)


def placed_state(state: nnx.State, mesh: Mesh | None) -> nnx.State:
    """A state's arrays as shapes, where its axes put them."""
    if mesh is None:
        return state
    where = shardings(state, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )


def on(mesh: Mesh | None):
    """The context in which programs are for a mesh's devices."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)
