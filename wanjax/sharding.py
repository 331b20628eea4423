"""Where arrays live: logical axis names to mesh axes, through one table.

A parameter names its axes once (`nnx.Param(..., axes=("embed", "mlp"))`), activations name theirs
at the few places where they are constrained, and `RULES` says which mesh axes carry each name.
Stacked layers need nothing: names align with the *trailing* dimensions.
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wanjax.errors import UserError

SEQUENCE = ("ring", "ulysses")
AXES = ("data", *SEQUENCE)
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "tokens": SEQUENCE,
    "embed": AXES,
    "mlp": (),
    "rank": (),
}


def make_mesh(
    data: int = 1, ring: int = 1, ulysses: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh `data x ring x ulysses`, the last two for the sequence, in which neighbours are near.

    Raises `UserError` where there are fewer devices, and warns where there are more.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, ring, ulysses)
    wanted = math.prod(sizes)
    named = f"A mesh data={data} ring={ring} ulysses={ulysses}"
    if min(sizes) < 1 or wanted > len(devices):
        raise UserError(
            f"{named} needs {wanted} devices and there are {len(devices)}; "
            f"choose sizes whose product is {len(devices)}."
        )
    if wanted < len(devices):
        warnings.warn(f"{named} uses {wanted} of {len(devices)} devices.", stacklevel=2)
    auto, chosen = (AxisType.Auto,) * len(AXES), devices[:wanted]
    try:
        return jax.make_mesh(sizes, AXES, axis_types=auto, devices=chosen)
    except (
        NotImplementedError
    ):  # no axis of the chips' own grid has such a size: 2 x 4 x 8 of 8 x 8
        split = create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=auto)


def one_device() -> Mesh:
    """The mesh of the first local device: under a mesh a program knows for which chip it is."""
    return make_mesh(devices=jax.local_devices()[:1])


def check_heads(heads: int, ulysses: int) -> None:
    """Refuse a degree of Ulysses that does not divide the heads, naming the nearest that does."""
    if heads % ulysses:
        divisors = (d for d in range(1, heads + 1) if not heads % d)
        near = min(divisors, key=lambda d: abs(d - ulysses))
        raise UserError(
            f"ulysses={ulysses} does not divide the model's {heads} heads; use ulysses={near}, and "
            "ring for the rest."
        )


def check_rows(rows: int, mesh: Mesh | None, what: str) -> None:
    """Refuse a batch of `rows` that the mesh's `data` does not divide, naming what does."""
    ways = 1 if mesh is None else mesh.shape["data"]
    if rows % ways:
        near = max(d for d in range(1, rows + 1) if not rows % d and d <= ways)
        raise UserError(
            f"{what} has {rows} rows and they do not divide over data={ways}; use data={near}, and "
            "ring or ulysses for the rest."
        )


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


def fill(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Zeros at the end of an axis until the mesh divides it, where one is set."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[a] for a in RULES[name])
    missing = -x.shape[axis] % ways
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def whole(tree: Any) -> Any:
    """Gather every variable in `tree` on each device, here and once; its gradient is scattered to
    where the variable lies. Left to itself XLA may multiply piece by piece while weights go around,
    which sends more."""

    def gather(leaf: nnx.Variable | jax.Array) -> nnx.Variable | jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if not isinstance(leaf, nnx.Variable) or mesh.size <= 1:
            return leaf
        value = leaf[...]
        axes = leaf.get_metadata().get("axes") or ()
        return leaf.replace(_gathered(spec(axes, value.shape, mesh), value))

    return jax.tree.map(gather, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(home: PartitionSpec, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


_gathered.defvjp(
    lambda home, x: (_gathered(home, x), None),
    lambda home, _, change: (jax.lax.with_sharding_constraint(change, home),),
)


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
