"""What a series of timings says: percentiles, intervals that allow for dependence, warm-up, outliers, change."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_BLOCKS = (20, 10, 5)  # of consecutive calls; Schmeiser (1982) advises 10 to 30, whatever the number of calls
_DEPENDENT = 0.2  # autocorrelation of neighbouring blocks above which they are made longer, so fewer
_FEWEST_IN_BLOCKS = 20  # calls; fewer are a block each
_GROUP, _FEWEST_GROUPS = 5, 10  # calls, in which warm-up is looked for; in fewer groups chance would find some
_FENCE = 3.0  # interquartile ranges beyond which a call lies far out
_DIGITS = 6  # of timings in ms: below a nanosecond is nothing but rounding
_LISTED, _SAMPLES, _BINS = 20, 200, 30  # of outliers, samples and bins in a report
_CALLS_FOR = {50: 1, 90: 10, 95: 20, 99: 100}  # percentile -> calls that it takes
_SIGNIFICANT = 0.05
_SHUFFLES = 20_000

# 97.5 % quantiles of Student's t for 1 to 19 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
            2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The calls before a series is steady."""

    calls: int
    ms: float  # in all
    slowest_ms: float  # 0 where there were none
    stable: bool  # whether the series became steady at all


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Calls far out; they stay in every other number."""

    count: int
    above_ms: float
    below_ms: float
    listed: tuple[dict[str, float], ...]  # the largest: "call", from 0 after warm-up, and "ms"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many calls took how long."""

    edges: tuple[float, ...]  # ms, one more than ``counts``
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Timings of one thing, in ms, after warm-up. Intervals are of 95 %."""

    n: int
    mean: float
    ci95: tuple[float, float] | None  # of the mean; None with a single call
    p50: float
    p50_ci95: tuple[float, float] | None
    p90: float | None  # None where there are too few calls for it, as the next
    p95: float | None
    p99: float | None
    max: float
    outliers: Outliers
    warmup: Warmup
    autocorrelation: float | None  # of the medians of neighbouring blocks; None with too few
    blocks: tuple[float, ...]  # medians of consecutive calls, what two reports are compared by
    histogram: Histogram
    samples: tuple[float, ...]  # evenly out of all

    @classmethod
    def of(cls, timings_ms: Sequence[float] | Values, *, warm: bool = False) -> "Summary":
        """Summarise the timings of consecutive calls, one or more.

        Args:
            timings_ms: of all calls in their order, warm-up included.
            warm: whether warm-up was taken off before.
        """
        values: Values = np.asarray(timings_ms, np.float64).round(_DIGITS)
        start, stable = (0, True) if warm else find_steady(values)
        steady = values[start:]
        percentiles = {q: float(np.percentile(steady, q)) for q, least in _CALLS_FOR.items() if len(steady) >= least}
        blocks = split_into_blocks(steady)
        medians = np.array([np.median(block) for block in blocks])
        counts, edges = np.histogram(steady, _BINS)
        return cls(
            n=len(steady),
            mean=_short(steady.mean()),
            ci95=interval(float(steady.mean()), np.array([block.mean() for block in blocks])),
            p50=_short(percentiles[50]),
            p50_ci95=interval(percentiles[50], medians),
            **{f"p{q}": _short(percentiles[q]) if q in percentiles else None for q in (90, 95, 99)},
            max=_short(steady.max()),
            outliers=_outliers(steady),
            warmup=Warmup(
                calls=start,
                ms=_short(values[:start].sum()),
                slowest_ms=_short(values[:start].max(initial=0)),
                stable=stable,
            ),
            autocorrelation=_autocorrelation(medians),
            blocks=tuple(map(_short, medians)),
            histogram=Histogram(edges=tuple(map(_short, edges)), counts=tuple(map(int, counts))),
            samples=tuple(map(_short, steady[:: -(-len(steady) // _SAMPLES)])),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    def doubts(self) -> list[str]:
        """Return what makes the numbers less sure than they look, as sentences."""
        sentences = []
        if self.n < _FEWEST_IN_BLOCKS:
            sentences.append(f"fewer than {_FEWEST_IN_BLOCKS} calls")
        if not self.warmup.stable:
            sentences.append("never became stable")
        if self.autocorrelation is not None and self.autocorrelation > _DEPENDENT:
            sentences.append("drifts: its interval is too narrow")
        return sentences


def find_steady(values: Values) -> tuple[int, bool]:
    """Return how many calls warm-up takes, at most half of all, and whether the series is steady after them.

    Source: MSER-5 (White, 1997; the cut that leaves the least standard error; a cut beyond the half tells that the
    series is too short or drifts). Differs: medians of five calls instead of means, so that a spike in the middle is no
    warm-up; then the calls at the beginning that are slow beyond the fence of outliers are.
    """
    groups = len(values) // _GROUP
    cut, stable = 0, True
    if groups >= _FEWEST_GROUPS:
        medians = np.median(values[: groups * _GROUP].reshape(groups, _GROUP), axis=1)
        left = groups - np.arange(groups - 2)  # groups that remain after each cut; two at least
        gaps = medians - medians.mean()
        sums, squares = (np.cumsum(part[::-1])[::-1][: groups - 2] for part in (gaps, gaps**2))
        errors = np.maximum(squares - sums**2 / left, 0) / left**2
        cut = int(np.argmin(errors[: groups // 2 + 1]))
        stable = bool(errors[cut] <= errors.min(initial=np.inf, where=left >= groups // 4))
    start, above = cut * _GROUP, _fences(values[cut * _GROUP :])[1]
    while start < len(values) // 2 and values[start] > above:
        start += 1
    return start, stable


def split_into_blocks(values: Values) -> list[Values]:
    """Split into 20 blocks of equal length but for one call, into 10 or 5 where neighbours depend on one another.

    Few calls are split into half as many blocks, or into a block each below 20.
    """
    if len(values) < _FEWEST_IN_BLOCKS:
        return list(values.reshape(-1, 1))
    for count in _BLOCKS:
        blocks = np.array_split(values, min(count, len(values) // 2))
        if (_autocorrelation(np.array([np.median(block) for block in blocks])) or 0) <= _DEPENDENT:
            break
    return list(blocks)


def interval(center: float, blocks: Values) -> tuple[float, float] | None:
    """Return the 95 % interval of a statistic from its values on blocks of consecutive calls; None with one block.

    Source: batch means (Schmeiser, 1982) and batch quantiles (Seila, 1982): blocks are long enough to depend little on
    one another, however much neighbouring calls do (as many as that takes: Law and Carson, 1979).
    """
    if len(blocks) < 2:
        return None
    half = _STUDENT[len(blocks) - 2] * float(blocks.std(ddof=1)) / len(blocks) ** 0.5
    return _short(center - half), _short(center + half)


def significant_changes(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """Return, by name, the p-values of those pairs of series whose mean differs at 5 % over all ``pairs``.

    Args:
        pairs: by name, block medians before and after; blocks, because calls depend on one another.

    Source: permutation test (Pitman, 1937), correction for many tests after Holm (1979).
    """
    found = sorted((permutation_p(before, after), name) for name, (before, after) in pairs.items())
    kept = {}
    for i, (p, name) in enumerate(found):
        if p * (len(found) - i) > _SIGNIFICANT:
            break
        kept[name] = p
    return kept


def permutation_p(before: Sequence[float], after: Sequence[float]) -> float:
    """Return how likely the means of two series, shuffled together, differ by as much as they do; 5e-5 or more."""
    rng = np.random.default_rng(0)
    both = np.concatenate([before, after]).astype(np.float64)
    order = rng.permuted(np.tile(np.arange(len(both)), (_SHUFFLES, 1)), axis=1)
    firsts = both[order[:, : len(before)]].sum(axis=1)
    gaps = firsts / len(before) - (both.sum() - firsts) / len(after)
    seen = abs(float(np.mean(before) - np.mean(after)))
    return float(1 + np.count_nonzero(np.abs(gaps) >= seen * (1 - 1e-9))) / (1 + _SHUFFLES)


def _autocorrelation(blocks: Values) -> float | None:
    """Return the correlation of each block with the next one."""
    if len(blocks) < _BLOCKS[-1]:
        return None
    gaps = blocks - blocks.mean()
    power = float(gaps @ gaps)
    return round(float(gaps[1:] @ gaps[:-1]) / power, 3) if power > 0 else 0.0


def _outliers(values: Values) -> Outliers:
    below, above = _fences(values)
    calls = np.flatnonzero((values < below) | (values > above))
    largest = calls[np.argsort(-values[calls], kind="stable")][:_LISTED]
    return Outliers(
        count=len(calls),
        above_ms=_short(above),
        below_ms=_short(below),
        listed=tuple({"call": int(call), "ms": _short(values[call])} for call in largest),
    )


def _fences(values: Values) -> tuple[float, float]:
    """Return the bounds beyond which a call lies far out."""
    low, high = np.percentile(values, [25, 75])
    return float(low - _FENCE * (high - low)), float(high + _FENCE * (high - low))


def _short(value: float) -> float:
    """Round to a tenth of a microsecond; no clock here is finer."""
    return round(float(value), 4)
