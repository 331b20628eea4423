"""Low-rank adapters: `y = x W + (alpha/rank) (x A) B`, one slot in every `Linear`.

An adapter is a side path in a slot, its weights have a variable type of their own, and training is
a split by that type: the frozen base is an input that nothing differentiates. A `LoRA` is a set of
adapters apart from any model, as files hold it; `wanjax.slots` puts them into a model and takes
them out. Source: Hu et al., arXiv 2106.09685.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wanjax.errors import UserError, nearest, some
from wanjax.nn import STACK, Linear, linears
from wanjax.precision import matmul_precision
from wanjax.quantisation import QuantisedKernel
from wanjax.types import PathLike

SELF = tuple(f"self_attn.{x}" for x in "qkvo")
CROSS = tuple(f"cross_attn.{x}" for x in "qkvo")
CROSS_IMAGE = ("cross_attn.k_img", "cross_attn.v_img")
FFN = ("ffn.up", "ffn.down")
TARGETS: dict[str, tuple[str, ...]] = {
    "paper": CROSS + CROSS_IMAGE,
    "attention": SELF + CROSS + CROSS_IMAGE,
    "qv": ("self_attn.q", "self_attn.v", "cross_attn.q", "cross_attn.v"),
    "all": SELF + CROSS + CROSS_IMAGE + FFN,
}


class LoRAParam(nnx.Param):
    """An adapter's weight: the only variables that LoRA training differentiates."""


class Adapter(nnx.Module):
    """The side path `scale * (x @ down) @ up`; weights fp32, products in the type of x."""

    def __init__(self, down: jax.Array, up: jax.Array, scale: float, axes: Sequence[str | None]):
        self.down = LoRAParam(down, axes=(axes[0], "rank"))
        self.up = LoRAParam(up, axes=("rank", axes[1]))
        self.scale = scale

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C2"]:
        precision = matmul_precision(x.dtype)
        low = jnp.matmul(x, self.down[...].astype(x.dtype), precision=precision)
        return jnp.matmul(low, self.up[...].astype(x.dtype), precision=precision) * self.scale


@dataclass(frozen=True)
class LayerAdapter:
    """One role's adapters in `n` blocks; the change of each weight is `alpha/R * down @ up`.

    `blocks` are the numbers of those blocks, ascending: the others are left as they are. None
    stands for all blocks of the model, as training makes them. Outside of the blocks n is 1.
    """

    down: Float[np.ndarray, "n C R"]
    up: Float[np.ndarray, "n R C2"]
    alpha: float
    blocks: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each block that is adapted."""
        return range(len(self.down)) if self.blocks is None else self.blocks

    def over(self, count: int) -> tuple[Float[np.ndarray, "m C R"], Float[np.ndarray, "m R C2"]]:
        """`down` and `up` in all `count` blocks of a model, zero where nothing is adapted."""
        return tuple(over(count, self.blocks, x) for x in (self.down, self.up))


@dataclass(frozen=True)
class Change:
    """What is added to a parameter as it stands: of a norm, a bias, a modulation, a whole kernel.

    Of a parameter of the stacked blocks `values` has `n` of them, by number in `blocks` (None: all,
    in order); of another it has that parameter's shape.
    """

    values: Float[np.ndarray, "..."]
    blocks: tuple[int, ...] | None = None

    def over(self, count: int) -> Float[np.ndarray, "..."]:
        """The values in all `count` blocks, zero where nothing changes."""
        return over(count, self.blocks, self.values)


def over(count: int, blocks: tuple[int, ...] | None, part: np.ndarray) -> np.ndarray:
    """What `part` has for some blocks, in all `count` of them; the others are zero."""
    if blocks is None:
        return part
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[list(blocks)] = part
    return whole


@dataclass(frozen=True)
class LoRA:
    """Adapters and changes apart from any model, with what is known of their making.

    `layers` are by role in a block (`cross_attn.q`) or, outside of the blocks, by name
    (`time_embed.up`); `changes` by the parameter's name (`blocks.cross_attn.norm_q.scale`).
    """

    layers: Mapping[str, LayerAdapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)


def content(lora: LoRA) -> Iterator[bytes]:
    """All that an adapter is, to tell it from another."""
    for name, adapter in sorted(lora.layers.items()):
        yield f"{name} {adapter.down.shape} {adapter.alpha} {adapter.numbers}".encode()
        yield from (np.ascontiguousarray(x).tobytes() for x in (adapter.down, adapter.up))
    for name, change in sorted(lora.changes.items()):
        yield f"{name} {change.values.shape} {change.blocks}".encode()
        yield np.ascontiguousarray(change.values).tobytes()


def in_a_block(name: str) -> bool:
    """Whether the layer of this name is one of every block, and its name a role."""
    return name in TARGETS["all"]


def adaptable(model: nnx.Module) -> dict[str, Linear]:
    """Every `Linear` by the name that a `LoRA` has for it."""
    return dict(linears(model)) | {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path[0] != STACK
    }


def layer_shape(layer: Linear) -> tuple[int, int, int]:
    """`n C C2` of a layer's kernel: a layer outside of the blocks is one."""
    return (1, *layer.kernel.shape)[-3:]


