"""Confidence intervals over few and unlike units, such as the shots of a film.

The unit is the shot: its windows are alike, so that they are drawn together, or averaged first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

DISTANCE_DRAWS = 500


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
    return Mean(float(values.mean()), *interval(values[rows].mean(1), confidence))


def bootstrap_distance(
    distance: Callable[..., float],
    sets: Sequence[Shaped[np.ndarray, "N ..."]],
    shots: Sequence[Sequence[str]],
    *,
    confidence: float = 0.95,
    draws: int = DISTANCE_DRAWS,
    seed: int = 0,
) -> Mean:
    """`distance` of whole sets of clips, and its interval. `shots` names the shot of every clip.

    Whole shots are drawn with replacement: the same ones of all sets, where the sets are of the
    same shots. Clips drawn twice make a set look narrower than it is, which moves every draw of a
    Fréchet distance; so the draws are moved back, their median onto the value. The interval is of
    this number of clips: a distance that would come out lower of more clips stays so.
    """
    value = distance(*sets)
    rng, rows = np.random.default_rng(seed), [_rows(labels) for labels in shots]
    drawn = [distance(*_drawn_anew(sets, rows, rng)) for _ in range(draws)]
    low, high = interval(np.asarray(drawn) - np.median(drawn) + value, confidence)
    return Mean(float(value), low, high)


def by_shot(
    values: Float[np.ndarray, " N"], shots: Sequence[str]
) -> tuple[list[str], Float[np.ndarray, " M"]]:
    """The shots, in the order of their names, and the mean of each one's values."""
    names = sorted(set(shots))
    labels = np.asarray(shots)
    means = [np.asarray(values, np.float64)[labels == name].mean() for name in names]
    return names, np.asarray(means)


def _drawn_anew(
    sets: Sequence[np.ndarray], rows: Sequence[Mapping[str, np.ndarray]], rng: np.random.Generator
) -> list[np.ndarray]:
    """Whole shots of each set, whose `rows` are given by shot."""
    names = [sorted(of_set) for of_set in rows]
    together = all(other == names[0] for other in names)
    choices = [rng.choice(len(names[0]), len(names[0]))] if together else []
    drawn = []
    for values, of_set, known in zip(sets, rows, names):
        choice = choices[0] if together else rng.choice(len(known), len(known))
        drawn.append(values[np.concatenate([of_set[known[i]] for i in choice])])
    return drawn


def _rows(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of every shot."""
    labels = np.asarray(labels)
    return {str(name): np.flatnonzero(labels == name) for name in np.unique(labels)}


def interval(draws: Float[np.ndarray, " N"], confidence: float) -> tuple[float, float]:
    """What holds the middle share `confidence` of the draws."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)
