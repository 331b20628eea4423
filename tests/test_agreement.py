"""Krippendorff's alpha."""

import numpy as np
import pytest

from wanjax.eval.agreement import krippendorff

NAN = float("nan")
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C and after.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


@pytest.mark.parametrize(
    "level, alpha", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_the_published_example(level, alpha):
    assert krippendorff(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_its_ends(level):
    rng = np.random.default_rng(0)
    ratings = rng.integers(1, 6, (1, 500)).astype(float)
    assert krippendorff(np.repeat(ratings, 3, 0), level) == pytest.approx(1)
    assert abs(krippendorff(rng.integers(1, 6, (4, 2000)).astype(float), level)) < 0.03
    assert krippendorff(np.array([[1.0, 2], [2, 1]]), level) < 0


def test_nothing_can_be_said():
    assert np.isnan(krippendorff(np.array([[1.0, 2, 3]]), "ordinal"))
    assert np.isnan(krippendorff(np.full((3, 4), 2.0), "ordinal"))


def test_raters_and_things_have_no_order():
    rng = np.random.default_rng(1)
    turned = PUBLISHED[rng.permutation(4)][:, rng.permutation(12)]
    assert krippendorff(turned, "ordinal") == pytest.approx(krippendorff(PUBLISHED, "ordinal"))
