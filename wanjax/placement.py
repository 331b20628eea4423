"""From a file onto devices: an array as its variable wants it, or quantised on the way.

Each distinct shard is read once. What is quantised comes a layer at a time, so that of the numbers
neither the host nor a device ever holds more than one layer.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from wanjax.quantisation import Codes, QuantisedVariable, Scales, encode
from wanjax.sharding import spec


def sharding_of(variable: nnx.Variable, mesh: Mesh | None) -> Sharding:
    """Where a variable lies: by its axes on a mesh, else on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    axes = variable.get_metadata().get("axes") or ()
    return NamedSharding(mesh, spec(axes, variable.shape, mesh))


def place(view: np.ndarray, variable: nnx.Variable, mesh: Mesh | None) -> None:
    """Give the variable its value from `view`, in its own type, on its devices."""
    sharding = sharding_of(variable, mesh)
    shards: dict[str, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in shards:
            shards[str(index)] = view[index].astype(variable.dtype, order="C")
        return shards[str(index)]

    array = jax.make_array_from_callback(view.shape, sharding, read)
    variable.set_value(array.block_until_ready())  # so that no second leaf waits on the host


def place_quantised(
    view: np.ndarray, codes: QuantisedVariable, scales: QuantisedVariable, mesh: Mesh | None
) -> None:
    """Give codes and scales their values from `view`, the stacked kernel (`n C C2`)."""
    count, blocks, _, width = codes.shape
    like = (blocks, view.shape[1] // blocks, width)
    where = sharding_of(codes, mesh), sharding_of(scales, mesh)
    whole = tuple(
        jnp.zeros(variable.shape, variable.dtype, device=sharding)
        for variable, sharding in zip((codes, scales), where)
    )
    for i in range(count):
        layer = codes.replace(jax.ShapeDtypeStruct(like, view.dtype))
        place(view[i].reshape(like), layer, mesh)
        whole = jax.block_until_ready(_write_layer(*where)(*whole, layer[...], i))
    codes.set_value(whole[0])
    scales.set_value(whole[1])


@cache
def _write_layer(of_codes: Sharding, of_scales: Sharding):
    """The program that quantises layer `i` into the codes and scales of a stack, which are given up
    for it and stay where they lie."""

    def write(codes: Codes, scales: Scales, layer: Float[Array, "G B C2"], i: int):
        new = encode(layer, codes.dtype)
        update = jax.lax.dynamic_update_index_in_dim
        return update(codes, new[0], i, 0), update(scales, new[1], i, 0)

    return jax.jit(write, donate_argnums=(0, 1), out_shardings=(of_codes, of_scales))
