"""What is made of a blind study's answers."""

import json
import math

import numpy as np
import pytest

from benchmarks.survey import QUESTIONS, panel, study_of, visit_of
from tests.scripts import call
from tests.surveys import build, key_of, write_answers, write_sets
from wanjax.eval.answers import Answer, Visit
from wanjax.eval.ratings import analyse_ratings, crossed_mean, mixed_p, sign_p
from wanjax.eval.ratings_report import as_json, depends, describe


def test_a_clear_gain_is_called_better():
    study = study_of(16)
    result = analyse_ratings(study, panel(study, 16, 6, 1.2))
    assert not result.flagged and result.passed is result.every
    for found in result.every.values():
        assert "B is better than A" in found.verdict and found.outcome == 1
        assert found.difference.low > 0 and found.corrected < 0.05
    assert result.every["fidelity"].test == "mixed" and result.every["choice"].test == "sign"
    swapped = [
        Visit(v.rater, v.file, {t: _swapped(a) for t, a in v.answers.items()})
        for v in panel(study, 16, 6, 1.2)
    ]
    for found, other in zip(result.every.values(), analyse_ratings(study, swapped).every.values()):
        assert other.outcome == -1 and "A is better than B" in other.verdict
        assert other.difference.mean == pytest.approx(-found.difference.mean)
        assert other.p == pytest.approx(found.p, rel=1e-6) and other.shares == found.shares[::-1]


def _swapped(answer: Answer) -> Answer:
    turn = {"A": "B", "B": "A"}
    ratings = {
        q: {turn.get(label, label): score for label, score in of.items()}
        for q, of in answer.ratings.items()
    }
    return Answer(ratings, turn.get(answer.choice, answer.choice))


def test_nothing_is_found_where_there_is_nothing():
    """Studies of two equal sets, in which raters and shots lean: one is called better in hardly any
    of them, for any question. (Of many more: benchmarks/survey.py.)"""
    study = study_of(12)
    wrong = 0
    for seed in range(20):
        result = analyse_ratings(study, panel(study, 12, 5, 0, seed=seed + 1))
        wrong += any(found.outcome for found in result.every.values())
    assert wrong <= 2


def test_too_few_are_called_so():
    study = study_of(4)
    result = analyse_ratings(study, panel(study, 4, 1, 3))
    for found in result.every.values():
        assert "too few to tell" in found.verdict and found.outcome == 0
        assert math.isnan(found.alpha)


def test_windows_of_a_shot_count_once():
    """The same answers, four times: as windows of a shot they say no more than once."""
    once, fourfold = study_of(8), study_of(32, windows=4)
    rng = np.random.default_rng(0)
    a, b = rng.permuted(np.tile(np.arange(1, 6), (8, 1)), axis=1)[:, :2].T
    single = analyse_ratings(once, [visit_of(once, "r", a, b)])
    again = analyse_ratings(fourfold, [visit_of(fourfold, "r", a.repeat(4), b.repeat(4))])
    for question in QUESTIONS:
        assert again.every[question].p == single.every[question].p
        assert again.every[question].difference == single.every[question].difference
        assert again.every[question].shots == 8


def test_who_fails_the_checks_is_flagged_and_the_result_given_without():
    study = study_of(16)
    attentive = panel(study, 16, 5, 0.0, seed=3)
    blind = [visit_of(study, f"blind{i}", [1] * 16, [5] * 16, attentive=False) for i in range(4)]
    result = analyse_ratings(study, attentive + blind)
    assert result.flagged == [f"blind{i}" for i in range(4)]
    assert result.passed == analyse_ratings(study, attentive).every
    assert result.every["fidelity"].difference.mean > result.passed["fidelity"].difference.mean + 1
    text = describe(study, result)
    assert "Only the 5 raters who failed no check" in text and "blind0: rated or chose" in text


def test_what_hangs_on_flagged_raters_is_said():
    study = study_of(16)
    many = panel(study, 16, 4, 1.5)
    few = [visit_of(study, "blind", [5] * 16, [1] * 16, attentive=False)]
    result = analyse_ratings(study, many + few)
    assert "Cinematic fidelity" in depends(result)
    assert "depends on raters who failed a check" in describe(study, result)
    assert not depends(analyse_ratings(study, many))


