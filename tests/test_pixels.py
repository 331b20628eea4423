"""Pixel metrics against their formulas, and refusals."""

import numpy as np
import pytest

pytest.importorskip("skimage", reason="needs scikit-image (extra [eval])")

from wanjax.errors import UserError
from wanjax.eval.pixels import first_frame, psnr, ssim

RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (3, 24, 32, 3), np.uint8)


def noisy(video, sigma):
    return np.clip(video + RNG.normal(0, sigma, video.shape), 0, 255).round().astype(np.uint8)


def test_psnr_is_its_formula():
    other = noisy(VIDEO, 10)
    error = ((VIDEO.astype(float) - other) ** 2).mean()
    assert psnr(other, VIDEO) == pytest.approx(10 * np.log10(255**2 / error), rel=1e-9)
    assert psnr(VIDEO, VIDEO) == 100


def test_ssim_of_a_constant_shift_is_its_formula():
    """Of two flat pictures only the luminance term is left."""
    a, b = (np.full((1, 16, 16, 3), value, np.uint8) for value in (100, 120))
    c = (0.01 * 255) ** 2
    meant = (2 * 100 * 120 + c) / (100**2 + 120**2 + c)
    assert ssim(a, b) == pytest.approx(meant, rel=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_more_noise_is_worse(measure):
    smooth = np.broadcast_to(np.linspace(0, 255, 32)[:, None], (2, 24, 32, 3)).astype(np.uint8)
    values = [measure(noisy(smooth, sigma), smooth) for sigma in (2, 10, 40)]
    assert values == sorted(values, reverse=True)
    assert ssim(smooth, smooth) == pytest.approx(1)


def test_the_first_frame_alone_counts():
    other = VIDEO.copy()
    other[1:] = 0
    assert first_frame(other, VIDEO) == pytest.approx(1)
    assert first_frame(noisy(VIDEO, 60), VIDEO) < 0.95


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize("wrong", [VIDEO / 255, VIDEO.astype(np.float32), VIDEO[0], VIDEO[..., :1]])
def test_other_ranges_and_shapes_are_refused(measure, wrong):
    with pytest.raises(UserError, match="uint8, 0 to 255"):
        measure(wrong, VIDEO)


def test_unequal_videos_are_refused():
    with pytest.raises(UserError, match="cannot be compared"):
        psnr(VIDEO[:2], VIDEO)
    with pytest.raises(UserError, match="11 pixels"):
        ssim(VIDEO[:, :8], VIDEO[:, :8])
