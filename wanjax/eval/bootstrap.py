"""Confidence intervals for means over few and unlike units, such as the shots of a film."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Mean(NamedTuple):
    """A mean and the interval that holds it with the given confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(
    values: Float[np.ndarray, " N"], *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Mean:
    """The mean of `values` and its percentile bootstrap interval (Efron 1979).

    Units are drawn anew with replacement; they must be independent, so windows of one shot are
    averaged first. Raises `ValueError` for no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values have the shape {values.shape}, not (N,) with N > 0")
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    means = values[rows].mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Mean(float(values.mean()), float(low), float(high))