def test_one_video_rated_as_two_fails():
    study = study_of(4)
    visit = visit_of(study, "r", [3] * 4, [3] * 4)
    (trial,) = study.of_kind("identical")
    ratings = dict.fromkeys(("fidelity", "stability"), {"same": 1, "again": 3})
    visit.answers[trial] = Answer(ratings, "same")
    assert analyse_ratings(study, [visit]).flagged == ["r"]
    assert "Every rater failed" in describe(study, analyse_ratings(study, [visit]))


def test_the_sign_test_is_exact():
    assert sign_p(np.array([1.0] * 6)) == (2 / 64, 2 / 64)
    assert sign_p(np.array([1.0, 1, 1, 1, 1, -2, 0, 0]))[0] == pytest.approx(2 * 7 / 64)
    assert sign_p(np.zeros(5)) == (1.0, 1.0)


def test_the_mixed_model_has_the_error_of_a_balanced_table():
    """Of a full table the error of the mean is known in closed form, by the mean squares of rows,
    of columns and of what is left (Searle, Casella, McCulloch 1992, ch. 4)."""
    from scipy.stats import t

    rng = np.random.default_rng(5)
    rows, columns = 6, 15
    table = rng.normal(0, 0.8, (rows, 1)) + rng.normal(0.4, 0.8, columns)
    table = table + rng.normal(0, 0.5, (rows, columns))
    of_rows, of_columns, mean = table.mean(1), table.mean(0), table.mean()
    left = table - of_rows[:, None] - of_columns + mean
    squares_rows = columns * of_rows.var(ddof=1)
    squares_columns = rows * of_columns.var(ddof=1)
    squares_left = (left**2).sum() / ((rows - 1) * (columns - 1))
    assert min(squares_rows, squares_columns) > squares_left
    error = math.sqrt((squares_rows + squares_columns - squares_left) / table.size)
    assert mixed_p(table) == pytest.approx(2 * t.sf(abs(mean / error), rows - 1), rel=1e-3)


def test_the_mixed_model_is_left_where_it_cannot_be_had():
    assert mixed_p(np.random.default_rng(0).normal(size=(2, 10))) is None
    assert mixed_p(np.full((4, 10), 1.0)) is None


def test_the_interval_covers():
    """Of a table of raters and shots, in 95 of 100 tables or more."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        table = rng.normal(0, 1, (10, 1)) + rng.normal(0, 1, 20) + rng.normal(0, 1, (10, 20))
        found = crossed_mean(table, draws=500, seed=seed)
        covered += found.low <= 0 <= found.high
    assert covered >= 180


def test_all_numbers_are_in_the_json():
    study = study_of(4)
    visits = panel(study, 4, 1, 3)
    found = as_json(study, visits, analyse_ratings(study, visits))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert (
        again["sets"] == {"A": "base", "B": "tuned"} and again["all"]["fidelity"]["alpha"] is None
    )
    assert again["raters"] == [{"rater": "r0", "file": "r0.json", "failed": []}]


def test_from_films_to_a_verdict(tmp_path):
    """The whole command line, and a refusal of it."""
    write_sets(tmp_path, 3)
    study = build(tmp_path)
    scores = {"A": 2, "B": 4, "good": 5, "broken": 1, "same": 3, "again": 3}
    files = [
        write_answers(study, rater, lambda label, _: scores[label]) for rater in ("Anna", "Ben")
    ]
    call("evaluate.py", "survey", "analyse", study, *files, "--out", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["all"]["fidelity"]["difference"]["value"] == 2
    assert found["study"] == key_of(study)["digest"]
    text = files[1].read_text()
    files[1].write_text(text.replace("Ben", "Bea"))
    said = call("evaluate.py", "survey", "analyse", study, *files, cwd=tmp_path, code=2)
    assert said.startswith("error: ") and "answers_Ben.json was changed" in said
    assert "Name the study's folder" in call(
        "evaluate.py", "survey", "analyse", cwd=tmp_path, code=2
    )
    assert "no option '--folder'" in call(
        "evaluate.py", "survey", "build", "--folder", "x", cwd=tmp_path, code=2
    )
