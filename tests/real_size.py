"""The true programs of I2V-14B, its steps and its VAE, at full size, from shapes alone.

Nothing is computed and no weight exists: networks are abstract, arrays are `ShapeDtypeStruct`s that
say where they would lie. What is traced here can be read as a jaxpr, or compiled for a chip that
is not there.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.wire import collectives
from wanjax.denoising import Branches, Rows, denoise_step, prepare_rows
from wanjax.models.dit import DiT, DiTConfig
from wanjax.models.vae import VAE, VAEConfig
from wanjax.quantisation import UNQUANTISED, Base
from wanjax.sharding import make_mesh, shardings, spec
from wanjax.solvers import Coefficients, State
from wanjax.training import TrainConfig, TrainState, make_optimizer, prepare_model, train_step
from wanjax.types import Batch, Condition
from wanjax.weights import abstract_network

# Latents of the published sizes; a token is a patch of 1 x 2 x 2.
GRIDS = {
    "720p81": (21, 90, 160),
    "720p33": (9, 90, 160),
    "480p81": (21, 60, 104),
    "480p33": (9, 60, 104),
}
CONFIG = DiTConfig()
LORA = TrainConfig()


def tokens(size: str) -> int:
    t, h, w = GRIDS[size]
    return t * (h // 2) * (w // 2)


def placed(tree, mesh: Mesh | None, *axes: str | None):
    """The tree's arrays as shapes; on a mesh each lies by `axes`, whole where there are none."""

    def place(x):
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


def condition(size: str, batch: int, dtype=jnp.float32) -> Condition:
    """The inputs beside the noisy latents: text, CLIP tokens, mask and first frame."""
    text = jax.ShapeDtypeStruct((batch, CONFIG.text_len, CONFIG.text_dim), dtype)
    image = jax.ShapeDtypeStruct((batch, 257, CONFIG.image_dim), dtype)
    return Condition(text, image, jax.ShapeDtypeStruct((batch, *GRIDS[size], 20), dtype))


def trace_denoise_step(
    size: str,
    mesh: Mesh | None = None,
    *,
    config: DiTConfig = CONFIG,
    branches: Branches = "together",
    base: Base = UNQUANTISED,
) -> jax.stages.Traced:
    """One guided step in bf16."""
    graph, state = nnx.split(abstract_network("dit", config, jnp.bfloat16, base))
    dit: DiT = nnx.merge(graph, placed_state(state, mesh))
    x = jax.ShapeDtypeStruct((1, *GRIDS[size], 16), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    given = (State(x, x, x, x), number, Coefficients(*[number] * 9))
    with context(mesh):
        rows = jax.eval_shape(prepare_rows, dit, (condition(size, 1), condition(size, 1)))
        told = placed(rows.context, mesh, None, "batch"), placed(rows.condition, mesh)
        given = *placed(given, mesh), Rows(*told), placed(number, mesh)
        return denoise_step.trace(dit, *given, guided=True, branches=branches)


def trace_train_step(
    size: str,
    mesh: Mesh | None = None,
    *,
    batch: int = 1,
    settings: TrainConfig = LORA,
    config: DiTConfig = CONFIG,
) -> jax.stages.Traced:
    """One step of training adapters (or all weights) as the settings say."""

    def build():
        full = settings.train == "full"
        dtype = jnp.float32 if full or settings.dtype == "float32" else jnp.bfloat16
        return prepare_model(abstract_network("dit", config, dtype, settings.base), settings)

    graph, trained, frozen = nnx.eval_shape(build)
    trained, frozen = placed_state(trained, mesh), placed_state(frozen, mesh)
    optimizer = make_optimizer(settings)
    # Moments lie where their parameters lie.
    moments = jax.eval_shape(optimizer.init, trained)
    if mesh is not None:
        is_state = lambda x: isinstance(x, nnx.State)  # noqa: E731
        moments = jax.tree.map(
            lambda x: placed_state(x, mesh) if is_state(x) else placed(x, mesh),
            moments,
            is_leaf=is_state,
        )
    latents = jax.ShapeDtypeStruct((batch, *GRIDS[size], 16), jnp.bfloat16)
    examples = placed(Batch(latents, condition(size, batch, jnp.bfloat16)), mesh, "batch")
    step = placed(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    shift = placed(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    with context(mesh):
        return train_step.trace(
            TrainState(step, trained, moments),
            frozen,
            examples,
            key,
            shift,
            graph=graph,
            optimizer=optimizer,
            law=settings.timestep_law,
        )


def trace_vae(size: str, half: str, mesh: Mesh | None = None) -> jax.stages.Traced:
    """Encoding or decoding of one video (`half`: "encode", "decode")."""
    config = VAEConfig()
    graph, state = nnx.split(abstract_network("vae", config, jnp.bfloat16))
    vae: VAE = nnx.merge(graph, placed(state, mesh))
    t, h, w = GRIDS[size]
    time, height, width = config.stride
    shapes = {
        "encode": (1, time * (t - 1) + 1, height * h, width * w, 3),
        "decode": (1, t, h, w, config.z_dim),
    }
    given = placed(jax.ShapeDtypeStruct(shapes[half], jnp.float32), mesh)
    with context(mesh):
        return getattr(VAE, f"_{half}").trace(vae, given)


def context(mesh: Mesh | None):
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def main() -> None:
    """Print what each program would send on eight (virtual) devices, a JSON line a program."""
    mesh = make_mesh(data=2, ulysses=4)
    traced = {
        "denoise": trace_denoise_step("480p33", mesh),
        "lora": trace_train_step("480p33", mesh, batch=2),
    }
    for name in sys.argv[1:] or traced:
        text = traced[name].lower().compile().as_text()
        found = [(kind, shapes, times) for kind, shapes, _, times in collectives(text)]
        print(json.dumps({"program": name, "collectives": found}), flush=True)


if __name__ == "__main__":
    # The partitioned program is wanted, not good code for it.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
    main()
