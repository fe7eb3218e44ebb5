"""Ridge regression from sums."""

import numpy as np
import pytest

from dpal_edge.probe.ridge import PENALTIES, LinearMap, Moments, _solve, discriminate, fit_ridge, sum_moments


def _noisy(n, rng, noise=1.0):
    x = rng.normal(size=(n, 6)) * [1, 2, 3, 40, 0.5, 1] + 5
    y = x @ rng.normal(size=(6, 2)) + 7
    return x, y + noise * rng.normal(size=y.shape)


def test_two_points_by_hand():
    # x = -1, 1 and y = 1, 3: standardised covariance 1, so the slope is 1 / (1 + penalty) around the mean 2.
    moments = Moments.of(np.array([[-1.0], [1.0]]), np.array([[1.0], [3.0]]))
    for linear in _solve(moments, (0.5, 1.0, 3.0)):
        assert linear(np.array([[1.0]])).item() == pytest.approx(2 + 1 / (1 + linear.penalty))


def test_sums_of_parts_are_the_sum_of_all():
    x, y = _noisy(30, np.random.default_rng(0))
    parts = sum_moments((x[i : i + 7], y[i : i + 7]) for i in range(0, 30, 7))
    for name, value in vars(Moments.of(x, y)).items():
        np.testing.assert_allclose(getattr(parts, name), value)


def test_agrees_with_a_second_implementation():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    x, y = _noisy(50, np.random.default_rng(1))
    scaler = StandardScaler().fit(x)
    for linear in _solve(Moments.of(x, y), (0.01, 1.0)):
        expected = Ridge(alpha=linear.penalty * len(x)).fit(scaler.transform(x), y).predict(scaler.transform(x))
        np.testing.assert_allclose(linear(x), expected)


def test_the_scale_of_an_input_and_a_constant_input_change_nothing():
    x, y = _noisy(40, np.random.default_rng(2))
    other = np.concatenate([x * [1, 100, 1, 1e-3, 1, 1] - 3, np.full((40, 1), 0.1)], axis=1)
    fits = [fit_ridge(Moments.of(rows[10:], y[10:]), Moments.of(rows[:10], y[:10]))(rows) for rows in (x, other)]
    np.testing.assert_allclose(*fits, rtol=1e-6)


@pytest.mark.parametrize("noise", [1e-3, 1e3])
def test_the_penalty_is_the_one_that_predicts_held_out_rows_best(noise):
    x, y = _noisy(300, np.random.default_rng(3), noise)
    fit, held = slice(100, None), slice(100)
    errors = {
        linear.penalty: (((linear(x[held]) - y[held]) ** 2).mean(0) / y[held].var(0)).sum()
        for linear in _solve(Moments.of(x[fit], y[fit]), PENALTIES)
    }
    best = min(errors, key=errors.get)
    assert fit_ridge(Moments.of(x[fit], y[fit]), Moments.of(x[held], y[held])).penalty == best
    assert (best == PENALTIES[0]) == (noise < 1)


def test_discriminants_are_those_of_linear_discriminant_analysis():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rng = np.random.default_rng(4)
    labels = rng.choice(4, size=600, p=[0.7, 0.2, 0.07, 0.03])
    x = rng.normal(size=(600, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=(4, 5))[labels]
    moments = Moments.of(x, np.eye(4)[labels])
    [linear] = _solve(moments, (1e-9,))
    logits = discriminate(linear, moments)(x)
    expected = LinearDiscriminantAnalysis().fit(x, labels)
    assert (logits.argmax(1) == expected.predict(x)).mean() > 0.99
    assert (logits.argmax(1) == 3).sum() > (linear(x).argmax(1) == 3).sum()  # a rare class is found


def test_a_class_that_is_nowhere_is_never_chosen():
    x = np.array([[0.0], [0.1], [1.0], [1.1]])
    moments = Moments.of(x, np.eye(3)[[0, 0, 2, 2]])
    [linear] = _solve(moments, (1e-3,))
    logits = discriminate(linear, moments)(x)
    assert logits.argmax(1).tolist() == [0, 0, 2, 2]
    assert np.isfinite(logits).all()


def test_features_that_say_nothing_leave_the_commonest_class():
    x, labels = np.ones((10, 3)), [0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    moments = Moments.of(x, np.eye(3)[labels])
    linear = fit_ridge(moments, moments)
    assert isinstance(linear, LinearMap)
    np.testing.assert_allclose(np.exp(discriminate(linear, moments)(x)), np.tile([0.1, 0.6, 0.3], (10, 1)))
