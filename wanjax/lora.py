"""Low-rank adapters: `y = x W + (alpha/rank) (x A) B`, one slot in every `Linear`.

An adapter is a side path in a slot, its weights have a variable type of their own, and training is
a split by that type: the frozen base is an input that nothing differentiates. A `LoRA` is a set of
adapters apart from any model, as files hold it. Source: Hu et al., arXiv 2106.09685.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wanjax.errors import UserError, nearest
from wanjax.nn import Linear, linears
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
    stands for all blocks of the model, as training makes them.
    """

    down: Float[np.ndarray, "n C R"]
    up: Float[np.ndarray, "n R C2"]
    alpha: float
    blocks: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[-1]

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each block that is adapted."""
        return range(len(self.down)) if self.blocks is None else self.blocks

    def over(self, count: int) -> tuple[Float[np.ndarray, "m C R"], Float[np.ndarray, "m R C2"]]:
        """`down` and `up` in all `count` blocks of a model, zero where nothing is adapted."""
        if self.blocks is None:
            return self.down, self.up
        wholes = [np.zeros((count, *x.shape[1:]), x.dtype) for x in (self.down, self.up)]
        for whole, part in zip(wholes, (self.down, self.up)):
            whole[list(self.blocks)] = part
        return tuple(wholes)


@dataclass(frozen=True)
class LoRA:
    """Adapters by role (`cross_attn.q`, ...), with what is known of their making."""

    layers: Mapping[str, LayerAdapter]
    metadata: Mapping[str, str] = field(default_factory=dict)


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


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """`(graph, adapters, frozen)`; `nnx.merge(graph, adapters, frozen)` is the model again."""
    return nnx.split(model, LoRAParam, ...)


def extract(model: nnx.Module, metadata: Mapping[str, str] | None = None) -> LoRA:
    """The adapters of a model as a `LoRA`, on the host."""
    layers = {}
    for role, layer in linears(model):
        if layer.lora is not None:
            down, up = np.asarray(layer.lora.down[...]), np.asarray(layer.lora.up[...])
            layers[role] = LayerAdapter(down, up, layer.lora.scale * down.shape[-1])
    return LoRA(layers, metadata or {})


def apply(model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Put ready adapters, each with a strength, into the slots of a model, in place.

    Several adapters on one layer are joined along the rank, which is exactly their sum.
    """
    check_fits(model, loras)
    for role, layer in linears(model):
        found = [(lora.layers[role], strength) for lora, strength in loras if role in lora.layers]
        if found:
            pairs = [adapter.over(layer.kernel.shape[0]) for adapter, _ in found]
            scales = [strength * adapter.alpha / adapter.rank for adapter, strength in found]
            down = np.concatenate([down for down, _ in pairs], axis=-1)
            up = np.concatenate([up * s for (_, up), s in zip(pairs, scales)], axis=-2)
            down, up = (jnp.asarray(x, jnp.float32) for x in (down, up))
            layer.lora = Adapter(down, up, 1.0, layer.axes)


def merge(model: nnx.Module) -> None:
    """Add every adapter to its kernel (in fp32, rounded once) and empty the slots, in place.

    Raises `UserError` for a quantised base: codes would swallow most of a small change.
    """
    for role, layer in linears(model):
        if layer.lora is not None and isinstance(layer.kernel, QuantisedKernel):
            raise UserError(
                f"An adapter cannot be added to '{role}', whose base is quantised; merge it into "
                "the model as it was converted (base=bfloat16)."
            )
    for _, layer in linears(model):
        if layer.lora is not None:
            change = jnp.matmul(
                layer.lora.down[...], layer.lora.up[...], precision=jax.lax.Precision.HIGHEST
            )
            kernel = layer.kernel[...]
            merged = kernel.astype(jnp.float32) + layer.lora.scale * change
            layer.kernel[...] = merged.astype(kernel.dtype)
            layer.lora = None


def check_fits(model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Refuse adapters that were made for another model, naming what differs."""
    layers = dict(linears(model))
    for lora, _ in loras:
        if not lora.layers:
            raise UserError("The LoRA holds no adapter for any layer; check where it came from.")
        for role, adapter in lora.layers.items():
            _check_layer(role, adapter, layers)


def _check_layer(role: str, adapter: LayerAdapter, layers: Mapping[str, Linear]) -> None:
    if role not in layers:
        raise UserError(
            f"The LoRA was made for another model: it adapts '{role}', which this one has not"
            f"{nearest(role, layers)}"
        )
    count, d_in, d_out = layers[role].kernel.shape
    if adapter.blocks is not None and adapter.blocks[-1] >= count:
        raise UserError(
            f"The LoRA was made for another model: it adapts '{role}' in block "
            f"{adapter.blocks[-1]:,}, and this one has {count} blocks (0 to {count - 1})."
        )
    blocks = len(adapter.down) if adapter.blocks is None else count
    found = (blocks, adapter.down.shape[1], adapter.up.shape[-1])
    if found != (count, d_in, d_out):
        raise UserError(
            f"The LoRA was made for another model: its '{role}' is for {found[0]} blocks of "
            f"{found[1]} to {found[2]} channels, and this one has {count} of {d_in} to {d_out}."
        )


def require_finite(values: np.ndarray, name: str, where: PathLike) -> None:
    """Refuse what a run that diverged leaves behind, by the tensor's name."""
    if not np.isfinite(values).all():
        raise UserError(
            f"{where} holds NaN or infinity in '{name}': the run that made it diverged; use an "
            "earlier checkpoint of it (RUN@STEP), or another adapter."
        )
