"""How far raters agree: Krippendorff's alpha."""

from typing import Literal

import numpy as np
from jaxtyping import Float

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff(ratings: Float[np.ndarray, "R N"], level: Level) -> float:
    """Krippendorff's alpha of R raters over N things; NaN where one did not rate.

    1: they agree wholly; 0: as by chance; NaN where nothing can be said, which is with one rater,
    or where all ratings are the same. Source: Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability".
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    # Per thing, how many gave each value; who rated alone cannot be paired.
    counts = np.stack([(ratings == value).sum(0) for value in values], 1).astype(float)
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return float("nan")
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= np.eye(len(values)) * counts[:, :, None]
    observed = (pairs / (counts.sum(1) - 1)[:, None, None]).sum(0)
    totals = observed.sum(0)
    expected = np.outer(totals, totals) - np.diag(totals)
    distance = _distances(values, totals, level)
    by_chance = (expected * distance).sum() / (totals.sum() - 1)
    if by_chance == 0:
        return float("nan")
    return float(1 - (observed * distance).sum() / by_chance)


def _distances(
    values: Float[np.ndarray, " V"], totals: Float[np.ndarray, " V"], level: Level
) -> Float[np.ndarray, "V V"]:
    """Squared distances between values."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    # On an ordinal scale two values are as far apart as there are ratings between them.
    place = values if level == "interval" else np.cumsum(totals) - totals / 2
    return (place[:, None] - place[None]) ** 2
