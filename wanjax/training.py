"""Training: adapters (or all weights) by gradient descent on the flow-matching loss.

`train_step` is one pure function of the trained parameters, the frozen ones, a batch and the step's
number; all randomness is `fold_in(key, step)`. So a run that was killed and resumed equals one that
never stopped, bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from wanjax import lora
from wanjax.checkpoint import Checkpoints
from wanjax.errors import UserError
from wanjax.flow import draw, losses_at
from wanjax.models.dit import DiT
from wanjax.quantisation import UNQUANTISED, Base, check_base
from wanjax.remat import Remat, parse_remat
from wanjax.sharding import check_rows, constrain_state, one_device, shardings, spec
from wanjax.types import Batch


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's: cross-attention LoRA 8/16, AdamW at 3e-5."""

    train: Literal["lora", "full"] = "lora"
    """Adapters on a frozen base, or every weight (kept in fp32; for small models)."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float = 16.0
    """The adapters' change is scaled by alpha/rank."""
    targets: str = "paper"
    """paper (cross-attention), attention, qv, all, or roles such as self_attn.q,ffn.up."""
    steps: int = 1000
    """Optimizer steps in all; a run that has fewer goes on from its last checkpoint."""
    batch: int = 1
    """Windows at once."""
    accumulate: int = 1
    """Batches a step, one after the other; their mean gradient is that of one batch of all of
    them, in the memory of one."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices by Muon, all else by AdamW; on one device."""
    learning_rate: float = 3e-5
    """The optimizer's, after the warm-up; constant from there to the cool-down."""
    warmup: int = 20
    """Steps over which the learning rate rises from zero."""
    cooldown: int = 0
    """Last steps, over which the learning rate falls to zero; 0 for none."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    shift: float = 5.0
    """Wan's time shift: more than 1 trains more at high noise (5 for 720p, 3 for 480p)."""
    timestep_law: Literal["uniform", "logit_normal"] = "uniform"
    """Law of the time before the shift."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen weights and of the matrix products."""
    base: Base = UNQUANTISED
    """The frozen weights of the blocks in fewer bits: int8 and fp8 take half of the memory, nf4 a
    quarter, each with an error of its own (docs/precision.md); bfloat16 leaves them as --dtype
    says."""
    residual: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the residual stream. Every block's input is kept for its gradient: in bfloat16 that
    takes half the memory (13 of 27 GB for the 14B at 720p, 33 frames). With dtype float32 it is
    fp32 all the same."""
    remat: Remat | bool = "full"
    """What is computed again for the gradient instead of being kept. full (or True): each block;
    save_attention: each block but its self-attention, for twice the memory; offload: each block,
    its input kept in the host's memory; none (or False): nothing, for many times the memory."""
    seed: int = 0
    """Of the adapters, the noise and the order of the windows."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep: int = 3
    """Checkpoints to keep."""
    log_every: int = 1
    """Steps between lines of metrics."""
    validate_every: int = 0
    """Steps between losses on the validation split; 0 for never."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "remat", parse_remat(self.remat))


# What a resumed run may have otherwise than the run that it goes on from.
FREE_TO_CHANGE = frozenset(
    ["steps", "mesh", "checkpoint_every", "keep", "log_every", "validate_every"]
    + ["paths", "wanjax"]  # where things lay and by what they were made, for who reads it later
)


def free_to_change(config: TrainConfig) -> frozenset[str]:
    """A cool-down hangs on the number of steps, which then has to stay."""
    return FREE_TO_CHANGE - {"steps"} if config.cooldown else FREE_TO_CHANGE


_LEAST = {"rank": 1, "steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "cooldown": 0, "seed": 0}
_LEAST |= {"checkpoint_every": 1, "keep": 1, "log_every": 1, "validate_every": 0}
_MOST_SEED = (1 << 32) - 1
_POSITIVE = ("alpha", "learning_rate", "clip_norm", "shift")


def check_config(config: TrainConfig, mesh: Mesh | None = None) -> None:
    """Refuse, before any work, settings with which nothing could be trained."""
    for name, least in _LEAST.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"{name}={value} is too small; use {least} or more.")
    for name in _POSITIVE:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise UserError(f"{name}={value:g} is not a positive number; use one above zero.")
    if not 0 <= config.weight_decay < math.inf:
        raise UserError(f"weight_decay={config.weight_decay:g} is no decay; use 0 or more.")
    if config.seed > _MOST_SEED:
        raise UserError(f"seed={config.seed} is too large; use {_MOST_SEED} or less.")
    check_base(config.base)
    if config.train == "full" and config.base != UNQUANTISED:
        raise UserError(
            f"base={config.base} is of weights that are frozen, and train=full changes them all; "
            f"use base={UNQUANTISED}, or train=lora."
        )
    if config.warmup + config.cooldown > config.steps and config.cooldown:
        raise UserError(
            f"warmup={config.warmup} and cooldown={config.cooldown} do not fit into "
            f"steps={config.steps}; use fewer of them, or more steps."
        )
    if config.optimizer == "muon" and mesh is not None and mesh.size > 1:
        raise UserError("optimizer=muon runs on one device; leave the mesh out, or use adamw.")
    check_rows(config.batch, mesh, "A batch")


