"""Adapters put into a model and taken out again, while the base stays where it lies.

A layer's adapters are joined along the rank, which is exactly their sum, with strength and alpha in
`up`: so other strengths are other numbers in the same program. The joined rank is filled up to a
multiple of 64 with zeros and never falls, and a layer that was adapted once keeps its slot, so that
most other adapters are other numbers too. Without any adapter all slots are empty: the base's own
program. What is changed as it stands (norms, biases, modulation) keeps its original on the host.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from wanjax.lora import (
    Adapter,
    Change,
    LayerAdapter,
    LoRA,
    adaptable,
    check_fits,
    layer_shape,
)
from wanjax.nn import Linear
from wanjax.placement import place

Shards = dict[str, np.ndarray]  # by the part of the array that each is
STEP = 64  # joined ranks are filled up to a multiple of it


class Slots:
    """What one model has in its slots. Put into the same model each time, or into one that was
    loaded anew from the same file."""

    def __init__(self) -> None:
        self._ranks: dict[str, int] = {}
        self._originals: dict[str, Shards] = {}

    def put(self, model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Leave in the model these adapters, each with a strength, and no others; in place.

        Raises `UserError`, before anything changes, for adapters of another model.
        """
        check_fits(model, loras)
        self._fill(model, loras)
        self._change(model, loras)

    def _fill(self, model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
        for name, layer in adaptable(model).items():
            found = [(lora.layers[name], s) for lora, s in loras if name in lora.layers]
            rank = sum(adapter.rank for adapter, _ in found)
            rank = max(-(-rank // STEP) * STEP, self._ranks.get(name, 0))
            if rank:
                self._ranks[name] = rank
            layer.lora = _joined(layer, found, rank) if loras and rank else None

    def _change(self, model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
        changes: dict[str, list[tuple[Change, float]]] = {}
        for lora, strength in loras:
            for name, change in lora.changes.items():
                changes.setdefault(name, []).append((change, strength))
        for name in {**self._originals, **changes}:
            variable = reduce(getattr, name.split("."), model)
            original = self._originals.pop(name, None) or _on_host(variable.get_value())
            _set_sum(variable, original, changes.get(name, []))
            if name in changes:
                self._originals[name] = original


def apply(model: nnx.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Put ready adapters, each with a strength, into a model, in place; `Slots` for more than once.

    Raises `UserError`, before anything changes, for adapters of another model.
    """
    Slots().put(model, loras)


def _joined(layer: Linear, found: Sequence[tuple[LayerAdapter, float]], rank: int) -> Adapter:
    """One adapter of `rank` that is the sum of those found, each with its strength."""
    count, d_in, d_out = layer_shape(layer)
    down = np.zeros((count, d_in, rank), np.float32)
    up = np.zeros((count, rank, d_out), np.float32)
    at = 0
    for adapter, strength in found:
        part = slice(at, at := at + adapter.rank)
        down[..., part], theirs = adapter.over(count)
        up[:, part] = theirs * np.float32(strength * adapter.scale)
    lead, mesh = layer.kernel.shape[:-2], _mesh_of(layer)
    down, up = down.reshape(*lead, d_in, rank), up.reshape(*lead, rank, d_out)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (down, up))
    joined = Adapter(*shapes, 1.0, layer.axes)
    place(down, joined.down, mesh)
    place(up, joined.up, mesh)
    return joined


def _mesh_of(layer: Linear) -> Mesh | None:
    """Where the layer lies; None stands for one device."""
    where = jax.tree.leaves(nnx.state(layer))[0].sharding
    return where.mesh if isinstance(where, NamedSharding) else None


def _on_host(array: jax.Array) -> Shards:
    """Copies of this process's shards, each once."""
    return {str(shard.index): np.array(shard.data) for shard in array.addressable_shards}


def _set_sum(
    variable: nnx.Variable, original: Shards, changes: Sequence[tuple[Change, float]]
) -> None:
    """Give a variable its original and all changes, summed in fp32 and rounded once."""
    array = variable.get_value()
    whole = [(change.over(array.shape[0]), np.float32(s)) for change, s in changes]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        here = original[str(index)]
        added = sum(strength * values[index] for values, strength in whole)
        return (here.astype(np.float32) + added).astype(here.dtype)

    variable.set_value(jax.make_array_from_callback(array.shape, array.sharding, read))
