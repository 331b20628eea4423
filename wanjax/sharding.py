"""Where arrays live: logical axis names to mesh axes, through one table.

A parameter names its axes once (`nnx.Param(..., axes=("embed", "mlp"))`), activations name theirs
at the few places where they are constrained, and `RULES` says which mesh axes carry each name.
Stacked layers need nothing: names align with the *trailing* dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wanjax.errors import UserError

SEQUENCE = ("ring", "ulysses")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "tokens": SEQUENCE,
    "embed": ("data", *SEQUENCE),
    "mlp": (),
    "rank": (),
}


def make_mesh(
    data: int = 1, ring: int = 1, ulysses: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh `data x ring x ulysses`, the last two for the sequence; refuses what does not fit."""
    devices = jax.devices() if devices is None else list(devices)
    wanted = data * ring * ulysses
    if wanted < 1 or len(devices) % wanted or wanted > len(devices):
        raise UserError(
            f"A mesh data={data} ring={ring} ulysses={ulysses} needs {wanted} devices and "
            f"there are {len(devices)}; choose sizes whose product divides {len(devices)}."
        )
    grid = np.asarray(devices[:wanted]).reshape(data, ring, ulysses)
    return Mesh(grid, ("data", *SEQUENCE), axis_types=(AxisType.Auto,) * 3)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Mesh axes for `shape`, whose trailing dimensions carry the names in `axes`.

    A dimension that its mesh axes do not divide stays whole: a weight of odd width is replicated
    rather than refused, since that changes memory and never the result. Mesh axes of size 1 and
    trailing Nones are left out, as XLA leaves them out of what it returns: so that an array which
    went through a program still has a spec equal to its first.
    """
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        where = tuple(a for a in RULES[name] if mesh.shape[a] > 1) if name else ()
        divides = where and size % math.prod(mesh.shape[a] for a in where) == 0
        entries.append(None if not divides else where if len(where) > 1 else where[0])
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """A `NamedSharding` for every variable of `state`, from the axes that it names."""

    def place(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes") or ()
        return variable.replace(NamedSharding(mesh, spec(axes, variable.shape, mesh)))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation inside a compiled program; nothing happens outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


PictureAxes = tuple[tuple[str, ...], tuple[str, ...]]


def picture_axes(height: int, width: int) -> PictureAxes:
    """The mesh axes that split the height and the width of pictures, in units that must stay whole
    (latents, for a VAE): every axis goes to the width if it divides it, else to the height, else to
    neither, and those devices do the same work."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, columns = [], []
    for axis in () if mesh.empty else mesh.axis_names:
        size = mesh.shape[axis]
        if size > 1 and width % size == 0:
            width //= size
            columns.append(axis)
        elif size > 1 and height % size == 0:
            height //= size
            rows.append(axis)
    return tuple(rows), tuple(columns)


def split_picture(x: jax.Array, axes: PictureAxes = ((), ())) -> jax.Array:
    """Constrain `B T H W C` to be split by `axes`, or to be whole on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    rows, columns = axes
    entries = PartitionSpec(None, None, rows or None, columns or None, None)
    return jax.lax.with_sharding_constraint(x, entries)


def constrain_state(tree: Any) -> Any:
    """Constrain every variable in `tree` by the axes that it names, and other arrays to be whole on
    each device: where a state goes into a compiled step and comes out of it, it must stay where it
    was, or the next step is another program."""

    def hold(leaf: nnx.Variable | jax.Array) -> nnx.Variable | jax.Array:
        if not isinstance(leaf, nnx.Variable):
            return constrain(leaf, *[None] * leaf.ndim)
        if not isinstance(leaf.get_value(), jax.Array):
            return leaf  # an optimizer of two parts leaves gaps in the state of each
        axes = leaf.get_metadata().get("axes") or ()
        return leaf.replace(constrain(leaf[...], *axes))

    return jax.tree.map(hold, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
