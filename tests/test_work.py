"""The formulas of arithmetic against the published figures, and against a traced program."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.real_size import GRIDS
from wanjax import work
from wanjax.chips import CHIPS, chip_of
from wanjax.models.dit import DiTConfig
from wanjax.nn import conv
from wanjax.weights import abstract_network

CONFIG = DiTConfig()
PETA = 1e15


@pytest.mark.parametrize(
    ("size", "forward", "training"),
    [
        ("720p81", 6.540, (20.2, 22.1, 26.8)),
        ("720p33", 1.658, (4.66, 5.44, 6.33)),
        ("480p81", 1.686, (4.74, 5.54, 6.44)),
    ],
)
def test_real_sizes(size, forward, training):
    assert work.forward(CONFIG, GRIDS[size]).total / PETA == pytest.approx(forward, rel=1e-3)
    kinds = ("none", "save_attention", "full")
    found = [work.train_step(CONFIG, GRIDS[size], remat=remat) / PETA for remat in kinds]
    assert found == pytest.approx(training, rel=1e-2)


@pytest.mark.parametrize("image", [1280, None])
def test_a_traced_forward_pass_has_as_much(image):
    channels = 36 if image else 16
    config = DiTConfig(num_layers=3, image_dim=image, in_channels=channels)
    graph, state = nnx.split(abstract_network("dit", config, jnp.bfloat16))
    grid = (2, 32, 32)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
    told = [shape(1, config.text_len, config.text_dim)]
    told += [shape(1, 257, image), shape(1, *grid, 20)] if image else [None, None]
    call = lambda state, x, t, *told: nnx.merge(graph, state)(x, t, *told)  # noqa: E731
    jaxpr = jax.make_jaxpr(call)(state, shape(1, *grid, 16), shape(1), *told)
    assert work.forward(config, grid).total == pytest.approx(work.counted(jaxpr.jaxpr), rel=5e-3)


def test_chips_are_known_by_their_kinds():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("cpu") is None
    assert all(0 < chip.capacity < chip.memory for chip in CHIPS.values())


def test_convolutions_and_loops_are_counted():
    x = jax.ShapeDtypeStruct((1, 8, 10, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def run(x, kernel):
        again = lambda x, _: (x, conv(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))).sum())  # noqa: E731
        return jax.lax.scan(again, x, None, length=7)

    jaxpr = jax.make_jaxpr(run)(x, kernel)
    assert work.counted(jaxpr.jaxpr) == 7 * 2 * (3 * 3 * 3) * (8 * 10 * 5)