class TrainState(NamedTuple):
    """What changes from step to step; a checkpoint is this and the loader's position."""

    step: jax.Array
    params: nnx.State
    optimizer: optax.OptState


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon with a linear warm-up and cool-down, and clipping by global norm."""
    peak = config.learning_rate
    rise = optax.linear_schedule(peak / max(config.warmup, 1), peak, config.warmup)
    rate = rise
    if config.cooldown:
        fall = optax.linear_schedule(peak, 0.0, config.cooldown)
        rate = optax.join_schedules([rise, fall], [config.steps - config.cooldown])
    decay = config.weight_decay
    if config.optimizer == "muon":
        matrices = {"muon_weight_dimension_numbers": _matrices, "consistent_rms": 0.2}
        by = muon(rate, weight_decay=decay, adam_weight_decay=decay, **matrices)
    else:
        by = optax.adamw(rate, weight_decay=decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), by)


def _matrices(params: nnx.State) -> Any:
    """Which parameters are matrices to Muon (Jordan 2024), and over which axes: the kernels and
    adapters of the blocks, each layer of a stack on its own. With `consistent_rms` their steps are
    as large as AdamW's, and take the same learning rate (Liu et al., arXiv 2502.16982)."""

    def axes(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        inside = names[0] == "blocks" and names[-1] in ("kernel", "down", "up")
        return MuonDimensionNumbers(-2, -1) if inside else None

    return jax.tree_util.tree_map_with_path(axes, params)


def prepare_model(
    model: DiT, config: TrainConfig, initial: lora.LoRA | None = None
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graph, trained, frozen)`: adapters attached and split off, or all parameters. `initial`
    has the adapters' first weights (`lora.start_from`)."""
    model.remat, model.residual = config.remat, config.residual
    if config.train == "full":
        return nnx.split(model, nnx.Param, ...)
    rngs = nnx.Rngs(config.seed)
    lora.attach(model, rank=config.rank, alpha=config.alpha, targets=config.targets, rngs=rngs)
    if initial is not None:
        lora.start_from(model, initial)
    return lora.split(model)


def initial_train_state(
    trained: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Step 0; moments lie where their parameters lie.

    Every array is committed to its place, as a step's results are: else step 2 compiles again.
    """
    trained = jax.device_put(trained, shardings(trained, mesh))
    rest = NamedSharding(mesh, PartitionSpec())
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, rest), state)


@partial(jax.jit, static_argnames=("graph", "optimizer", "law"), donate_argnames="state")
def train_step(
    state: TrainState,
    frozen: nnx.State,
    batch: Batch,
    key: jax.Array,
    shift: Float[Array, ""],
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    law: str,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step over batches `N B ...` in turn; returns the new state, and the mean loss and its
    gradient's norm. Times and noise are those of one batch of `N*B`."""
    count, rows, *shape = batch.latents.shape
    drawn = draw(jax.random.fold_in(key, state.step), (count * rows, *shape), law=law, shift=shift)
    drawn = jax.tree.map(lambda x: x.reshape(count, rows, *x.shape[1:]), drawn)

    def loss_of(params: nnx.State, part: tuple) -> jax.Array:
        return losses_at(nnx.merge(graph, params, frozen), *part).mean()

    value_and_grad = partial(jax.value_and_grad(loss_of), state.params)
    loss, gradients = _mean(value_and_grad, (batch, *drawn), count)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return constrain_state(TrainState(state.step + 1, params, moments)), metrics


def _mean(of: Callable, parts: Any, count: int) -> Any:
    """The mean of `of(part)` over the parts along the first axis, one after the other."""
    if count == 1:
        return of(jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return constrain_state(jax.tree.map(jnp.add, total, of(part))), None

    like = jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts))
    nothing = constrain_state(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
    total, _ = jax.lax.scan(add, nothing, parts)
    return jax.tree.map(lambda x: x / count, total)


VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@partial(jax.jit, static_argnames="graph")
def validation_losses(
    params: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    windows: Int[Array, " B"],
    *,
    graph: nnx.GraphDef,
) -> Float[Array, " B"]:
    """Each window's mean loss at five fixed times, with noise that hangs on its number alone."""
    model = nnx.merge(graph, params, frozen)
    count, *shape = batch.latents.shape
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)  # noqa: E731
    noise = jax.vmap(draw)(windows)
    at = lambda t: losses_at(model, batch, jnp.full(count, t), noise)  # noqa: E731
    return jax.lax.map(at, jnp.asarray(VALIDATION_TIMES)).mean(0)


def in_rows(batches: Iterator[Batch], rows: int) -> Iterator[tuple[Batch, int]]:
    """The examples of `batches` in batches of `rows`, each with the number of those that are real:
    the last batch is filled up with its last example."""
    examples = (example for batch in batches for example in _examples(batch))
    while taken := list(islice(examples, rows)):
        full = taken + [taken[-1]] * (rows - len(taken))
        yield jax.tree.map(lambda *x: np.stack(x), *full), len(taken)


def _examples(batch: Batch) -> list[Batch]:
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.latents))]


def in_micro_batches(batch: Batch, count: int) -> Batch:
    """The rows of a host batch as `count` batches: `N*B ...` as `N B ...`."""
    rows = len(batch.latents)
    if rows % count:
        raise UserError(f"A batch of {rows} rows does not divide into accumulate={count} parts.")
    return jax.tree.map(lambda x: x.reshape(count, rows // count, *x.shape[1:]), batch)


def place_batch(batch: Batch, mesh: Mesh, axes: tuple[str | None, ...] = ("batch",)) -> Batch:
    """A host batch on the devices, its examples spread over the mesh's `data` axis; `axes` names
    its first axes."""
    check_rows(batch.latents.shape[axes.index("batch")], mesh, "A batch")

    def place(x: np.ndarray) -> jax.Array:
        names = axes + (None,) * (x.ndim - len(axes))
        return jax.device_put(x, NamedSharding(mesh, spec(names, x.shape, mesh)))

    return jax.tree.map(place, batch)


class Trainer:
    """A run in memory: the split model, the state, and the steps over them."""

    def __init__(
        self,
        model: DiT,
        config: TrainConfig,
        mesh: Mesh | None = None,
        initial: lora.LoRA | None = None,
    ):
        check_config(config, mesh)
        self.config = config
        self.mesh = one_device() if mesh is None else mesh
        self.graph, trained, self.frozen = prepare_model(model, config, initial)
        self.optimizer = make_optimizer(config)
        self.state = initial_train_state(trained, self.optimizer, self.mesh)
        self.step = 0
        self._key = jax.random.key(config.seed)

    def train(self, batch: Batch) -> dict[str, jax.Array]:
        """One optimizer step on a host batch, all `batch * accumulate` rows of it. Nothing here
        waits for the device."""
        parts = in_micro_batches(batch, self.config.accumulate)
        with self.on_mesh():
            self.state, metrics = train_step(
                self.state,
                self.frozen,
                place_batch(parts, self.mesh, (None, "batch")),
                self._key,
                np.float32(self.config.shift),
                graph=self.graph,
                optimizer=self.optimizer,
                law=self.config.timestep_law,
            )
        self.step += 1
        return metrics

    def validate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over windows at fixed times and noises; comparable from step to step, and the
        same on every mesh."""
        losses: list[float] = []
        rows = self.mesh.shape["data"]
        with self.on_mesh():
            for batch, real in in_rows(batches, rows):
                windows = np.arange(len(losses), len(losses) + rows, dtype=np.int32)
                placed = place_batch(batch, self.mesh)
                given = (self.state.params, self.frozen, placed, windows)
                losses += np.asarray(validation_losses(*given, graph=self.graph))[:real].tolist()
        return float(np.mean(losses))

    def model(self) -> DiT:
        """The model with its present parameters."""
        return nnx.merge(self.graph, self.state.params, self.frozen)

    def save(
        self,
        checkpoints: Checkpoints,
        loader: dict[str, Any],
        found: dict[str, float] | None = None,
    ) -> None:
        """Write a checkpoint; `found` is what validation gave at this step."""
        checkpoints.save(self.step, self.state, loader, found)

    def restore(self, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
        """Take up a checkpoint, on whatever mesh this run has; returns the loader's position."""
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        self.state = None  # not two of them at once
        self.state, loader = checkpoints.restore(step, like)
        self.step = step
        return loader

    def on_mesh(self):
        return jax.set_mesh(self.mesh)
