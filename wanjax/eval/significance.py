"""Is one set of videos other than another? p-values, and what may be said of them in words.

The unit is the shot, as in `wanjax.eval.bootstrap`. Permutations are SciPy's, the correction for
many comparisons statsmodels' (extra `[eval]`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from wanjax.errors import UserError
from wanjax.eval.bootstrap import Mean
from wanjax.eval.distances import Features, frechet

LEVEL = 0.05
REAL = "real"  # the name of the set that all others are compared with
PERMUTATIONS = 999
LEAST_ENDLESS = 100  # clips from which a distance is extrapolated
SIZES = 8  # at which the distance is taken to be extrapolated
REPEATS = 5  # of each

Direction = Literal["lower", "higher"] | None
Statistic = Callable[[np.ndarray, np.ndarray], float]


def permutation_p(
    statistic: Callable[..., float],
    groups: Sequence[Shaped[np.ndarray, " N"]],
    *,
    rows: bool,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """The p-value of "the groups are alike": with `rows`, members change groups within row n of all
    alone, else freely. Exact where there are few enough ways.

    `statistic` must not depend on the order of the groups.
    """
    from scipy.stats import permutation_test

    if min(map(len, groups)) < 2:  # which SciPy refuses
        # Within a single row groups only change names.
        return 1.0 if rows else _lone_p(statistic, groups, permutations, seed)
    found = permutation_test(
        tuple(groups),
        statistic,
        permutation_type="samples" if rows else "independent",
        alternative="greater",
        vectorized=False,
        n_resamples=permutations,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def swap_p(
    statistic: Statistic,
    a: Shaped[np.ndarray, "N ..."],
    b: Shaped[np.ndarray, "N ..."],
    shots: Sequence[str],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """The p-value of "A equals B" for clips in pairs: row n of `a` and of `b` are of one prompt and
    seed, or of one shot. Under it the two of a pair could be swapped; all pairs of a shot are.

    `statistic` is larger the less alike two sets are. Exact where there are few enough swaps.
    """
    if len(a) != len(b) or len(a) != len(shots):
        raise ValueError(f"{len(a)} and {len(b)} clips of {len(shots)} shots are no pairs")
    names, which = np.unique(np.asarray(shots), return_inverse=True)
    both = np.stack([a, b])
    rows = np.arange(len(a))

    def of(first: np.ndarray, _: np.ndarray) -> float:
        chosen = first[which]
        return statistic(both[chosen, rows], both[1 - chosen, rows])

    sides = np.zeros(len(names), int), np.ones(len(names), int)
    return permutation_p(of, sides, rows=True, permutations=permutations, seed=seed)


def pooled_p(
    statistic: Statistic,
    a: Shaped[np.ndarray, "N ..."],
    b: Shaped[np.ndarray, "M ..."],
    shots_a: Sequence[str],
    shots_b: Sequence[str],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """The p-value of "A equals B" for clips that are not in pairs: under it any shot could have
    come from either set. `statistic` is larger the less alike two sets are."""
    both = np.concatenate([a, b])
    of_a, of_b = _units(shots_a, 0), _units(shots_b, len(a))
    units = [*of_a, *of_b]

    def of(first: np.ndarray, second: np.ndarray) -> float:
        rows = (np.concatenate([units[i] for i in chosen]) for chosen in (first, second))
        return statistic(*(both[chosen] for chosen in rows))

    groups = np.arange(len(of_a)), len(of_a) + np.arange(len(of_b))
    return permutation_p(of, groups, rows=False, permutations=permutations, seed=seed)


def mean_difference(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " M"]) -> float:
    """The statistic for scores of clips: how far their means are apart."""
    return abs(float(np.mean(a) - np.mean(b)))


def smallest_p(shots_a: int, shots_b: int, *, paired: bool) -> float:
    """The least p-value that so few shots can give: that of the most extreme permutation."""
    from scipy.special import comb

    if paired:
        return 2.0 ** (1 - shots_a)
    alike = 2 if shots_a == shots_b else 1  # only sets of one size can change places as wholes
    return min(1.0, alike / comb(shots_a + shots_b, shots_a))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def require_equal(counts: dict[str, int], drawn: int | None = None) -> int:
    """The number of clips that every set gives to a comparison of sets: all, which have to be
    equally many, or `drawn`. Raises `UserError`, naming the sets: a Fréchet distance falls with the
    number of clips, so that unequal sets cannot be compared."""
    fewest = min(counts, key=lambda name: counts[name])
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    if drawn is None and len(set(counts.values())) > 1:
        raise UserError(
            f"The sets have unequal numbers of clips ({listed}), on which FVD and KVD depend; draw "
            f"as many of each with --equal-n {counts[fewest]}, or even them out."
        )
    if drawn is not None and not 2 <= drawn <= counts[fewest]:
        raise UserError(
            f"--equal-n {drawn} does not lie between 2 and the {counts[fewest]} clips of {fewest}."
        )
    if counts[fewest] < 2:
        raise UserError(f"{fewest} has one clip, of which there is no distribution; use 2 or more.")
    return counts[fewest] if drawn is None else drawn


def frechet_infinity(x: Features, y: Features, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to endless sets (Chong & Forsyth 2020, arXiv 1911.07023):
    the value at 0 of a line through distances of subsets over 1 / size, from half of all up.

    The line is a good one for more clips than features have dimensions; below, it is a hint, and
    NaN below 100: of 16 clips it went as far as under 0."""
    rng = np.random.default_rng(seed)
    most = min(len(x), len(y))
    sizes = np.unique(np.linspace(max(2, most // 2), most, SIZES).astype(int))
    if most < LEAST_ENDLESS:
        return float("nan")
    subset = lambda z, n: z[rng.choice(len(z), n, replace=False)]  # noqa: E731
    means = [np.mean([frechet(subset(x, n), subset(y, n)) for _ in range(REPEATS)]) for n in sizes]
    return float(np.polyfit(1 / sizes, means, 1)[1])


@dataclass(frozen=True)
class Comparison:
    """Of two sets in one metric: B's value less A's, its interval, and p-values before and after
    the correction for many comparisons. `least` is the smallest corrected p that so few shots can
    give; `common` the number of videos that both have, where the comparison leaves others out."""

    metric: str
    a: str
    b: str
    difference: Mean
    p: float
    corrected: float
    least: float
    shots: int
    paired: bool
    common: int | None = None


def verdict(found: Comparison, direction: Direction) -> str:
    """One sentence, which says no more than the numbers do."""
    said = _verdict_on_real(found) if found.a == REAL else _verdict_on_sets(found, direction)
    if found.common is None:
        return said
    which = f"{found.common} video{'s' * (found.common != 1)}"
    return f"{said[:-1]}; this rests on the {which} that both have, without the others."


def _verdict_on_sets(found: Comparison, direction: Direction) -> str:
    of, a, b = found.difference, found.a, found.b
    shots = _shots(found.shots)
    numbers = f"{of} ({_p(found.corrected)}, {shots}{'' if found.paired else ' a set'})"
    if found.least > LEVEL:
        return (
            f"{found.metric}: too few to tell: {shots} give{'s' * (found.shots == 1)} no p below "
            f"{found.least:.2g} here, whatever the videos show; {b} less {a} is {of}."
        )
    if found.corrected >= LEVEL:
        return f"{found.metric}: {a} and {b} cannot be told apart: {b} less {a} is {numbers}."
    if of.low <= 0 <= of.high:
        return (
            f"{found.metric}: {a} and {b} differ, but which is ahead is not certain: {b} less {a} "
            f"is {numbers}."
        )
    if direction is None:
        word = "more" if of.mean > 0 else "less"
        return f"{found.metric}: {b} has {word} than {a}: {b} less {a} is {numbers}."
    better, worse = (b, a) if (of.mean < 0) == (direction == "lower") else (a, b)
    return f"{found.metric}: {better} is better than {worse}: {b} less {a} is {numbers}."


def _verdict_on_real(found: Comparison) -> str:
    """Of a set against the real videos, in a distance."""
    start = f"{found.metric}: {found.b} is {found.difference} from the real videos"
    shots = f"{_shots(found.shots)}{'' if found.paired else ' a set'}"
    if found.least > LEVEL:
        return f"{start}, and {shots}: too few to tell it from them."
    told = "differs from" if found.corrected < LEVEL else "cannot be told from"
    return f"{start}, and {told} them ({_p(found.corrected)}, {shots})."


def _p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _shots(count: int) -> str:
    return f"{count} shot{'s' * (count != 1)}"


def _lone_p(
    statistic: Callable[..., float], groups: Sequence[np.ndarray], permutations: int, seed: int
) -> float:
    """`permutation_p` without rows, of any sizes."""
    members, sizes = np.concatenate(groups), [len(group) for group in groups]
    seen = statistic(*groups)
    least = seen - 1e-12 * abs(seen)  # sums in another order are equal but for rounding
    ways = math.factorial(len(members)) // math.prod(map(math.factorial, sizes))
    if ways <= permutations:
        return sum(statistic(*way) >= least for way in _divisions(members, sizes)) / ways
    rng, ends = np.random.default_rng(seed), np.cumsum(sizes)[:-1]
    drawn = (np.split(rng.permutation(members), ends) for _ in range(permutations))
    return (1 + sum(statistic(*way) >= least for way in drawn)) / (1 + permutations)


def _divisions(members: np.ndarray, sizes: Sequence[int]) -> Iterator[list[np.ndarray]]:
    """Every way to divide `members` into groups of these sizes."""
    if len(sizes) == 1:
        yield [members]
        return
    for chosen in combinations(range(len(members)), sizes[0]):
        for others in _divisions(np.delete(members, chosen), sizes[1:]):
            yield [members[list(chosen)], *others]


def _units(shots: Sequence[str], offset: int) -> list[np.ndarray]:
    labels = np.asarray(shots)
    return [offset + np.flatnonzero(labels == name) for name in np.unique(labels)]
