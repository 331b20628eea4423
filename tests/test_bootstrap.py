"""The bootstrap's intervals hold the true mean about as often as they say."""

import numpy as np
import pytest

from wanjax.eval.bootstrap import bootstrap_mean


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
