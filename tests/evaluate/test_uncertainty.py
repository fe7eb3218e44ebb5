"""Standard errors by leaving groups out."""

import math

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.evaluate.uncertainty import draw_groups, jackknife, standard_errors


def test_of_a_mean_by_hand():
    values = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, sample variance 14 / 3
    found = standard_errors(lambda kept: {"mean": values[kept].mean()}, range(4))
    assert found == {"mean": pytest.approx(math.sqrt(14 / 3 / 4))}


def test_of_a_ratio_is_what_many_samples_show():
    rng = np.random.default_rng(1)

    def ratio(sample):
        return float(sample[:, 0].sum() / sample[:, 1].sum())

    def draw():
        whole = rng.integers(1, 15, 400)
        return np.stack([rng.binomial(whole, 0.6), whole], axis=1)

    spread = np.std([ratio(draw()) for _ in range(400)])
    samples = [draw() for _ in range(30)]
    told = [
        standard_errors(lambda kept, sample=sample: {"r": ratio(sample[kept])}, range(400))["r"] for sample in samples
    ]
    assert np.mean(told) == pytest.approx(spread, rel=0.15)
    assert np.std(told) / np.mean(told) < 0.25  # a group less than twenty: about a sixth


def test_samples_of_one_unit_stay_together():
    units = [i // 3 for i in range(300)]
    groups = draw_groups(units)
    assert len(groups) == 20
    assert sorted(np.concatenate(groups).tolist()) == list(range(300))
    assert {len(group) for group in groups} == {15}
    assert sum(len({units[i] for i in group}) for group in groups) == 100
    assert all((first == second).all() for first, second in zip(groups, draw_groups(units), strict=True))


def test_samples_that_repeat_each_other_tell_no_more():
    values = np.array([1.0, 2.0, 3.0, 6.0]).repeat(5)
    found = standard_errors(lambda kept: {"mean": values[kept].mean()}, [i // 5 for i in range(20)])
    assert found == {"mean": pytest.approx(math.sqrt(14 / 3 / 4))}


def test_what_cannot_be_told_is_missing():
    assert draw_groups([]) == []
    assert standard_errors(lambda kept: {"mean": 1.0}, ["one"]) == {}
    assert jackknife([{"a": 1.0, "b": math.nan}, {"a": 3.0, "b": 2.0}]) == {"a": pytest.approx(1.0)}

    def fails(kept):
        raise DataError("too few")

    assert standard_errors(fails, range(5)) == {}
