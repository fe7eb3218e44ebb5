"""What was measured as ``report.json`` holds it; docs/profile.md is its description."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dpal_edge.manifest import HeadSpec
from dpal_edge.profile.samples import Sample, throttling, total_power_mw
from dpal_edge.profile.session import Measured, Session
from dpal_edge.profile.statistics import Summary, interval, split_into_blocks
from dpal_edge.profile.telemetry import Telemetry

SCHEMA = 1
STAGES = ("video", "detect", "crop", "model", "decode", "track", "draw", "age")
_MOST_POINTS = 600  # of a series over time
_FIRST_S = 60.0  # of a sustained run, against as much at its end
_BUSY = {0.5: "half", 0.25: "a quarter", 0.1: "a tenth"}  # of the CPU: more of it for others is a flag
_NOTABLE = 0.1  # by which another form must be faster to be worth a sentence


def describe_measurements(session: Session) -> list[dict[str, Any]]:
    """Return ``report["measurements"]``."""
    return [
        {
            "what": measured.labels.what,
            "source": measured.labels.source,
            "placed": measured.labels.placed,
            **measured.labels.form.to_dict(),
            "runner": measured.labels.runner,
            "batch": measured.labels.batch,
            "people": _people(measured),
            "cameras": measured.labels.cameras,
            "clock": clock,
            "ms": summary.to_dict(),
            "flags": _flags(summary, measured, session.telemetry),
            "energy_j": _energy(measured, session.telemetry),
        }
        for measured in session.measured
        for clock in measured.clocks
        if measured.series.calls
        for summary in [Summary.of(measured.series.timings_ms[clock], warm=measured.warm)]
    ]


def describe_stages(measured: Measured | None, telemetry: Telemetry) -> dict[str, Any] | None:
    """Return ``report["stages"]``: where the time of the pipeline on its source went."""
    if measured is None:
        return None
    timings = measured.series.timings_ms
    named = [("total", "glass"), *((stage, stage) for stage in STAGES if stage in timings)]
    return {
        "source": measured.labels.source,
        "runner": measured.labels.runner,
        "passes": measured.series.calls,
        "frames": measured.frames,
        "people": _people(measured),
        "stages": [
            {"name": name, "ms": Summary.of(timings[key], warm=True).to_dict()}
            for name, key in sorted(named, key=lambda pair: (*STAGES[:-1], "total", "age").index(pair[0]))
        ],
        "flags": _flags(Summary.of(timings["glass"], warm=True), measured, telemetry),
    }


def describe_heads(measured: Measured | None, heads: Sequence[HeadSpec], telemetry: Telemetry) -> dict[str, Any] | None:
    """Return ``report["heads"]``."""
    if measured is None:
        return None
    timings = {name: np.array(values) for name, values in measured.series.timings_ms.items()}
    labels, whole = measured.labels, Summary.of(timings["all"])
    start = whole.warmup.calls
    told: list[dict[str, Any]] = []
    for head in heads:
        gaps = timings["all"][start:] - timings[f"without {head.name}"][start:]  # of the same turn
        marginal = float(np.median(gaps))
        told.append({
            "name": head.name,
            "task": head.task,
            "alone": Summary.of(timings[f"alone {head.name}"]).to_dict(),
            "without": Summary.of(timings[f"without {head.name}"]).to_dict(),
            "marginal_ms": round(marginal, 4),
            "marginal_ci95": interval(marginal, np.array([np.median(block) for block in split_into_blocks(gaps)])),
            "share": round(marginal / whole.p50, 4),
        })  # fmt: skip
    separate = sum(entry["alone"]["p50"] for entry in told)
    return {
        "target": labels.form.target,
        "artifact": labels.form.artifact,
        "engine": labels.form.engine,
        "runner": labels.runner,
        "batch": labels.batch,
        "all": whole.to_dict(),
        "heads": told,
        "separate_ms": round(separate, 4),
        "saving": round(1 - whole.p50 / separate, 4),
        "flags": _flags(whole, measured, telemetry),
    }


def describe_sustained(measured: Measured | None) -> dict[str, Any] | None:
    """Return ``report["sustained"]``: how the pipeline's time moved while the device grew warm.

    The beginning and the end are compared by the detector's time: its work is the same whatever a frame shows.
    """
    if measured is None:
        return None
    timings = {name: np.array(values) for name, values in measured.series.timings_ms.items()}
    at, glass, detect, frames = (timings[name] for name in ("at", "glass", "detect", "frames"))
    window = max(1.0, float(at[-1]) / _MOST_POINTS)
    places = (at / window).astype(int)
    windows = [(float(place * window), places == place) for place in dict.fromkeys(places.tolist())]
    span = min(_FIRST_S, at[-1] / 2)
    first, last = detect[at <= span], detect[at >= at[-1] - span]
    early, late = float(np.median(first)) if len(first) else float(detect[0]), float(np.median(last))
    return {
        "minutes": round(float(at[-1]) / 60, 2),
        "window_s": window,
        "series": {
            "time_s": [start for start, _ in windows],
            "p50_ms": [round(float(np.median(glass[inside])), 4) for _, inside in windows],
            "frames": [int(frames[inside].sum()) for _, inside in windows],
        },
        "first_p50_ms": round(early, 4),
        "last_p50_ms": round(late, 4),
        "slower": round(late / early - 1, 4),
    }


def describe_clocks(session: Session) -> list[dict[str, str]]:
    """Return ``report["clocks"]``: what each clock counts."""
    glass = "from asking the source for a frame until people are drawn on it; not the camera's exposure and transfer"
    return [
        *({"clock": "device", "told": f"{name}: {told}"} for name, told in session.clocks_told.items()),
        {"clock": "host", "told": "one call from Python, with the copies in and out"},
        {"clock": "glass", "told": glass},
    ]


def describe_telemetry(session: Session) -> dict[str, Any]:
    """Return ``report["telemetry"]``; energy per frame and person is that of the pipeline on its source."""
    telemetry, on_source = session.telemetry, session.find("pipeline")
    samples = list(telemetry.samples)
    frames = on_source.frames if on_source else 0
    drawn = telemetry.energy_j(on_source.start_s, on_source.end_s) if on_source and frames else {}
    people = on_source.people if on_source else 0
    return {
        "missing": telemetry.missing,
        "warnings": telemetry.warnings,
        "energy_j": {meter: round(joules, 3) for meter, joules in telemetry.energy_j().items()},
        "per_frame": {meter: round(joules / frames, 6) for meter, joules in drawn.items()},
        "per_person": {meter: round(joules / people, 6) for meter, joules in drawn.items()} if people else {},
        "throttled": {reason: round(share, 4) for reason, share in throttling(samples).items()},
        "hottest_c": {
            name: max(sample.temperatures_c[name] for sample in samples if name in sample.temperatures_c)
            for name in _names(sample.temperatures_c for sample in samples)
        },
        "series": _series(samples[:: -(-len(samples) // _MOST_POINTS)]),
    }


def find_verdicts(report: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
    """Return ``report["verdicts"]``: what follows from the rest of the report, in sentences.

    Args:
        report: all else of it.
        images: of the calls whose time ranks forms.
    """
    found = [*_budget(report), *_faster(report["measurements"], report["bundle"]["used"], images)]
    state = report["machine"]["clock_state"]
    if state != "locked":
        how = "nothing here tells clocks" if state == "unknown" else "clocks are not locked"
        advice = "measure twice before you sign a number" if state == "unknown" else "--lock-clocks locks them"
        found.append(_verdict("clocks", None, f"{how}: another run may differ by more than the intervals; {advice}"))
    if share := report["telemetry"]["throttled"].get("any"):
        text = f"the device slowed itself down {100 * share:.0f} % of the time: the numbers are of a device too hot or "
        found.append(_verdict("throttled", False, text + "with too little power"))
    if (sustained := report["sustained"]) is not None:
        text = f"after {sustained['minutes']:.1f} minutes the detector takes {sustained['last_p50_ms']:.2f} ms, at "
        text += f"the beginning {sustained['first_p50_ms']:.2f} ms ({100 * sustained['slower']:+.0f} %)"
        found.append(_verdict("sustained", None, text))
    if report["interrupted"]:
        found.append(_verdict("interrupted", None, f"{report['interrupted']}; the report holds what came before"))
    return found


def _budget(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict on --budget: of the pipeline on its source, or of a call with one image without it."""
    budget = report["options"]["budget_ms"]
    if budget is None:
        return []
    of_source = [m for m in report["measurements"] if m["what"] == "pipeline" and not m["placed"]]
    of_calls = [m for m in report["measurements"] if m["what"] == "call" and m["clock"] == "host"]
    for measurement in (of_source or of_calls)[:1]:
        ms, source = measurement["ms"], measurement["source"]
        value, name = (ms["max"], "the slowest") if ms["p95"] is None else (ms["p95"], "p95")
        what = (
            f"from the frames of {source} to drawn people"
            if of_source
            else f"of a call, images {measurement['batch']},"
        )
        words = "holds" if value <= budget else "is missed"
        text = f"the budget of {budget:g} ms {words}: {name} {what} is {value:.2f} ms"
        return [_verdict("budget", value <= budget, text)]
    return [_verdict("budget", False, f"the budget of {budget:g} ms cannot be judged: nothing was measured")]


