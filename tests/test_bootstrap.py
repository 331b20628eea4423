"""The bootstrap's intervals hold the true mean about as often as they say."""

import numpy as np
import pytest

from wanjax.eval.bootstrap import bootstrap_distance, bootstrap_mean, by_shot
from wanjax.eval.distances import frechet


def test_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        _, low, high = bootstrap_mean(rng.normal(3, 2, 40), draws=500, seed=i)
        hits += low <= 3 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_equal_values_leave_no_doubt():
    assert bootstrap_mean(np.full(5, 2.5)) == (2.5, 2.5, 2.5)


def test_wider_with_confidence_and_the_same_every_time():
    values = np.arange(10.0)
    usual, sure = bootstrap_mean(values), bootstrap_mean(values, confidence=0.99)
    assert sure.low < usual.low < usual.mean == 4.5 < usual.high < sure.high
    assert usual == bootstrap_mean(values) and str(usual).startswith("4.5 [")


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="shape"):
        bootstrap_mean(np.zeros(0))


@pytest.mark.parametrize("same_shots", [True, False])
def test_coverage_of_a_distance(same_shots):
    """Of the Fréchet distance that sets of this size have on average."""
    rng = np.random.default_rng(0)
    shots = [f"s{i}" for i in range(24)]
    others = shots if same_shots else [f"{name}'" for name in shots]

    def pair():
        x = rng.normal(size=(24, 3))
        y = x + rng.normal(size=(24, 3)) if same_shots else rng.normal(size=(24, 3))
        return x, 1.5 * y + 1

    usual = np.mean([frechet(*pair()) for _ in range(2000)])
    hits = 0
    for i in range(100):
        _, low, high = bootstrap_distance(frechet, pair(), (shots, others), draws=100, seed=i)
        hits += low <= usual <= high
    assert 0.86 <= hits / 100 <= 0.99


def test_shots_are_drawn_whole():
    """One shot of a hundred windows is one unit: nothing can be drawn but itself."""
    values = np.random.default_rng(0).normal(size=(100, 3))
    found = bootstrap_distance(frechet, (values, values + 1), (["a"] * 100, ["b"] * 100), draws=9)
    assert found.low == found.mean == found.high == pytest.approx(3)


def test_means_by_shot():
    names, means = by_shot(np.asarray([1.0, 2.0, 6.0]), ["b", "a", "b"])
    assert names == ["a", "b"] and means.tolist() == [2.0, 3.5]
