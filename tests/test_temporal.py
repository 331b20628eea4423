"""Temporal metrics on films whose answer is known: a still, a pan, a fade, a shuffle."""

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs OpenCV (extra [eval])")
pytest.importorskip("skimage", reason="needs scikit-image (extra [eval])")

from scipy.ndimage import gaussian_filter

from wanjax.errors import UserError
from wanjax.eval.temporal import drift, flicker, motion, warping

HEIGHT, WIDTH, FRAMES, SPEED = 96, 128, 8, 3


def texture() -> np.ndarray:
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH + SPEED * FRAMES, 3))
    soft = gaussian_filter(noise, (2, 2, 0))
    return (255 * (soft - soft.min()) / np.ptp(soft)).astype(np.uint8)


def pan() -> np.ndarray:
    """A camera that moves by SPEED pixels a frame."""
    wide = texture()
    return np.stack([wide[:, SPEED * k : SPEED * k + WIDTH] for k in range(FRAMES)])


def still() -> np.ndarray:
    return np.repeat(pan()[:1], FRAMES, 0)


def test_a_still_does_nothing():
    for measure in (flicker, motion, warping, drift):
        assert measure(still()) == pytest.approx(0, abs=1e-4), measure


def test_motion_is_the_speed_of_a_pan():
    assert motion(pan()) == pytest.approx(100 * SPEED / HEIGHT, rel=0.1)


def test_a_pan_warps_well_and_boiling_does_not():
    boiling = np.clip(pan() + np.random.default_rng(1).normal(0, 20, pan().shape), 0, 255)
    assert warping(pan()) < 0.1 * warping(boiling.astype(np.uint8))


def test_shuffled_frames_warp_worse_and_flicker_more():
    order = [0, 5, 2, 7, 1, 6, 3, 4]
    assert warping(pan()[order]) > 1.5 * warping(pan())
    assert flicker(pan()[order]) > 1.2 * flicker(pan())


def test_flicker_is_the_mean_change():
    black = np.zeros((4, 32, 32, 3), np.uint8)
    black[1::2] = 10
    assert flicker(black) == pytest.approx(10)


def test_drift_is_in_delta_e():
    """From black to white is 100 in CIELAB's lightness; the mean over the other frames counts."""
    fade = np.zeros((3, 32, 32, 3), np.uint8)
    fade[2] = 255
    assert drift(fade) == pytest.approx(50, abs=0.1)
    assert drift(pan()) < 2.3


@pytest.mark.parametrize("measure", [flicker, motion, warping, drift])
def test_one_frame_and_floats_are_refused(measure):
    with pytest.raises(UserError, match="two frames or more"):
        measure(still()[:1])
    with pytest.raises(UserError, match="uint8, 0 to 255"):
        measure(still() / 255)
