"""Metrics of a video against the one that it should be, pixel by pixel.

A video is `T H W 3` in uint8, 0 to 255, here and in all of `wanjax.eval`: floats come in ranges of
0..1 and -1..1, which no metric could tell from a dark picture.
"""

import numpy as np
from jaxtyping import UInt8

from wanjax.errors import UserError

Video = UInt8[np.ndarray, "T H W 3"]
MOST_DECIBELS = 100.0
WINDOW = 11  # pixels of the window of SSIM: the least side of a picture


def check_pixels(frames: np.ndarray) -> None:
    """Raise `UserError` unless frames are `... H W 3` in uint8."""
    if frames.dtype != np.uint8 or frames.ndim < 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(
            f"Metrics take frames [T H W 3] of uint8, 0 to 255, and got {frames.dtype} "
            f"{list(frames.shape)}; multiply floats in [0, 1] by 255, round, and convert them."
        )


def psnr(video: Video, reference: Video) -> float:
    """Peak signal-to-noise ratio in decibels, of all pixels at once, up to 100: that is more than
    8 bits tell from equal, and a mean can be taken of it."""
    from skimage.metrics import peak_signal_noise_ratio

    check_pair(video, reference)
    if np.array_equal(video, reference):
        return MOST_DECIBELS
    return min(MOST_DECIBELS, float(peak_signal_noise_ratio(reference, video, data_range=255)))


def ssim(video: Video, reference: Video) -> float:
    """Structural similarity (Wang et al. 2004), with its Gaussian window of sigma 1.5, the mean
    over channels and frames; 1 for equal videos. Sides are at least 11 pixels."""
    from skimage.metrics import structural_similarity

    check_pair(video, reference)
    if min(video.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs sides of {WINDOW} pixels or more, not {video.shape[1:3]}.")
    values = [
        structural_similarity(
            *(a, b),
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(reference, video)
    ]
    return float(np.mean(values))


def first_frame(video: Video, reference: Video) -> float:
    """How faithful an image-to-video model is to its picture: SSIM of the first frames."""
    return ssim(video[:1], reference[:1])


def check_pair(video: Video, reference: Video) -> None:
    """Raise `UserError` unless both are uint8 and of one shape."""
    check_pixels(video)
    check_pixels(reference)
    if video.shape != reference.shape:
        raise UserError(
            f"Videos of {list(video.shape)} and {list(reference.shape)} cannot be compared frame "
            "by frame; bring them to one length and size."
        )
