"""Linear regression in closed form, from sums: no feature is kept, so no data set is too large for memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating]
_TINY = float(np.finfo(np.float64).tiny)
PENALTIES = tuple(10.0**power for power in range(-4, 4))  # where standardised inputs have variance 1


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over n pairs of an input (D,) and an output (O,), in float64."""

    count: float
    x: NDArray[np.float64]  # (D,)
    y: NDArray[np.float64]  # (O,)
    xx: NDArray[np.float64]  # (D, D)
    xy: NDArray[np.float64]  # (D, O)
    yy: NDArray[np.float64]  # (O,), squares of each output alone

    @classmethod
    def of(cls, inputs: Rows, outputs: Rows) -> "Moments":
        """Sum over the rows of ``inputs`` (n, D) and ``outputs`` (n, O)."""
        x, y = inputs.astype(np.float64), outputs.astype(np.float64)
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )


@dataclass(frozen=True, eq=False)
class LinearMap:
    """An affine map from (..., D) to (..., O)."""

    weight: NDArray[np.float64]  # (D, O)
    bias: NDArray[np.float64]  # (O,)
    penalty: float  # it was fitted with

    def __call__(self, inputs: Rows) -> NDArray[np.float64]:
        """Map rows of inputs to outputs."""
        mapped: NDArray[np.float64] = inputs @ self.weight + self.bias
        return mapped


def sum_moments(pairs: Iterable[tuple[Rows, Rows]]) -> Moments:
    """Sum the moments of batches of inputs (n, D) and outputs (n, O); at least one batch."""
    batches = (Moments.of(inputs, outputs) for inputs, outputs in pairs)
    total = next(batches)
    for moments in batches:
        total = total + moments
    return total


def fit_ridge(fit: Moments, held: Moments) -> LinearMap:
    """Fit a ridge regression to both parts, with the penalty under which ``fit`` alone predicts ``held`` best.

    Inputs are standardised, the bias is free, and the error is the squared one, each output's in units of its variance
    in ``held``; outputs without variance there do not count.
    """
    errors = {candidate.penalty: _error(candidate, held) for candidate in _solve(fit, PENALTIES)}
    [best] = _solve(fit + held, (min(errors, key=errors.__getitem__),))
    return best


def discriminate(linear: LinearMap, moments: Moments) -> LinearMap:
    """Turn a regression on the shares of classes into one on their log probabilities, but for a term they all share.

    The outputs, which sum to 1 in each row, are taken as classes with normal distributions of one covariance in the
    space of the regression's values. The regression's own greatest value would hardly ever be a rare class's.

    Args:
        linear: fitted to ``moments`` or part of it.

    Source: penalised discriminant analysis, Hastie, Buja and Tibshirani (1995).
    """
    center, share = moments.x / moments.count, moments.y / moments.y.sum()
    # A class that is nowhere gets no weight, and a probability next to nothing.
    means = (moments.xy / np.maximum(moments.y, _TINY)).T - np.outer(moments.y > 0, center)
    means = means @ linear.weight
    spread = linear.weight.T @ (moments.xx / moments.count - np.outer(center, center)) @ linear.weight
    within = spread - (means.T * share) @ means
    # Outputs sum to 1, so one direction is empty; and classes that are told apart without fail have no spread at all.
    loose = np.eye(len(share)) * (1e-6 * spread.trace() / len(share) + _TINY)
    toward = np.linalg.solve(within + loose, means.T)
    weight = linear.weight @ toward
    offset = np.log(np.maximum(share, _TINY)) - (means.T * toward).sum(0) / 2
    return LinearMap(weight, offset - center @ weight, linear.penalty)


def _solve(moments: Moments, penalties: Iterable[float]) -> Iterator[LinearMap]:
    """Yield the map for each penalty; the eigenvectors serve them all."""
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    covariance = moments.xx / moments.count - np.outer(mean_x, mean_x)
    variance = covariance.diagonal()
    # Rounding leaves a little variance in inputs that are constant: those get no weight.
    varies = variance > 1e-12 * moments.xx.diagonal() / moments.count
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    values, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    cross = vectors.T @ (scale[:, None] * (moments.xy / moments.count - np.outer(mean_x, mean_y)))
    for penalty in penalties:
        weight = scale[:, None] * (vectors @ (cross / (np.maximum(values, 0) + penalty)[:, None]))
        yield LinearMap(weight, mean_y - mean_x @ weight, penalty)


def _error(linear: LinearMap, held: Moments) -> float:
    """Return the squared error of ``linear`` on what ``held`` sums, over each output's variance, summed."""
    weight, bias, n = linear.weight, linear.bias, held.count
    squares = held.yy - 2 * ((weight * held.xy).sum(0) + bias * held.y)
    squares += (weight * (held.xx @ weight)).sum(0) + 2 * bias * (held.x @ weight) + n * bias**2
    variance = held.yy / n - (held.y / n) ** 2
    counts = variance > 1e-12 * np.maximum(held.yy / n, _TINY)
    return float((squares[counts] / n / variance[counts]).sum())
