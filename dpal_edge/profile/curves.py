"""How the time grows with people, images and cameras, and where growing stops to pay."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpal_edge.profile.footage import PLACED

_KNEE = 0.1  # by which the next size must lower the time per person to be worth it
_FORM = ("target", "artifact", "engine", "runner", "precision", "computes")


def build_curves(measurements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the curves that ``report["measurements"]`` hold, in their order; one point alone is no curve."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for measurement in measurements:
        key: tuple[str, ...]
        if measurement["what"] == "call":
            key = ("batch", measurement["clock"], measurement["target"], measurement["runner"])
        elif measurement["placed"]:
            key = ("people" if measurement["source"] == PLACED else "cameras", measurement["clock"])
        else:
            continue
        groups.setdefault(key, []).append(measurement)
    return [_curve(x, clock, points) for (x, clock, *_), points in groups.items() if len(points) > 1]


def find_knee(sizes: Sequence[float], each_ms: Sequence[float]) -> float | None:
    """Return the first size from which the next lowers the time of each by less than 10 %; None where every one does.

    Args:
        sizes: ascending.
        each_ms: the time for so many, over their number.
    """
    pairs = zip(sizes, each_ms, each_ms[1:], strict=False)
    return next((size for size, now, later in pairs if later > (1 - _KNEE) * now), None)


def _curve(x: str, clock: str, measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ordered = sorted(measurements, key=lambda measurement: float(measurement[x]))
    points = [
        {
            "x": measurement[x],
            "p50": measurement["ms"]["p50"],
            "p50_ci95": measurement["ms"]["p50_ci95"],
            "p95": measurement["ms"]["p95"],
            "each": round(measurement["ms"]["p50"] / measurement[x], 4),
            "flags": measurement["flags"],
        }
        for measurement in ordered
    ]
    last, before = points[-1], points[-2]
    return {
        "what": ordered[0]["what"],
        "x": x,
        "clock": clock,
        **{name: ordered[0][name] for name in _FORM},
        "points": points,
        "knee": find_knee([point["x"] for point in points], [point["each"] for point in points]),
        "marginal_ms": round((last["p50"] - before["p50"]) / (last["x"] - before["x"]), 4),
    }
