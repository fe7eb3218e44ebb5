import numpy as np
import pytest
from engines import FakeClock

from dpal_edge.profile.sampler import Effort, Series
from dpal_edge.profile.statistics import Summary

EFFORT = Effort()


def collect(draw, effort=EFFORT, **options):
    """Collect calls whose time in ms ``draw`` gives, by a clock that stands still between them."""
    clock, series = FakeClock(), Series()

    def step():
        ms = draw(series.calls)
        clock.pass_ms(ms)
        return {"host": ms}

    series.collect(step, effort, decides="host", clock=clock, **options)
    return series.timings_ms["host"], clock


def test_a_steady_engine_is_looked_at_twice():
    timings, clock = collect(lambda call: 20.0)
    assert len(timings) == 37
    assert clock() == pytest.approx(0.74)


def test_noise_takes_more_calls_until_the_median_is_known():
    rng = np.random.default_rng(0)
    timings, clock = collect(lambda call: 5 + rng.gamma(2, 0.25))
    summary = Summary.of(timings)
    assert len(timings) > 100
    assert EFFORT.least_s <= clock() < EFFORT.usual_s
    assert summary.p50_ci95[1] - summary.p50_ci95[0] <= 0.02 * summary.p50


def test_time_is_up():
    rng = np.random.default_rng(0)
    timings, clock = collect(lambda call: rng.uniform(1, 100))
    assert EFFORT.usual_s <= clock() < EFFORT.usual_s + 0.1
    assert len(timings) > 30


def test_slow_calls_get_more_time_and_at_last_an_end():
    assert len(collect(lambda call: 200.0)[0]) == 30
    timings, clock = collect(lambda call: 3000.0)
    assert (len(timings), clock()) == (4, 12)


def test_a_series_that_never_becomes_steady_goes_on_until_time_is_up():
    _, clock = collect(lambda call: 10 + 0.01 * call)
    assert clock() >= EFFORT.usual_s


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_came_before_an_end_is_kept(error):
    series = Series()

    def check():
        if series.calls == 7:
            raise error

    with pytest.raises(error):
        series.collect(lambda: {"host": 1.0, "device": 0.5}, EFFORT, decides="host", check=check)
    assert series.timings_ms == {"host": [1.0] * 7, "device": [0.5] * 7}


def test_an_interrupt_between_the_timings_of_a_call_leaves_lists_of_one_length():
    class Torn(dict):
        def items(self):
            yield "device", 0.5
            if series.calls == 7:
                raise KeyboardInterrupt
            yield "host", 1.0

    series = Series()
    with pytest.raises(KeyboardInterrupt):
        series.collect(Torn, EFFORT, decides="host")
    assert series.timings_ms == {"device": [0.5] * 7, "host": [1.0] * 7}


def test_it_recovers_a_known_distribution_within_its_own_interval():
    """Log-normal noise on 5 ms, in which each call keeps half of the one before, of 60 engines."""
    held = {"mean": 0, "median": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        normal = np.zeros(5000)
        for i in range(1, 5000):
            normal[i] = 0.5 * normal[i - 1] + 0.75**0.5 * rng.normal()
        timings, _ = collect(lambda call, n=normal: (40.0 if call < 6 else 5.0) + np.exp(0.2 * n[call]))
        summary = Summary.of(timings)
        assert summary.warmup.calls >= 6
        held["mean"] += summary.ci95[0] <= 5 + np.exp(0.2**2 / 2) <= summary.ci95[1]
        held["median"] += summary.p50_ci95[0] <= 6 <= summary.p50_ci95[1]
    assert min(held.values()) >= 0.88 * 60
