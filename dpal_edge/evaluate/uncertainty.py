"""How far a metric would be off on another sample of the same kind of data."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError

_GROUPS = 20  # parts left out in turn: tells an error to a sixth of itself, whatever a metric costs

Indices = NDArray[np.int64]
Metrics = dict[str, float]


def draw_groups(units: Sequence[Hashable], count: int = _GROUPS) -> list[Indices]:
    """Divide samples by chance into at most ``count`` groups of about as many units each, the same every time.

    Args:
        units: of each sample, what is drawn independently, for example its image: its samples stay together.

    Returns:
        The indices of each group's samples, ascending; no group is empty.
    """
    number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    ranks = np.random.default_rng(0).permutation(len(number))
    groups = ranks[[number[unit] for unit in units]] % count if number else ranks
    return [np.flatnonzero(groups == group) for group in range(min(count, len(number)))]


def jackknife(left_out: Sequence[Metrics]) -> Metrics:
    """Return the standard error of each metric from its values with one group left out in turn.

    It is that of the sampling of units, the model given. Metrics that are not finite somewhere have none.

    Source: the delete-a-group jackknife (Efron and Tibshirani, 1993, chapter 11); g groups give
    sqrt((g - 1) / g * sum of squared deviations from the mean).
    """
    count = len(left_out)
    if count < 2:
        return {}
    values = {name: np.array([metrics[name] for metrics in left_out], float) for name in left_out[0]}
    return {name: float(np.sqrt((count - 1) * v.var())) for name, v in values.items() if np.isfinite(v).all()}


def standard_errors(score: Callable[[Indices], Metrics], units: Sequence[Hashable]) -> Metrics:
    """Return the standard errors of what ``score`` computes of the samples it is given the indices of.

    None are returned where a part of the data is too small for its metrics.
    """
    everything = np.arange(len(units))
    groups = draw_groups(units)
    if len(groups) < 2:
        return {}
    try:
        return jackknife([score(np.delete(everything, group)) for group in groups])
    except DataError:
        return {}
