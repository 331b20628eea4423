"""How far apart two sets of features lie, such as those of real and of generated videos.

All in float64 by NumPy: a set is small, and covariances of few features are of low rank.
"""

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "N C"]


def frechet(x: Features, y: Features) -> float:
    """The squared Fréchet distance of Gaussians of the mean and covariance of each set (Dowson &
    Landau 1982): |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)). FVD, where features are I3D's.

    With centred sets X and Y the trace of that root is the sum of the singular values of X Y', for
    tr (Cx Cy)^(1/2) = tr (Y X' X Y')^(1/2): always real, exact where covariances are of low rank,
    and no root of a rounding error. Raises `ValueError` for sets of fewer than two.
    """
    x, y = _pair(x, y)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = _spread(x - mean_x), _spread(y - mean_y)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = ((mean_x - mean_y) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root
    return max(0.0, float(distance))


def kernel_distance(x: Features, y: Features, *, paired: bool = False) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the kernel
    (x . y / C + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401). KVD, where features are I3D's.

    Its mean does not depend on the number of features, and is 0 for sets of one kind; so a value
    may be below 0. Where row n of both is of one shot (`paired`), these alike ones are left out, as
    each one's likeness to itself is (Gretton et al. 2012, lemma 6). Raises `ValueError` for sets of
    fewer than two.
    """
    x, y = _pair(x, y)
    inner = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = [_mean_off_diagonal(inner(a, a)) for a in (x, y)]
    across = inner(x, y)
    return float(sum(within) - 2 * (_mean_off_diagonal(across) if paired else across.mean()))


def _pair(x: Features, y: Features) -> tuple[Features, Features]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape} are not two sets of (N, C)")
    return x, y


def _spread(centred: Features) -> Features:
    """A matrix A with A' A the covariance, of as few rows as can be."""
    scaled = centred / np.sqrt(len(centred) - 1)
    return np.linalg.qr(scaled, mode="r") if len(scaled) > scaled.shape[1] else scaled


def _mean_off_diagonal(kernel: Float[np.ndarray, "N N"]) -> float:
    count = len(kernel)
    return (kernel.sum() - np.trace(kernel)) / (count * (count - 1))