def select(model: nnx.Module, targets: str | Sequence[str]) -> dict[str, Linear]:
    """The layers that `targets` names: a preset of `TARGETS`, or a list of roles, all of which
    must exist. A preset leaves out the image roles in a model without an image branch."""
    layers = dict(linears(model))
    if isinstance(targets, str) and targets in TARGETS:
        return {role: layers[role] for role in TARGETS[targets] if role in layers}
    roles = targets.split(",") if isinstance(targets, str) else list(targets)
    for role in roles:
        if role not in layers:
            raise UserError(
                f"The LoRA target '{role}' matches no layer of this model"
                f"{nearest(role, [*layers, *TARGETS])}"
            )
    return {role: layers[role] for role in roles}


def attach(
    model: nnx.Module, *, rank: int, alpha: float, targets: str | Sequence[str], rngs: nnx.Rngs
) -> None:
    """Fill the slots of the targets, in place; `down` is random and `up` zero, so that at first
    the output does not change."""
    if rank < 1:
        raise UserError(f"A LoRA of rank {rank} has no weights; use a rank of 1 or more.")
    for layer in select(model, targets).values():
        *lead, d_in, d_out = layer.kernel.shape
        limit = d_in**-0.5
        shape = (*lead, d_in, rank)
        down = jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit)
        up = jnp.zeros((*lead, rank, d_out), jnp.float32)
        layer.lora = Adapter(down, up, alpha / rank, layer.axes)


def train_settings(lora: LoRA, where: str = "the adapter") -> dict[str, object]:
    """Rank, alpha and targets with which training goes on from an adapter.

    Raises `UserError`, with `where` in it, for one that training here could not have made.
    """
    outside = [*(name for name in lora.layers if not in_a_block(name)), *lora.changes]
    if outside or not lora.layers:
        raise UserError(
            f"Training goes on from adapters of the blocks only, and {where} "
            f"{'changes ' + some(outside) if outside else 'has none'}; use another adapter, or "
            "merge this one into the base with `python -m convert lora-merge`."
        )
    kinds = {(adapter.rank, adapter.scale) for adapter in lora.layers.values()}
    if len(kinds) > 1:
        most = max(rank for rank, _ in kinds)
        raise UserError(
            "Training goes on from adapters whose layers have one rank and one alpha, and "
            f"{where} has several; give it one with `python -m convert lora-resize --rank {most}`, "
            "which loses nothing."
        )
    ((rank, scale),) = kinds
    if scale <= 0:
        raise UserError(
            f"Training goes on from adapters with an alpha above zero, and {where} has "
            f"alpha={rank * scale:g}; use another adapter."
        )
    preset = [name for name, roles in TARGETS.items() if set(roles) == lora.layers.keys()]
    roles = ",".join(role for role in TARGETS["all"] if role in lora.layers)
    return {"rank": rank, "alpha": rank * scale, "targets": preset[0] if preset else roles}


