"""What a blind study can see: simulated raters, and how often one set is called better.

`python -m benchmarks.survey` prints a line for each design, in about 8 minutes on two cores.
"""

import sys
from pathlib import Path

import numpy as np

from wanjax.eval.answers import Answer, Study, Visit
from wanjax.eval.ratings import analyse_ratings

QUESTIONS = {"fidelity": "Cinematic fidelity", "stability": "Stability", "choice": "Choice"}
KINDS = {"pair": ("A", "B"), "broken": ("good", "broken"), "identical": ("same", "again")}
# Pairs, raters, and by how many points of five B is better.
DESIGNS = ((12, 3, 0.0), (12, 5, 0.0), (20, 8, 0.0), (12, 5, 1.0), (20, 5, 1.0), (20, 5, 0.5))
STUDIES = 100


def main() -> None:
    for pairs, raters, gain in DESIGNS:
        found = [studied(pairs, raters, gain, seed) for seed in range(STUDIES)]
        print(
            f"{raters} raters, {pairs} pairs, B better by {gain:g}: in {sum(map(bool, found))} of "
            f"{STUDIES} studies one set is called better for some question"
        )
        sys.stdout.flush()


def studied(pairs: int, raters: int, gain: float, seed: int) -> int:
    """For how many questions a simulated study calls one set better."""
    study = study_of(pairs)
    result = analyse_ratings(study, panel(study, pairs, raters, gain, seed))
    return sum(bool(found.outcome) for found in result.every.values())


def study_of(pairs: int, windows: int = 1) -> Study:
    """A study of so many pairs, of `pairs / windows` shots, and of a check of each kind."""
    kinds = ["pair"] * pairs + ["broken", "identical"]
    key = {
        f"t{i:02}": {
            "kind": kind,
            "name": f"s{i // windows:02}@{i % windows}",
            "shot": f"s{i // windows:02}",
            "files": {label: f"{i}{label}.mp4" for label in KINDS[kind]},
        }
        for i, kind in enumerate(kinds)
    }
    return Study(Path("study"), "0", {"A": "base", "B": "tuned"}, QUESTIONS, key)


def visit_of(study: Study, rater: str, a, b, attentive: bool = True) -> Visit:
    """Ratings `a` and `b` of the pairs, the same for all questions."""
    given = {"good": 5, "broken": 1 if attentive else 5, "same": 3, "again": 3}
    answers = {}
    for i, (trial, about) in enumerate(study.key.items()):
        scores = given if about["kind"] != "pair" else {"A": int(a[i]), "B": int(b[i])}
        x, y = KINDS[about["kind"]]
        ratings = {q: {x: scores[x], y: scores[y]} for q in QUESTIONS if q != "choice"}
        even = (x, y)[(i + len(rater) + ord(rater[-1])) % 2]  # who sees no difference, guesses
        chosen = even if scores[x] == scores[y] else max((x, y), key=scores.get)
        answers[trial] = Answer(ratings, chosen)
    return Visit(rater, Path(f"{rater}.json"), answers)


def panel(study: Study, pairs: int, raters: int, gain: float, seed: int = 0) -> list[Visit]:
    """Raters with leanings of their own, to whom B is better by about `gain` points."""
    rng = np.random.default_rng(seed)
    shot, visits = rng.normal(0, 0.5, pairs), []
    for r in range(raters):
        a = rng.normal(3, 0.7, pairs)
        b = a + gain + shot + rng.normal(0, 0.3) + rng.normal(0, 0.5, pairs)
        visits.append(visit_of(study, f"r{r}", *(np.clip(np.rint(x), 1, 5) for x in (a, b))))
    return visits


if __name__ == "__main__":
    main()
