"""What a device said of its power, heat and clocks at one moment, and what a series of such moments means.

A sample is the same whether it was read here or parsed from a recording, so all that is computed from samples holds for
both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Rails that feed the whole module: TX2, Xavier NX, Orin Nano and NX; Nano of 2019; some releases for Thor.
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
# AGX Orin has none; these three feed it side by side (NVIDIA's developer guide for Jetson Linux, power monitors).
_AGX_ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")

# A governor gives a busy GPU its highest clock, so a busy GPU well below the highest seen is being held down.
_BUSY_PERCENT = 90.0
_HELD_DOWN = 0.9  # of the highest clock


@dataclass(frozen=True, kw_only=True)
class Core:
    """A CPU core; both are None where it is offline."""

    load: float | None = None  # percent
    mhz: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rail:
    """The power through one supply rail, or into one GPU card."""

    mw: float
    average_mw: float | None = None  # since the recorder started; None where it keeps none


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One moment of a device; what it did not tell is None or empty."""

    time_s: float | None = (
        None  # of ``time.monotonic`` when read here; of the wall clock, in whole seconds, if recorded
    )
    ram_used_mb: int | None = None  # of 1024 * 1024 bytes
    ram_total_mb: int | None = None
    cores: tuple[Core, ...] = ()
    gpu_load: float | None = None  # percent; of the busiest where there are several
    gpu_mhz: tuple[float, ...] = ()  # of each clock domain, or of each card
    emc_load: float | None = None  # percent of the memory's bandwidth
    emc_mhz: float | None = None  # clock of the memory
    temperatures_c: Mapping[str, float] = field(default_factory=dict)  # by sensor; offline sensors are left out
    rails: Mapping[str, Rail] = field(default_factory=dict)
    counters_j: Mapping[str, float] = field(
        default_factory=dict
    )  # energy by meter; only differences between samples mean something
    throttled: tuple[str, ...] = ()  # why the device slows itself down, as far as it says


def total_power_mw(sample: Sample) -> float | None:
    """Return the power that the whole module draws, in mW.

    None where its rails do not tell: a Thor that lists no VIN, an AGX Orin with a rail missing, a desktop.
    """
    for name in _TOTAL_RAILS:
        if name in sample.rails:
            return sample.rails[name].mw
    if all(name in sample.rails for name in _AGX_ORIN_RAILS):
        return sum(sample.rails[name].mw for name in _AGX_ORIN_RAILS)
    return None


def energy_j(
    samples: Iterable[Sample],
    power_mw: Callable[[Sample], float | None] = total_power_mw,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
) -> float | None:
    """Integrate a power over time by the trapezoid rule.

    Args:
        samples: those without a time or without that power are passed over, and bridged by a straight line.
        power_mw: what to integrate, in mW.
        start_s: on the clock of the samples; the first sample where None.
        end_s: likewise, the last sample.

    Returns:
        Joules, or None where no samples span the whole time from ``start_s`` to ``end_s``.
    """
    window = _window(samples, power_mw, start_s, end_s)
    if window is None:
        return None
    times, milliwatts = window
    return float(np.sum(np.diff(times) * (milliwatts[1:] + milliwatts[:-1]))) / 2000


def metered_j(
    samples: Iterable[Sample], meter: str, *, start_s: float | None = None, end_s: float | None = None
) -> float | None:
    """Return the joules that a meter counted: exact between two samples, interpolated for moments beside them.

    Args and None as for :func:`energy_j`.
    """
    window = _window(samples, lambda sample: sample.counters_j.get(meter), start_s, end_s)
    return None if window is None else float(window[1][-1] - window[1][0])


def throttling(samples: Sequence[Sample], among: Sequence[Sample] = ()) -> dict[str, float]:
    """Return the share of samples, above 0 to 1, in which the device slowed itself down, by reason.

    "any" is the share in which there was a reason at all; empty where there never was. Besides the reasons that the
    device gives, a GPU that is at least 90 % busy below 90 % of its highest clock counts: the highest in ``samples``,
    or in ``among``, of which they may be a part.
    """
    highest = max((mhz for sample in (*samples, *among) for mhz in sample.gpu_mhz), default=0.0)
    counts: dict[str, int] = {}
    for sample in samples:
        reasons = {*sample.throttled, *(["GPU clock drop"] if _held_down(sample, highest) else [])}
        for reason in sorted(reasons) + ["any"] * bool(reasons):
            counts[reason] = counts.get(reason, 0) + 1
    return {reason: count / len(samples) for reason, count in counts.items()}


def warnings(samples: Sequence[Sample], among: Sequence[Sample] = ()) -> list[str]:
    """Return a sentence for all that makes numbers taken during ``samples``, a part of ``among``, doubtful."""
    sentences = []
    shares = throttling(samples, among)
    if share := shares.pop("any", None):
        reasons = ", ".join(f"{reason} {100 * part:.0f} %" for reason, part in shares.items())
        sentences.append(f"throttled {100 * share:.0f} % of the time: {reasons}")
    unknown = sum(total_power_mw(sample) is None for sample in samples)
    if 0 < unknown < len(samples):
        sentences.append(f"total power was unknown in {unknown} of {len(samples)} samples, energy is bridged there")
    return sentences


def _window(
    samples: Iterable[Sample],
    quantity: Callable[[Sample], float | None],
    start_s: float | None,
    end_s: float | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the times from ``start_s`` to ``end_s`` with the quantity at each, both ends included."""
    known = sorted(
        (sample.time_s, value)
        for sample in samples
        if sample.time_s is not None and (value := quantity(sample)) is not None
    )
    if len(known) < 2:
        return None
    times, values = np.array(known, dtype=np.float64).T
    start = times[0] if start_s is None else start_s
    end = times[-1] if end_s is None else end_s
    if not times[0] <= start <= end <= times[-1]:
        return None
    inside = (times > start) & (times < end)
    moments = np.concatenate([[start], times[inside], [end]])
    return moments, np.interp(moments, times, values)


def _held_down(sample: Sample, highest_mhz: float) -> bool:
    busy = sample.gpu_load is not None and sample.gpu_load >= _BUSY_PERCENT
    return busy and 0 < max(sample.gpu_mhz, default=0.0) < _HELD_DOWN * highest_mhz
