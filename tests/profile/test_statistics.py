import numpy as np
import pytest

from dpal_edge.profile.statistics import (
    Summary,
    find_steady,
    interval,
    permutation_p,
    significant_changes,
    split_into_blocks,
)


def autoregressive(rng, count, share):
    """Noise of variance 1 in which each value keeps a share of the one before."""
    noise = rng.normal(size=count + 200) * (1 - share**2) ** 0.5
    for i in range(1, len(noise)):
        noise[i] += share * noise[i - 1]
    return noise[200:]


def test_by_hand():
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (summary.n, summary.mean, summary.p50, summary.max) == (5, 4, 3, 10)
    assert (summary.p90, summary.p95, summary.p99) == (None, None, None)
    # a block for each call: 4 +- 2.776 * sqrt(12.5) / sqrt(5)
    assert summary.ci95 == pytest.approx((4 - 4.3893, 4 + 4.3893), abs=1e-3)
    assert summary.doubts() == ["fewer than 20 calls"]


def test_one_call():
    summary = Summary.of([7.0])
    assert (summary.n, summary.p50, summary.ci95, summary.p50_ci95, summary.autocorrelation) == (1, 7, None, None, None)


@pytest.mark.parametrize(("share", "count", "least"), [(0.0, 400, 0.92), (0.7, 400, 0.9), (0.95, 4000, 0.9)])
def test_intervals_hold_what_they_promise_though_calls_depend_on_one_another(share, count, least):
    rng = np.random.default_rng(0)
    held = {"mean": 0, "median": 0}
    for _ in range(200):
        summary = Summary.of(10 + 0.3 * autoregressive(rng, count, share))
        held["mean"] += summary.ci95[0] <= 10 <= summary.ci95[1]
        held["median"] += summary.p50_ci95[0] <= 10 <= summary.p50_ci95[1]
    assert min(held.values()) >= least * 200


def test_an_interval_for_independent_calls_would_not():
    """The share of a naive interval that holds the truth, which is why blocks are used at all."""
    rng = np.random.default_rng(0)
    series = [autoregressive(rng, 4000, 0.95) for _ in range(200)]
    assert np.mean([abs(values.mean()) < 1.96 * values.std() / len(values) ** 0.5 for values in series]) < 0.5


def test_neighbours_that_depend_on_one_another_make_longer_blocks():
    rng = np.random.default_rng(1)
    assert len(split_into_blocks(np.tile([10.0, 11.0], 500))) == 20
    assert len(split_into_blocks(np.cumsum(rng.normal(size=1000)))) < 20
    assert [len(block) for block in split_into_blocks(rng.normal(size=19))] == [1] * 19


def test_a_drift_is_told():
    values = 10 + np.arange(300) * 0.01 + 0.01 * np.random.default_rng(0).normal(size=300)
    summary = Summary.of(values)
    assert summary.doubts() == ["never became stable", "drifts: its interval is too narrow"]
    assert summary.warmup.calls <= 150
    assert Summary.of(values, warm=True).doubts() == ["drifts: its interval is too narrow"]


@pytest.mark.parametrize("slow", [1, 7, 40])
@pytest.mark.parametrize("count", [100, 1000])
def test_warm_up_is_left_out_and_reported(slow, count):
    rng = np.random.default_rng(slow)
    warm = np.linspace(60, 15, slow)
    summary = Summary.of(np.concatenate([warm, 10 + 0.1 * rng.normal(size=count)]))
    assert slow <= summary.warmup.calls <= slow + count // 4
    assert summary.warmup.stable
    assert summary.warmup.slowest_ms == 60
    assert summary.warmup.ms == pytest.approx(warm.sum() + 10 * (summary.warmup.calls - slow), rel=0.02)
    assert summary.max < 11


def test_a_slow_first_call_of_few_is_warm_up():
    assert find_steady(np.array([500.0, 10.1, 10, 10.2, 10.1, 9.9, 10, 10.1])) == (1, True)


def test_outliers_are_listed_and_stay():
    values = 10 + 0.1 * np.random.default_rng(0).normal(size=200)
    values[[90, 150]] = 50, 400
    summary = Summary.of(values)
    first = 90 - summary.warmup.calls
    assert summary.outliers.count == 2
    assert summary.outliers.listed == ({"call": first + 60, "ms": 400.0}, {"call": first, "ms": 50.0})
    assert summary.max == 400
    assert summary.mean > 11.9


def test_rounding_is_no_noise():
    summary = Summary.of(np.cumsum(np.full(200, 0.1)) - np.concatenate([[0], np.cumsum(np.full(199, 0.1))]))
    assert (summary.n, summary.warmup.calls, summary.outliers.count) == (200, 0, 0)


def test_samples_and_histogram_are_of_all_calls():
    summary = Summary.of(np.arange(1000.0), warm=True)
    assert len(summary.samples) == 200
    assert sum(summary.histogram.counts) == summary.n == 1000
    assert (summary.histogram.edges[0], summary.histogram.edges[-1]) == (0, 999)


def test_no_interval_of_one_block():
    assert interval(3.0, np.array([3.0])) is None


def test_permutation_by_hand():
    # of the 20 ways to draw three of six, only this one and its mirror are as far apart: p = 0.1
    assert permutation_p([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1, abs=0.01)
    assert permutation_p([1.0, 1.0], [1.0, 1.0]) == 1


def test_chance_is_no_change_among_many():
    rng = np.random.default_rng(0)
    pairs = {str(i): (rng.normal(size=20), rng.normal(size=20)) for i in range(60)}
    assert significant_changes(pairs) == {}
    pairs["slower"] = rng.normal(size=20), rng.normal(size=20) + 3
    assert list(significant_changes(pairs)) == ["slower"]
