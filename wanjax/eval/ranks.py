"""Which rank of adapter is best, and can the data tell? Runs of several ranks and seeds compared.

The unit is the training run: a rank that was trained once says nothing of ranks, however many
videos it made. Seeds that all ranks share are blocks, within which ranks could change places.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from wanjax.errors import UserError, some
from wanjax.eval.analysis import DISTANCES, distance_between
from wanjax.eval.bootstrap import Mean, by_shot
from wanjax.eval.measuring import Measured, Sets
from wanjax.eval.metrics import METRICS, Metric
from wanjax.eval.significance import LEVEL, PERMUTATIONS, REAL, holm, permutation_p

Runs = Mapping[str, tuple[int, int]]  # the rank and the seed of every set


@dataclass(frozen=True)
class RankFindings:
    """Of a metric: the values of each rank's runs, by seed; their mean with a 95 % interval (none
    of one run); the p-value of "rank makes no difference", the smallest that so few runs can give,
    both corrected for the number of metrics; and a sentence."""

    metric: str
    runs: Mapping[int, Mapping[int, float]]
    means: Mapping[int, Mean]
    p: float
    least: float
    verdict: str = ""


def parse_runs(texts: Sequence[str]) -> dict[str, tuple[int, int, str]]:
    """`4:0=DIR` as the label "4:0", with rank, seed and folder. Raises `UserError` for another
    form, a run that is given twice, and fewer than two ranks."""
    found: dict[str, tuple[int, int, str]] = {}
    for text in texts:
        label, _, folder = text.partition("=")
        rank, _, seed = label.partition(":")
        if not (folder and rank.isdecimal() and seed.isdecimal() and int(rank)):
            raise UserError(f"--runs '{text}' is not RANK:SEED=DIR, such as 8:0=out/rank8_seed0.")
        if label in found:
            raise UserError(f"The run {label} is given twice; leave one of them out.")
        found[label] = int(rank), int(seed), folder
    if len({rank for rank, _, _ in found.values()}) < 2:
        raise UserError("--runs has a single rank, with nothing to compare it with; give another.")
    return found


def study(
    metrics: Sequence[Metric], measured: Measured, sets: Sets, runs: Runs, seed: int = 0
) -> list[RankFindings]:
    """Every metric's values by rank, and whether they can be told apart."""
    found = [_of_metric(metric, measured, sets, runs, seed) for metric in metrics]
    corrected = holm([one.p for one in found])
    found = [
        replace(one, p=p, least=min(1.0, len(found) * one.least))
        for one, p in zip(found, corrected)
    ]
    return [replace(one, verdict=sentence(one)) for one in found]


def unlike_runs(metrics: Sequence[Metric], sets: Sets) -> list[str]:
    """A sentence for every metric of videos that leaves some out, as not all runs have them. Raises
    `UserError` where no video is common to all."""
    said = []
    for metric in metrics:
        if metric.name in DISTANCES:
            continue
        common, all_names = (_names(metric, sets, of) for of in (set.intersection, set.union))
        if not common:
            raise UserError(
                f"The runs have no video in common by name for {metric.name}, so that it would "
                "compare videos, not ranks; make the same ones with every run."
            )
        if left_out := sorted(all_names - common):
            said.append(
                f"{metric.name}: of {len(all_names)} videos the {len(common)} that all runs have; "
                f"left out: {some(left_out)}."
            )
    return said


def sentence(found: RankFindings) -> str:
    """What the numbers say of ranks, and no more."""
    ranks = ", ".join(map(str, found.runs))
    count = sum(map(len, found.runs.values()))
    if found.least > LEVEL:
        return (
            f"{found.metric}: too few runs to tell the ranks {ranks} apart: {count} runs give no p "
            f"below {found.least:.2g} here, whatever they show."
        )
    if found.p >= LEVEL:
        return (
            f"{found.metric}: the ranks {ranks} cannot be told apart by {count} runs "
            f"(p = {found.p:.3f})."
        )
    direction = METRICS[found.metric].direction
    ordered = sorted(found.means, key=lambda rank: found.means[rank].mean)
    end = f"the mean is lowest at rank {ordered[0]} and highest at rank {ordered[-1]}"
    if direction is not None:
        best = ordered[0] if direction == "lower" else ordered[-1]
        end = f"the best mean is that of rank {best}"
    return f"{found.metric}: the ranks {ranks} differ (p = {found.p:.3f}, {count} runs); {end}."


def rank_p(
    by_rank: Sequence[np.ndarray], *, blocks: bool, permutations: int = PERMUTATIONS, seed: int = 0
) -> float:
    """The p-value of "rank makes no difference" by the spread of the ranks' means. With `blocks`,
    run n of every rank is of one seed, and ranks change places within it alone. Exact for few."""
    means = lambda *groups: float(np.var([np.mean(group) for group in groups]))  # noqa: E731
    return permutation_p(means, by_rank, rows=blocks, permutations=permutations, seed=seed)


def smallest_rank_p(counts: Sequence[int], *, blocks: bool) -> float:
    """The least p-value that so many runs of each rank can give."""
    if blocks:
        return math.factorial(len(counts)) ** (1.0 - counts[0])
    arrangements = math.factorial(sum(counts)) / math.prod(map(math.factorial, counts))
    alike = math.prod(math.factorial(counts.count(count)) for count in set(counts))
    return min(1.0, alike / arrangements)


def student_mean(values: Sequence[float]) -> Mean:
    """The mean of runs and Student's 95 % interval; NaN for its ends with a single run."""
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Mean(mean, math.nan, math.nan)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Mean(mean, mean - half, mean + half)


def _of_metric(
    metric: Metric, measured: Measured, sets: Sets, runs: Runs, seed: int
) -> RankFindings:
    values: dict[int, dict[int, float]] = {}
    for label, (rank, of_seed) in sorted(runs.items(), key=lambda item: item[1]):
        values.setdefault(rank, {})[of_seed] = _value(metric, measured, sets, label)
    groups = [np.asarray(list(of.values())) for of in values.values()]
    blocks = len({tuple(of) for of in values.values()}) == 1
    p = rank_p(groups, blocks=blocks, seed=seed)
    least = smallest_rank_p([len(group) for group in groups], blocks=blocks)
    means = {rank: student_mean(list(of.values())) for rank, of in values.items()}
    return RankFindings(metric.name, values, means, p, least)


def _value(metric: Metric, measured: Measured, sets: Sets, label: str) -> float:
    """One run's value: its distance from the real videos, or the mean of its shots, of the videos
    that all runs have."""
    if metric.name in DISTANCES:
        distance = distance_between(metric.name, sets)
        return distance(measured.features(REAL), measured.features(label))
    scores = measured.scores(metric, label)
    names = sorted(_names(metric, sets, set.intersection))
    shots = [sets[label][name].shot for name in names]
    _, means = by_shot(np.asarray([scores[name] for name in names]), shots)
    return float(means.mean())


def _names(metric: Metric, sets: Sets, of: Callable[..., set[str]]) -> set[str]:
    """The names of the runs' videos that can have a score; `of` the runs' sets of them."""
    names = of(*(set(clips) for label, clips in sets.items() if label != REAL))
    return names & set(sets[REAL]) if metric.needs == "pairs" else names
