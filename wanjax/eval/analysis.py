"""From scores to statements: values with intervals, and which sets differ.

What is in pairs is tested in pairs: two sets whose videos have the same names. Every difference has
its interval, every p-value is corrected for the number of all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

import numpy as np

from wanjax.eval.bootstrap import Mean, bootstrap_distance, bootstrap_mean, by_shot
from wanjax.eval.distances import Features, frechet, kernel_distance
from wanjax.eval.measuring import Measured, Sets
from wanjax.eval.metrics import Metric
from wanjax.eval.significance import (
    REAL,
    Comparison,
    Statistic,
    frechet_infinity,
    holm,
    mean_difference,
    pooled_p,
    smallest_p,
    swap_p,
    verdict,
)
from wanjax.progress import progress_bar

DISTANCES = {"fvd": frechet, "kvd": kernel_distance}


def distance_between(name: str, sets: Sets) -> Callable[[Features, Features], float]:
    """The distance of this name; of pairs, where all sets have the same videos by name."""
    paired = all(sorted(clips) == sorted(sets[REAL]) for clips in sets.values())
    return partial(kernel_distance, paired=True) if name == "kvd" and paired else DISTANCES[name]


@dataclass(frozen=True)
class Value:
    """Of a set in a metric. `scores` by the video's name, where videos have scores of their own;
    `endless`: FVD extrapolated to endless sets."""

    value: Mean
    n: int
    shots: int
    scores: Mapping[str, float] = field(default_factory=dict)
    endless: float | None = None


@dataclass(frozen=True)
class Findings:
    """`values[metric][set]`, and the comparisons of sets, each with its sentence."""

    values: Mapping[str, Mapping[str, Value]]
    comparisons: Sequence[Comparison]
    verdicts: Sequence[str]


def analyse(metrics: Sequence[Metric], measured: Measured, sets: Sets, seed: int = 0) -> Findings:
    """All values and comparisons."""
    generated = [label for label in sets if label != REAL]
    pairs = list(combinations(generated, 2))
    values: dict[str, dict[str, Value]] = {}
    found: list[Comparison] = []
    with progress_bar("Comparing", len(metrics)) as bar:
        for metric in metrics:
            if metric.name in DISTANCES:
                study = _Sets(metric.name, measured, sets, seed)
                values[metric.name] = of = {label: study.value(label) for label in generated}
                found += [study.with_real(label, of[label].value) for label in generated]
                found += [study.compare(*pair) for pair in pairs]
            else:
                scores = {label: measured.scores(metric, label) for label in sets}
                scores = {label: of for label, of in scores.items() if of}
                values[metric.name] = {
                    k: _mean_value(of, sets[k], seed) for k, of in scores.items()
                }
                found += [
                    _compare_scores(metric.name, *pair, scores, sets, seed)
                    for pair in pairs
                    if set(pair) <= set(scores)
                ]
            bar.advance()
    corrected = holm([comparison.p for comparison in found])
    found = [
        replace(one, corrected=p, least=min(1.0, len(found) * one.least))
        for one, p in zip(found, corrected)
    ]
    directions = {metric.name: metric.direction for metric in metrics}
    return Findings(values, found, [verdict(one, directions[one.metric]) for one in found])


class _Sets:
    """Distances between sets of features."""

    def __init__(self, name: str, measured: Measured, sets: Sets, seed: int):
        self._name, self._distance, self._seed = name, distance_between(name, sets), seed
        self._features = {label: measured.features(label) for label in sets}
        self._shots = {label: [sets[label][n].shot for n in sorted(sets[label])] for label in sets}
        self._names = {label: sorted(sets[label]) for label in sets}

    def value(self, label: str) -> Value:
        x, y = self._features[REAL], self._features[label]
        shots = self._shots[REAL], self._shots[label]
        mean = bootstrap_distance(self._distance, (x, y), shots, seed=self._seed)
        endless = frechet_infinity(x, y, self._seed) if self._name == "fvd" else None
        if endless is not None and not np.isfinite(endless):
            endless = None
        return Value(mean, len(y), len(set(shots[1])), endless=endless)

    def with_real(self, label: str, value: Mean) -> Comparison:
        """Whether a set, of this value, can be told from the real one."""
        return self._comparison(REAL, label, self._distance, value)

    def compare(self, a: str, b: str) -> Comparison:
        """Whether one set is nearer to the real one than another."""
        real = self._features[REAL]
        apart = lambda r, x, y: self._distance(r, y) - self._distance(r, x)  # noqa: E731
        given = [self._features[label] for label in (REAL, a, b)]
        shots = [self._shots[label] for label in (REAL, a, b)]
        difference = bootstrap_distance(apart, given, shots, seed=self._seed)
        return self._comparison(a, b, lambda x, y: abs(apart(real, x, y)), difference)

    def _comparison(self, a: str, b: str, statistic: Statistic, difference: Mean) -> Comparison:
        x, y = self._features[a], self._features[b]
        shots = self._shots[a], self._shots[b]
        paired = self._names[a] == self._names[b]
        if paired:
            p = swap_p(statistic, x, y, shots[0], seed=self._seed)
        else:
            p = pooled_p(statistic, x, y, *shots, seed=self._seed)
        counts = [len(set(of)) for of in shots]
        least = smallest_p(*counts, paired=paired)
        return Comparison(self._name, a, b, difference, p, p, least, min(counts), paired)


def _mean_value(scores: Mapping[str, float], clips: Mapping, seed: int) -> Value:
    _, means = by_shot(np.asarray(list(scores.values())), [clips[name].shot for name in scores])
    return Value(bootstrap_mean(means, seed=seed), len(scores), len(means), scores)


def _compare_scores(
    name: str, a: str, b: str, scores: Mapping[str, Mapping[str, float]], sets: Sets, seed: int
) -> Comparison:
    """Two sets' scores; where they have videos of the same names, those of these alone."""
    common = sorted(set(scores[a]) & set(scores[b]))
    paired = bool(common)
    means = {}
    for label in (a, b):
        names = common or sorted(scores[label])
        shots = [sets[label][n].shot for n in names]
        _, means[label] = by_shot(np.asarray([scores[label][n] for n in names]), shots)
    x, y = means[a], means[b]
    units = [[str(i) for i in range(len(of))] for of in (x, y)]
    if paired:
        difference = bootstrap_mean(y - x, seed=seed)
        p = swap_p(mean_difference, x, y, units[0], seed=seed)
    else:
        apart = lambda first, second: float(second.mean() - first.mean())  # noqa: E731
        labels = [[f"{label} {unit}" for unit in of] for label, of in zip((a, b), units)]
        difference = bootstrap_distance(apart, (x, y), labels, draws=10_000, seed=seed)
        p = pooled_p(mean_difference, x, y, *units, seed=seed)
    least = smallest_p(len(x), len(y), paired=paired)
    rests_on = len(common) if paired and set(scores[a]) != set(scores[b]) else None
    fewest = min(len(x), len(y))
    return Comparison(name, a, b, difference, p, p, least, fewest, paired, rests_on)
