"""Calls, repeated until their time is known well enough."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dpal_edge.profile.statistics import find_steady, interval, split_into_blocks

_LOOK_AGAIN = 1.25  # times as many calls, until the interval is computed again
_IN_A_ROW = 2  # looks that must find it narrow enough: one may do so by chance


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to go on.

    Source: 200 ms of warm-up and more are what trtexec and NVIDIA's advice for Jetson ask for; stopping at an interval
    relative to the value, Georges et al. (2007).
    """

    least_calls: int = 30
    least_s: float = 0.5
    usual_s: float = 3.0  # at most, if there are enough calls by then
    most_s: float = 10.0
    precision: float = 0.01  # half the interval of the median, over the median


@dataclass
class Series:
    """Timings of consecutive calls in ms, by what was timed; what came before an interruption is kept."""

    timings_ms: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0

    def collect(
        self,
        step: Callable[[], Mapping[str, float]],
        effort: Effort,
        *,
        decides: str,
        check: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Repeat ``step`` until the median of one of its timings is known to ``effort.precision``, or time is up.

        Args:
            step: makes a call, and returns what it took in ms by name, the same names each time.
            effort: when to end.
            decides: the timing whose median must be known.
            check: called after each call; may raise to end the series.
            clock: in seconds.
        """
        began, look_at, narrow = clock(), effort.least_calls, 0
        try:
            while True:
                for name, ms in step().items():
                    self.timings_ms.setdefault(name, []).append(ms)
                self.calls += 1
                check()
                passed = clock() - began
                if passed >= effort.most_s or (passed >= effort.usual_s and self.calls >= effort.least_calls):
                    return
                if passed >= effort.least_s and self.calls >= look_at:
                    narrow = narrow + 1 if _precise(self.timings_ms[decides], effort.precision) else 0
                    if narrow == _IN_A_ROW:
                        return
                    look_at = int(self.calls * _LOOK_AGAIN)
        finally:  # an interrupt may come between the timings of one call
            for timings in self.timings_ms.values():
                del timings[self.calls :]


def _precise(timings_ms: list[float], precision: float) -> bool:
    """Whether a series is steady and the median of its steady part is known."""
    values = np.array(timings_ms)
    start, stable = find_steady(values)
    steady = values[start:]
    middle = float(np.median(steady))
    bounds = interval(middle, np.array([np.median(block) for block in split_into_blocks(steady)]))
    return stable and bounds is not None and bounds[1] - bounds[0] <= 2 * precision * middle
