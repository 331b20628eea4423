"""Distances of sets against closed forms, and what must hold for few features of low rank."""

import numpy as np
import pytest

from wanjax.eval.distances import frechet, kernel_distance

RNG = np.random.default_rng(0)


def by_eigenvalues(x, y) -> float:
    """The Fréchet distance as it is usually written, for covariances of full rank."""
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cx @ cy).real, 0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * roots.sum()


@pytest.mark.parametrize("count", [4, 8, 300])
@pytest.mark.parametrize("width", [5, 40])
def test_frechet_is_the_usual_formula(count, width):
    x, y = RNG.normal(size=(count, width)), RNG.normal(1, 2, size=(count + 3, width))
    assert frechet(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-5)


def test_frechet_of_gaussians_with_a_closed_form():
    """Of diagonal covariances the distance is that of means and of standard deviations."""
    white = RNG.normal(size=(60, 7))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(59)  # exactly the unit covariance
    a, b = RNG.uniform(0.5, 2, 7), RNG.uniform(0.5, 2, 7)
    meant = ((a - b) ** 2).sum() + 7 * 9
    assert frechet(white * a, white * b + 3) == pytest.approx(meant, rel=1e-12)


@pytest.mark.parametrize("measure", [frechet, kernel_distance])
def test_order_and_direction_do_not_matter(measure):
    x, y = RNG.normal(size=(12, 400)), RNG.normal(0.2, 1, size=(9, 400))
    shuffled = measure(RNG.permutation(x), RNG.permutation(y))
    assert measure(x, y) == pytest.approx(shuffled, rel=1e-12) == pytest.approx(measure(y, x))


@pytest.mark.parametrize("count", [4, 8, 12])
def test_frozen_clips_and_large_means(count):
    """Half of the features equal, a mean of 1000 with a spread of 0.01: real, and as in float64."""
    x = 1e3 + 1e-2 * RNG.normal(size=(count, 400))
    x[: count // 2] = x[0]
    y = 1e3 + 1e-2 * RNG.normal(size=(count, 400))
    found = frechet(x, y)
    assert np.isfinite(found) and found > 0
    assert found == pytest.approx(frechet((x - 1e3) * 100, (y - 1e3) * 100) / 1e4, rel=1e-3)
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)


def test_more_features_than_dimensions_changes_nothing_but_the_way():
    x, y = RNG.normal(size=(30, 8)), RNG.normal(size=(30, 8))
    wide = [np.pad(z, ((0, 0), (0, 60))) for z in (x, y)]
    assert frechet(x, y) == pytest.approx(frechet(*wide), rel=1e-12)


def test_the_kernel_distance_is_unbiased_where_frechet_is_not():
    rng = np.random.default_rng(1)
    sets = [rng.normal(size=(2, 8, 30)) for _ in range(2000)]
    kernels = np.asarray([kernel_distance(*pair) for pair in sets])
    assert abs(kernels.mean()) < 3 * kernels.std() / np.sqrt(2000)
    assert min(frechet(*pair) for pair in sets) > 10


def test_pairs_that_are_alike_do_not_move_the_kernel_distance():
    rng = np.random.default_rng(1)
    sets = rng.normal(size=(2000, 8, 30))
    alike = [(x, x + 0.1 * rng.normal(size=x.shape)) for x in sets]
    found = np.asarray([kernel_distance(*pair, paired=True) for pair in alike])
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(2000)
    assert np.mean([kernel_distance(*pair) for pair in alike[:50]]) < -0.5


def test_the_kernel_distance_by_hand():
    x, y = np.asarray([[0.0], [1.0]]), np.asarray([[2.0], [0.0]])
    assert kernel_distance(x, y) == pytest.approx(1 + 1 - 2 * (1 + 1 + 27 + 1) / 4)


@pytest.mark.parametrize("measure", [frechet, kernel_distance])
def test_one_clip_is_no_set(measure):
    with pytest.raises(ValueError, match="not two sets"):
        measure(np.zeros((1, 4)), np.zeros((5, 4)))
