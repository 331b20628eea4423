"""What a blind study found: means, win rates, agreement, and what may be said of them in words.

Shots are the units, as elsewhere in `wanjax.eval`: pairs of one shot are averaged first. Raters
are drawn like shots, as others could have been asked. SciPy and statsmodels come with `[eval]`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from wanjax.eval.agreement import krippendorff
from wanjax.eval.answers import Study, Visit
from wanjax.eval.bootstrap import Mean, by_shot, interval
from wanjax.eval.significance import Comparison, holm, smallest_p, verdict

DRAWS = 5000
FEWEST_RATERS = 3  # of whom a spread can be told
ALIKE = 1  # points by which the ratings of one video, shown twice, may differ

Table = Float[np.ndarray, "R N"]


@dataclass(frozen=True)
class Finding:
    """Of one question: means of A and B, B less A, the shares of (rater, pair) in which A is ahead,
    both are even, and B is ahead; Krippendorff's alpha; the test ("mixed": `mixed_p`, "sign": an
    exact sign test over the shots), its p-value, the same corrected for the number of questions
    (Holm), and the least corrected one that so few shots can give."""

    title: str
    a: Mean
    b: Mean
    difference: Mean
    shares: tuple[float, float, float]
    alpha: float
    test: str
    p: float
    corrected: float
    least: float
    shots: int

    @property
    def verdict(self) -> str:
        """One sentence, which says no more than the numbers do."""
        found = Comparison(
            self.title,
            "A",
            "B",
            self.difference,
            self.p,
            self.corrected,
            self.least,
            self.shots,
            True,
        )
        return verdict(found, "higher")

    @property
    def outcome(self) -> int:
        """Which one the verdict calls better: -1 A, 1 B, 0 neither."""
        certain = self.corrected < 0.05 and not self.difference.low <= 0 <= self.difference.high
        return int(np.sign(self.difference.mean)) if certain else 0


@dataclass(frozen=True)
class Result:
    """`failed`: what went wrong in the checks, by rater. `every` and `passed`: findings by
    question, of all raters and of those who failed none, the same where none did, and None where
    all did."""

    failed: Mapping[str, list[str]]
    raters: int
    pairs: int
    every: Mapping[str, Finding]
    passed: Mapping[str, Finding] | None

    @property
    def flagged(self) -> list[str]:
        """The raters who failed a check."""
        return [rater for rater, reasons in self.failed.items() if reasons]


def analyse_ratings(study: Study, visits: Sequence[Visit], seed: int = 0) -> Result:
    """The findings of a study."""
    failed = {visit.rater: failed_checks(study, visit) for visit in visits}
    every = findings(study, visits, seed)
    kept = [visit for visit in visits if not failed[visit.rater]]
    passed = every
    if len(kept) < len(visits):
        passed = findings(study, kept, seed) if kept else None
    return Result(failed, len(visits), len(study.of_kind("pair")), every, passed)


def failed_checks(study: Study, visit: Visit) -> list[str]:
    """The attention checks that a rater failed, in words."""
    found = []
    for trial in study.of_kind("broken"):
        answer = visit.answers[trial]
        good, bad = (
            sum(given[label] for given in answer.ratings.values()) for label in ("good", "broken")
        )
        if answer.choice == "broken" or bad >= good:
            found.append(f"rated or chose a broken video as high as the good one ({trial})")
    for trial in study.of_kind("identical"):
        given = visit.answers[trial].ratings.values()
        if any(abs(of["same"] - of["again"]) > ALIKE for of in given):
            found.append(f"rated one video, shown twice, as two ({trial})")
    return found


def findings(study: Study, visits: Sequence[Visit], seed: int = 0) -> dict[str, Finding]:
    """By question, in the order in which they were asked."""
    pairs = study.of_kind("pair")
    shots = [study.key[trial]["shot"] for trial in pairs]
    found = {}
    for question, title in study.questions.items():
        a, b = (
            np.array([[_given(v, trial, question, label) for trial in pairs] for v in visits])
            for label in "AB"
        )
        found[question] = _finding(title, a, b, shots, choice=question == "choice", seed=seed)
    corrected = holm([finding.p for finding in found.values()])
    return {
        question: replace(finding, corrected=p, least=min(1.0, finding.least * len(found)))
        for (question, finding), p in zip(found.items(), corrected)
    }


def crossed_mean(values: Table, *, draws: int = DRAWS, seed: int = 0) -> Mean:
    """The mean of a table of raters and shots and its 95 % interval, both drawn anew with
    replacement, each by itself: the interval is rather too wide than too narrow (Owen 2007,
    "The pigeonhole bootstrap")."""
    rng = np.random.default_rng(seed)
    raters, shots = values.shape
    rows = rng.multinomial(raters, np.full(raters, 1 / raters), draws) / raters
    columns = rng.multinomial(shots, np.full(shots, 1 / shots), draws) / shots
    means = np.einsum("dr,rn,dn->d", rows, values, columns)
    return Mean(float(values.mean()), *interval(means, 0.95))


def sign_p(differences: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """The p-value of an exact two-sided sign test, and the least that so few could give; what is
    even says nothing and is left out."""
    from scipy.stats import binomtest

    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    if not above + below:
        return 1.0, 1.0
    return float(binomtest(above, above + below).pvalue), smallest_p(above + below, 1, paired=True)


def mixed_p(differences: Table) -> float | None:
    """The p-value of "the mean is 0" by a mixed-effects model (statsmodels) in which raters and
    shots are random; None where it does not converge, or there are too few of either.

    Few raters are a small sample, whatever the number of shots: the statistic is taken as Student's
    with one degree of freedom less than there are raters, or shots if these are fewer.
    """
    fewest = min(differences.shape)
    if fewest < FEWEST_RATERS or not np.ptp(differences):
        return None
    from scipy.stats import t

    fitted = _fit(differences)
    if fitted is None:
        return None
    mean, error = fitted
    return float(2 * t.sf(abs(mean / error), fewest - 1))


def _fit(differences: Table) -> tuple[float, float] | None:
    """The mean and its standard error by a model with crossed random effects."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    raters, shots = np.indices(differences.shape).reshape(2, -1)
    frame = pandas.DataFrame({"y": differences.ravel(), "rater": raters, "shot": shots, "all": 1})
    effects = {"rater": "0 + C(rater)", "shot": "0 + C(shot)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, which is asked for below
        model = MixedLM.from_formula("y ~ 1", frame, groups="all", vc_formula=effects)
        try:
            fitted = model.fit(reml=True)
        except (np.linalg.LinAlgError, ValueError):
            return None
    error = float(fitted.bse_fe.iloc[0])
    return (float(fitted.fe_params.iloc[0]), error) if fitted.converged and error > 0 else None


def _finding(
    title: str, a: Table, b: Table, shots: Sequence[str], *, choice: bool, seed: int
) -> Finding:
    at_shots = lambda table: np.stack([by_shot(row, shots)[1] for row in table])  # noqa: E731
    difference = at_shots(b - a)
    p, least = sign_p(difference.mean(0))
    test = "sign"
    mixed = None if choice else mixed_p(difference)
    if mixed is not None:
        p, least, test = mixed, 0.0, "mixed"
    ahead = np.sign(b - a)
    rated = b if choice else np.concatenate([a, b], 1)
    return Finding(
        title=title,
        a=crossed_mean(at_shots(a), seed=seed),
        b=crossed_mean(at_shots(b), seed=seed),
        difference=crossed_mean(difference, seed=seed),
        shares=tuple(float((ahead == side).mean()) for side in (-1, 0, 1)),
        alpha=krippendorff(rated, "nominal" if choice else "ordinal"),
        test=test,
        p=p,
        corrected=p,
        least=least,
        shots=difference.shape[1],
    )


def _given(visit: Visit, trial: str, question: str, label: str) -> float:
    """A rating; of the choice 1 for what was chosen, and 0."""
    answer = visit.answers[trial]
    if question == "choice":
        return float(answer.choice == label)
    return float(answer.ratings[question][label])