def _faster(measurements: Sequence[Mapping[str, Any]], used: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
    """Return a sentence if another form than the one that is used takes much less time."""
    ranked = rank_calls(measurements, images)
    own = next((m for m in ranked if all(m[name] == value for name, value in used.items())), None)
    if own is None or ranked[0]["ms"]["p50"] > (1 - _NOTABLE) * own["ms"]["p50"]:
        return []
    best = ranked[0]
    text = (
        f"{best['target']} with {best['runner']} takes {best['ms']['p50']:.2f} ms, images {best['batch']}, what run "
        f"uses takes {own['ms']['p50']:.2f} ms: `dpal-edge install` chooses the fastest that computes right"
    )
    return [_verdict("form", None, text)]


def rank_calls(measurements: Sequence[Mapping[str, Any]], images: int) -> list[Mapping[str, Any]]:
    """Return the calls with so many images, or with the nearest number measured, by the host's clock, fastest first."""
    calls = [m for m in measurements if m["what"] == "call" and m["clock"] == "host"]
    nearest = min((m["batch"] for m in calls), key=lambda batch: abs(batch - images), default=None)
    return sorted((m for m in calls if m["batch"] == nearest), key=lambda m: m["ms"]["p50"])


def _verdict(kind: str, passed: bool | None, text: str) -> dict[str, Any]:
    return {"kind": kind, "passed": passed, "text": text}


def _people(measured: Measured) -> float | None:
    """Return the people of a call or pass that were asked for, or those that were found per frame."""
    if measured.labels.people is not None:
        return measured.labels.people
    return round(measured.people / measured.frames, 3)


def _flags(summary: Summary, measured: Measured, telemetry: Telemetry) -> list[str]:
    others = others_share(measured, telemetry.samples)
    busy = [f"other programs took more than {share} of the CPU" for least, share in _BUSY.items() if others > least][:1]
    unknown = [] if telemetry.clocks else ["clocks are unknown"]
    return [*summary.doubts(), *busy, *unknown, *telemetry.warnings_between(measured.start_s, measured.end_s)]


def others_share(measured: Measured, samples: Sequence[Sample]) -> float:
    """Return the share of all cores, 0 to 1, that other processes took during a measurement; 0 where unknown.

    A hypervisor that gives the time to another machine counts among them.
    """
    busy_s = capacity_s = 0.0
    for before, sample in pairwise(samples):
        loads = [core.load for core in sample.cores if core.load is not None]
        if before.time_s is None or sample.time_s is None or not loads:
            continue
        if measured.start_s <= before.time_s and sample.time_s <= measured.end_s:
            seconds = sample.time_s - before.time_s
            busy_s += sum(loads) / 100 * seconds
            capacity_s += len(loads) * seconds
    return max(0.0, busy_s - measured.cpu_s) / capacity_s if capacity_s else 0.0


def _energy(measured: Measured, telemetry: Telemetry) -> dict[str, dict[str, float | None]] | None:
    """Return by meter the joules of a call or pass, and of a person."""
    calls, people = measured.series.calls, measured.people
    return {
        meter: {"call": round(joules / calls, 6), "person": round(joules / people, 6) if people else None}
        for meter, joules in telemetry.energy_j(measured.start_s, measured.end_s).items()
    } or None


def _series(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what moved while measuring, each as long as ``time_s``."""
    began = samples[0].time_s or 0.0
    return {
        "time_s": [round((sample.time_s or 0.0) - began, 2) for sample in samples],
        "temperatures_c": {
            name: [sample.temperatures_c.get(name) for sample in samples]
            for name in _names(sample.temperatures_c for sample in samples)
        },
        "rails_mw": {
            name: [sample.rails[name].mw if name in sample.rails else None for sample in samples]
            for name in _names(sample.rails for sample in samples)
        },
        "gpu_mhz": [max(sample.gpu_mhz, default=None) for sample in samples],
        "cpu_mhz": [_mean(core.mhz for core in sample.cores) for sample in samples],
        "gpu_load": [sample.gpu_load for sample in samples],
        "cpu_load": [_mean(core.load for core in sample.cores) for sample in samples],
        "total_mw": [total_power_mw(sample) for sample in samples],
        "throttled": [list(sample.throttled) for sample in samples],
    }


def _names(maps: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in maps for name in mapping))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None