def start_from(model: nnx.Module, lora: LoRA) -> None:
    """Give attached adapters the weights of a `LoRA` of the same rank and alpha, in place. Blocks
    that it does not adapt keep the fresh ones that they have, and so do ranks that were filled up:
    where `down` and `up` are zero, so is the gradient of both."""
    for role, layer in linears(model):
        if role in lora.layers:
            given = lora.layers[role]
            blocks = np.asarray(given.numbers)
            down, up = layer.lora.down, layer.lora.up
            filled = ~given.down.any(axis=-2) & ~given.up.any(axis=-1)
            fresh = down[...][blocks]
            first = jnp.where(filled[:, None, :], fresh, given.down)
            down[...] = down[...].at[blocks].set(first)
            up[...] = up[...].at[blocks].set(given.up)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graph, adapters, frozen)`; `nnx.merge(graph, adapters, frozen)` is the model again."""
    return nnx.split(model, LoRAParam, ...)


def extract(model: nnx.Module, metadata: Mapping[str, str] | None = None) -> LoRA:
    """The adapters of a model as a `LoRA`, on the host."""
    layers = {}
    for name, layer in adaptable(model).items():
        if layer.lora is not None:
            pair = (np.asarray(x[...]) for x in (layer.lora.down, layer.lora.up))
            down, up = (x.reshape(-1, *x.shape[-2:]) for x in pair)
            layers[name] = LayerAdapter(down, up, layer.lora.scale * down.shape[-1])
    return LoRA(layers, metadata or {})


def merge(model: nnx.Module) -> None:
    """Add every adapter to its kernel (in fp32, rounded once) and empty the slots, in place.

    Raises `UserError` for a quantised base: codes would swallow most of a small change.
    """
    layers = adaptable(model)
    for name, layer in layers.items():
        if layer.lora is not None and isinstance(layer.kernel, QuantisedKernel):
            raise UserError(
                f"An adapter cannot be added to '{name}', whose base is quantised; merge it into "
                "the model as it was converted (base=bfloat16)."
            )
    for layer in layers.values():
        if layer.lora is not None:
            change = jnp.matmul(
                layer.lora.down[...], layer.lora.up[...], precision=jax.lax.Precision.HIGHEST
            )
            kernel = layer.kernel[...]
            merged = kernel.astype(jnp.float32) + layer.lora.scale * change
            layer.kernel[...] = merged.astype(kernel.dtype)
            layer.lora = None


def matched(model: nnx.Module, lora: LoRA) -> str:
    """How many layers of a model an adapter that fits was matched with, in words."""
    layers = dict(linears(model))
    total = sum(layer_shape(layer)[0] for layer in layers.values())
    found = sum(len(lora.layers[name].numbers) for name in layers if name in lora.layers)
    others = len(lora.layers.keys() - layers.keys()) + len(lora.changes)
    beside = f", and {others} others" if others else ""
    return (
        f"{found:,} of {total:,} matrices of the blocks matched{beside}; {total - found:,} "
        "missing, none unmatched"
    )


def parameters_of(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Every variable by its name, such as `blocks.cross_attn.norm_q.scale`."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield ".".join(map(str, path)), variable


def check_fits(model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Refuse adapters that were made for another model, naming what differs."""
    layers, parameters = adaptable(model), dict(parameters_of(model))
    for lora, _ in loras:
        if not lora.layers and not lora.changes:
            raise UserError("The LoRA holds no adapter for any layer; check where it came from.")
        for name, adapter in lora.layers.items():
            _check_layer(name, adapter, layers)
        for name, change in lora.changes.items():
            _check_change(name, change, parameters)


def only_for(model: nnx.Module, lora: LoRA) -> tuple[LoRA, list[str]]:
    """The adapter without what this model has not, such as an image branch, and those names.
    What is left may still not fit."""
    layers, parameters = adaptable(model), {name for name, _ in parameters_of(model)}
    kept = {name: x for name, x in lora.layers.items() if name in layers}
    changes = {name: x for name, x in lora.changes.items() if name in parameters}
    out = (lora.layers.keys() - kept.keys()) | (lora.changes.keys() - changes.keys())
    return LoRA(kept, lora.metadata, changes), sorted(out)


def _check_layer(name: str, adapter: LayerAdapter, layers: Mapping[str, Linear]) -> None:
    if name not in layers:
        raise _of_another(f"it adapts '{name}', which this one has not", nearest(name, layers))
    count, d_in, d_out = layer_shape(layers[name])
    _check_blocks(name, adapter.blocks, count)
    blocks = len(adapter.down) if adapter.blocks is None else count
    found = (blocks, adapter.down.shape[1], adapter.up.shape[-1])
    if found != (count, d_in, d_out):
        raise _of_another(
            f"its '{name}' is for {found[0]} blocks of {found[1]} to {found[2]} channels, and this "
            f"one has {count} of {d_in} to {d_out}"
        )


def _check_change(name: str, change: Change, parameters: Mapping[str, nnx.Variable]) -> None:
    if f"{name}.codes" in parameters:
        raise UserError(
            f"The LoRA changes '{name}' as a whole (.diff), and its base is quantised, whose codes "
            "are never added to; use base=bfloat16."
        )
    if name not in parameters:
        raise _of_another(f"it changes '{name}', which this one has not", nearest(name, parameters))
    shape = tuple(parameters[name].shape)
    _check_blocks(name, change.blocks, shape[0])
    found = change.values.shape if change.blocks is None else (shape[0], *change.values.shape[1:])
    if found != shape:
        raise _of_another(f"its '{name}' has the shape {found}, and this one's has {shape}")


def _check_blocks(name: str, blocks: tuple[int, ...] | None, count: int) -> None:
    if blocks is not None and blocks[-1] >= count:
        raise _of_another(
            f"it adapts '{name}' in block {blocks[-1]:,}, and this one has {count} blocks "
            f"(0 to {count - 1})"
        )


def _of_another(difference: str, hint: str = ".") -> UserError:
    return UserError(f"The LoRA was made for another model: {difference}{hint}")


def require_finite(values: np.ndarray, name: str, where: PathLike) -> None:
    """Refuse what a run that diverged leaves behind, by the tensor's name."""
    if not np.isfinite(values).all():
        raise UserError(
            f"{where} holds NaN or infinity in '{name}': the run that made it diverged; use an "
            "earlier checkpoint of it (RUN@STEP), or another adapter."
        )
