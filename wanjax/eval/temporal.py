"""Metrics of one video on its own: is it steady, does it move, do its colours stay?

None needs a reference, and none alone says that a video is good: a still picture flickers least.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8

from wanjax.errors import UserError
from wanjax.eval.pixels import Video, check_pixels

Flow = Float[np.ndarray, "H W 2"]
LEAST_SIDE = 16  # pixels: optical flow needs patches of 8


def flicker(video: Video) -> float:
    """Mean change of a pixel from frame to frame, in grey levels (0 to 255). It is what VBench
    (Huang et al. 2024, arXiv 2311.17982) takes from 255; motion raises it, too."""
    _check(video)
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in _neighbours(video)]
    return float(np.mean(steps))


def motion(video: Video) -> float:
    """Mean length of the optical flow (OpenCV's DIS), in percent of the height, a frame."""
    _check(video)
    lengths = [np.linalg.norm(_flow(*pair), axis=-1).mean() for pair in _neighbours(video)]
    return 100 * float(np.mean(lengths)) / video.shape[1]


def warping(video: Video) -> float:
    """Warping error (Lai et al. 2018, arXiv 1808.00449): mean squared difference, times 1000 of
    pixels in [0, 1], of a frame and the next one brought back along the optical flow, where the
    flow is not hidden. What moves as a whole costs nothing; what boils, or jumps, does."""
    _check(video)
    return 1000 * float(np.mean([_warped_error(*pair) for pair in _neighbours(video)]))


def drift(video: Video) -> float:
    """How far the mean colour wanders from the first frame's: the mean over the other frames of
    CIELAB's Delta E (1976), of which 2.3 is just noticeable (Mahy et al. 1994)."""
    from skimage.color import rgb2lab

    _check(video)
    colours = np.stack([rgb2lab(frame).mean((0, 1)) for frame in video])
    return float(np.linalg.norm(colours[1:] - colours[0], axis=-1).mean())


def _check(video: Video) -> None:
    check_pixels(video)
    if len(video) < 2 or min(video.shape[1:3]) < LEAST_SIDE:
        raise UserError(
            f"Temporal metrics need two frames or more of {LEAST_SIDE} pixels or more a side, and "
            f"got {list(video.shape)}."
        )


def _neighbours(video: Video) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], ...]]:
    return zip(video, video[1:])


def _warped_error(before: UInt8[np.ndarray, "H W 3"], after: UInt8[np.ndarray, "H W 3"]) -> float:
    forward, backward = _flow(before, after), _flow(after, before)
    warped = _along(forward, after.astype(np.float32) / 255)
    seen = ~_hidden(forward, _along(forward, backward))
    error = ((warped - before.astype(np.float32) / 255) ** 2).mean(-1)
    return float(error[seen].mean()) if seen.any() else float(error.mean())


def _hidden(forward: Flow, backward: Flow) -> np.ndarray:
    """Where there and back do not meet (Sundaram et al. 2010, the constants of Lai et al.)."""
    apart = ((forward + backward) ** 2).sum(-1)
    allowed = 0.01 * ((forward**2).sum(-1) + (backward**2).sum(-1)) + 0.5
    return apart > allowed


def _flow(before: UInt8[np.ndarray, "H W 3"], after: UInt8[np.ndarray, "H W 3"]) -> Flow:
    """Pixels (right, down) from `before` to `after`: Dense Inverse Search (Kroeger et al. 2016)."""
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = (cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in (before, after))
    return search.calc(*grey, None)


def _along(flow: Flow, picture: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W C"]:
    """The picture at the places that the flow points to, bilinear."""
    import cv2

    height, width = flow.shape[:2]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    at = (flow + np.stack([columns, rows], -1)).astype(np.float32)
    return cv2.remap(picture, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
