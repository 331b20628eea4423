"""p-values that hold what they say, equal numbers, and words that say no more than the numbers."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs SciPy (extra [eval])")
pytest.importorskip("statsmodels", reason="needs statsmodels (extra [eval])")

from wanjax.errors import UserError
from wanjax.eval.bootstrap import Mean
from wanjax.eval.distances import frechet
from wanjax.eval.significance import (
    Comparison,
    frechet_infinity,
    holm,
    mean_difference,
    pooled_p,
    require_equal,
    smallest_p,
    swap_p,
    verdict,
)


def names(count: int) -> list[str]:
    return [f"clip{i}" for i in range(count)]


def test_few_pairs_are_tested_exactly():
    a = np.asarray([1.0, 2.0, 3.0, 5.0])
    b = a + [1, 2, 3, 4]
    assert swap_p(mean_difference, a, b, names(4)) == 2 / 16 == smallest_p(4, 4, paired=True)
    assert pooled_p(mean_difference, a, a + 100, names(4), names(4)) == pytest.approx(2 / 70)
    assert smallest_p(4, 4, paired=False) == pytest.approx(2 / 70)


@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3)])
def test_the_clearest_of_sets_has_the_smallest_p(counts):
    a, b = (100.0 * i + np.arange(count) for i, count in enumerate(counts))
    found = pooled_p(mean_difference, a, b, *map(names, counts))
    assert found == pytest.approx(smallest_p(*counts, paired=False))


def test_one_pair_of_shots_says_nothing():
    windows = np.arange(4.0)
    for shots in (names(1), names(1) * 4):
        a = windows[: len(shots)]
        assert swap_p(mean_difference, a, a + 100, shots) == 1 == smallest_p(1, 1, paired=True)


def test_one_shot_among_too_many_to_try_all():
    """999 ways are drawn where there are 1001."""
    a, b = np.asarray([0.5]), np.arange(1000.0)
    found = pooled_p(mean_difference, a, b, names(1), names(1000))
    assert found == pytest.approx(2 / 1001, abs=0.01)


def test_equal_sets_are_not_different():
    a = np.random.default_rng(0).normal(size=(12, 6))
    assert swap_p(frechet, a, a, names(12)) == 1


@pytest.mark.parametrize("paired", [True, False])
def test_false_alarms_are_as_rare_as_promised(paired):
    rng = np.random.default_rng(0)
    alarms = 0
    for seed in range(200):
        a, b = rng.normal(size=(2, 14, 5))
        given = {"permutations": 59, "seed": seed}
        p = (
            swap_p(frechet, a, b, names(14), **given)
            if paired
            else pooled_p(frechet, a, b, names(14), names(14), **given)
        )
        alarms += p <= 0.05
    assert alarms <= 0.05 * 200 + 3 * np.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("paired", [True, False])
def test_a_real_difference_is_found(paired):
    a = np.random.default_rng(0).normal(size=(20, 5))
    b = np.random.default_rng(0 if paired else 1).normal(size=(20, 5)) + (0.5 if paired else 2)
    if paired:
        assert swap_p(frechet, a, b, names(20)) < 0.01
    else:
        assert pooled_p(frechet, a, b, names(20), names(20)) < 0.01


def test_windows_of_one_shot_are_one_unit():
    """Ten windows of each of four shots are no forty witnesses."""
    shots = np.repeat(names(4), 10).tolist()
    a = np.repeat([0.0, 1.0, 2.0, 3.0], 10)
    assert swap_p(mean_difference, a, a + 1, shots) == 2 / 16
    assert pooled_p(mean_difference, a, a + 100, shots, shots) == pytest.approx(2 / 70)


def test_pairs_have_to_be_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        swap_p(mean_difference, np.zeros(3), np.zeros(4), names(3))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_unequal_sets_are_refused_or_cut():
    assert require_equal({"real": 8, "A": 8}) == 8
    assert require_equal({"real": 8, "A": 12}, drawn=6) == 6
    with pytest.raises(UserError, match=r"real 8, A 12.*--equal-n 8"):
        require_equal({"real": 8, "A": 12})
    with pytest.raises(UserError, match="--equal-n 9 does not lie between 2 and the 8"):
        require_equal({"real": 8, "A": 12}, drawn=9)
    with pytest.raises(UserError, match="one clip"):
        require_equal({"real": 1, "A": 1})


def test_the_bias_of_few_clips_is_extrapolated_away():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(2, 120, 6)) for _ in range(20)]
    plain = np.mean([frechet(x, y) for x, y in sets])
    endless = np.mean([frechet_infinity(x, y) for x, y in sets])
    assert plain > 0.05 and abs(endless) < 0.25 * plain
    assert np.isnan(frechet_infinity(*sets[0][:, :99]))


FOUND = Comparison("lpips", "A", "B", Mean(-0.1, -0.2, -0.05), 0.01, 0.02, 0.001, 20, True)


def test_a_verdict_says_what_is_known():
    said = verdict(FOUND, "lower")
    assert said == (
        "lpips: B is better than A: B less A is -0.1 [-0.2, -0.05] (p = 0.020, 20 shots)."
    )
    assert "A is better than B" in verdict(FOUND, "higher")
    assert "B has less than A" in verdict(FOUND, None)


def test_a_verdict_says_no_more_than_is_known():
    doubtful = replace(FOUND, corrected=0.06)
    assert "cannot be told apart" in verdict(doubtful, "lower")
    wide = replace(FOUND, difference=Mean(-0.1, -0.2, 0.05))
    assert "which is ahead is not certain" in verdict(wide, "lower")
    few = replace(FOUND, least=0.25, shots=3)
    assert "too few to tell: 3 shots give no p below 0.25" in verdict(few, "lower")
    one = replace(FOUND, least=1.0, shots=1)
    assert "too few to tell: 1 shot gives no p below 1 here" in verdict(one, "lower")
    assert "1 shot: too few to tell" in verdict(replace(one, a="real"), "lower")
    for found in (doubtful, wide, few):
        assert "better" not in verdict(found, "lower")
