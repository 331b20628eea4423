"""A study of ranks: the run is the unit, and too few runs say so."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs SciPy (extra [eval])")

from wanjax.errors import UserError
from wanjax.eval.bootstrap import Mean
from wanjax.eval.measuring import Measured
from wanjax.eval.metrics import METRICS
from wanjax.eval.ranks import (
    RankFindings,
    parse_runs,
    rank_p,
    sentence,
    smallest_rank_p,
    student_mean,
    study,
    unlike_runs,
)
from wanjax.eval.videos import ClipFile


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1), (3, 3), (3, 3, 3), (2, 2, 2)])
def test_the_clearest_of_studies_has_the_smallest_p(blocks, counts):
    groups = [10.0**i + 0.01 * np.arange(n) for i, n in enumerate(counts)]
    found = rank_p(groups, blocks=blocks, permutations=10_000)
    assert found == pytest.approx(smallest_rank_p(counts, blocks=blocks))


def test_unequal_numbers_of_runs():
    assert smallest_rank_p((2, 3), blocks=False) == pytest.approx(1 / 10)
    lone = rank_p([np.asarray([0.0]), np.asarray([5, 5.1, 5.2])], blocks=False)
    assert lone == pytest.approx(1 / 4) == smallest_rank_p((1, 3), blocks=False)
    assert rank_p([np.asarray([0.0, 0.1]), np.asarray([5, 5.1, 5.2])], blocks=False) == (
        pytest.approx(1 / 10)
    )


def test_blocks_take_out_what_seeds_share():
    """Seeds that differ a hundred times as much as ranks."""
    seeds = np.asarray([0.0, 100, 200, 300, 400, 500])
    groups = [seeds, seeds + 1, seeds + 2]
    assert rank_p(groups, blocks=True) < 0.01 < 0.9 < rank_p(groups, blocks=False)


def test_false_alarms():
    rng = np.random.default_rng(0)
    alarms = sum(
        rank_p(list(rng.normal(size=(3, 4))), blocks=True, permutations=99, seed=i) <= 0.05
        for i in range(200)
    )
    assert alarms <= 0.05 * 200 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_the_interval_of_runs():
    assert student_mean([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4841377, 2 + 2.4841377))
    one = student_mean([4.0])
    assert one.mean == 4 and np.isnan(one.low) and np.isnan(one.high)


def found(p: float, least: float = 0.01, metric: str = "fvd") -> RankFindings:
    runs = {4: {0: 3.0, 1: 3.1}, 8: {0: 2.0, 1: 2.1}}
    means = {4: Mean(3.05, 3, 3.1), 8: Mean(2.05, 2, 2.1)}
    return RankFindings(metric, runs, means, p, least)


def test_sentences_say_no_more_than_the_numbers():
    assert "4 runs give no p below 0.33 here" in sentence(found(0.33, 0.33))
    assert "cannot be told apart by 4 runs (p = 0.200)" in sentence(found(0.2))
    assert sentence(found(0.02)).endswith("the best mean is that of rank 8.")
    assert sentence(found(0.02, metric="ssim")).endswith("that of rank 4.")
    assert "lowest at rank 8 and highest at rank 4" in sentence(found(0.02, metric="motion"))


@pytest.mark.parametrize("metric", ["psnr", "flicker"])
def test_a_run_of_more_videos_is_valued_by_those_that_all_have(metric):
    """One with an easy video more is no better; of metrics of pairs, a real one must be there."""
    names = {"real": "abc", "4:0": "ab", "4:1": "abc", "8:0": "abe", "8:1": "abde"}
    sets = {k: {n: ClipFile(n, Path(n), None, n) for n in of} for k, of in names.items()}
    score = {"a": 1.0, "b": 2.0}
    values = {k: {n: {metric: score.get(n, 90.0)} for n in of} for k, of in names.items()}
    runs = {label: tuple(map(int, label.split(":"))) for label in names if label != "real"}
    (found,) = study([METRICS[metric]], Measured(values, {}, 0), sets, runs)
    assert found.runs == {rank: {0: 1.5, 1: 1.5} for rank in (4, 8)}
    (said,) = unlike_runs([METRICS[metric]], sets)
    assert "the 2 that all runs have; left out: c" in said
    assert ("e" in said.partition("left out")[2]) == (metric == "flicker")


def test_runs_by_rank_and_seed():
    assert parse_runs(["4:0=a", "8:0=b"]) == {"4:0": (4, 0, "a"), "8:0": (8, 0, "b")}
    for texts, said in [
        (["4=a", "8:0=b"], "is not RANK:SEED=DIR"),
        (["4:0=a", "4:0=b"], "given twice"),
        (["4:0=a", "4:1=b"], "single rank"),
        (["0:0=a", "4:1=b"], "is not RANK:SEED=DIR"),
    ]:
        with pytest.raises(UserError, match=said):
            parse_runs(texts)
