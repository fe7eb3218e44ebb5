"""A report in a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from dpal_edge.profile.wording import as_ms, as_passes

_PASSED = {True: "ok", False: "FAILED", None: "note"}
_NUMBERS = ("p50", "+-", "p90", "p95", "p99", "max", "mean", "+-", "calls", "far out", "marks")
_EACH = {"batch": "image", "people": "person", "cameras": "camera"}


def as_text(report: Mapping[str, Any], out: Path) -> str:
    """Return the report as tables and sentences; ``out`` is the folder that the whole of it was written to."""
    machine, bundle, used = report["machine"], report["bundle"], report["bundle"]["used"]
    mode = f", power mode {machine['power_mode']}" if machine["power_mode"] else ""
    held = [*report["measurements"], *(part for part in (report["stages"], report["heads"]) if part)]
    marks = _letters(held)
    parts = [
        f"{bundle['name']} on {machine['model'] or machine['cpu']}, {machine['cores']} cores{mode}, clocks "
        f"{machine['clock_state']}; run uses {_form(used)}",
        _pipelines([m for m in report["measurements"] if m["clock"] == "glass"], marks),
        _stages(report["stages"], marks),
        _calls([m for m in report["measurements"] if m["what"] == "call"], marks),
        "\n".join(f"[{letter}] {flag}" for flag, letter in marks.items()),
        "\n".join(_curve(curve, marks) for curve in report["curves"] if curve["clock"] != "device"),
        _heads(report["heads"], marks),
        _energy(report["telemetry"]),
        "\n".join(
            [
                *(f"not here: {sentence}" for sentence in report["telemetry"]["missing"]),
                *(f"left out: {one['target']} with {one['engine']}: {one['reason']}" for one in report["skipped"]),
                *(f"{_PASSED[verdict['passed']]}: {verdict['text']}" for verdict in report["verdicts"]),
                f"written: {out / 'report.json'}, and for people {out / 'report.html'}",
            ]
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _pipelines(measurements: Sequence[Mapping[str, Any]], marks: Mapping[str, str]) -> str:
    rows = []
    for m in measurements:
        known = m["people"] is not None and not m["placed"]
        told = f"{m['source']}, {m['people']:.1f} people a frame" if known else f"{m['source']}: {m['people']}"
        rows.append([f"{m['what']}, {told}", *_numbers(m["ms"]), _marks([m], marks)])
    return _table(["ms from frame to drawn people (glass)", *_NUMBERS], rows)


def _calls(measurements: Sequence[Mapping[str, Any]], marks: Mapping[str, str]) -> str:
    """Return a row for each number of images of each form: the engine's own clock beside that of the host."""
    rows: dict[str, list[str]] = {}
    for m in measurements:
        row = rows.setdefault(f"{_form(m)}, {m['batch']}", ["-"])
        if m["clock"] == "device":
            row[0] = as_ms(m["ms"]["p50"])
        else:
            row += [*_numbers(m["ms"]), _marks([m], marks)]
    table = [[name, *cells] for name, cells in rows.items()]
    return _table(["ms of a call, images", "device p50", *(f"host {_NUMBERS[0]}", *_NUMBERS[1:])], table)


def _stages(stages: Mapping[str, Any] | None, marks: Mapping[str, str]) -> str:
    if stages is None:
        return ""
    told = ", ".join(f"{stage['name']} {as_ms(stage['ms']['mean'])}" for stage in stages["stages"])
    return f"mean ms of {as_passes(stages)} of {stages['source']}: {told} {_marks([stages], marks)}"


def _curve(curve: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    each = ", ".join(f"{point['x']}: {as_ms(point['each'])}" for point in curve["points"])
    knee = "no knee" if curve["knee"] is None else f"knee at {curve['knee']}"
    of, letters = f"{_EACH[curve['x']]}, {_form(curve)} ({curve['clock']})", _marks(curve["points"], marks)
    return f"ms per {of} of {each}; {knee} {letters}"


def _heads(heads: Mapping[str, Any] | None, marks: Mapping[str, str]) -> str:
    if heads is None:
        return ""
    rows = [
        [
            head["name"],
            as_ms(head["marginal_ms"]),
            _half(head["marginal_ci95"]),
            f"{100 * head['share']:.1f} %",
            as_ms(head["alone"]["p50"]),
        ]
        for head in heads["heads"]
    ]
    title = f"head, {heads['target']} {heads['engine']}, {heads['batch']} images"
    return (
        f"{_table([title, 'costs ms', '+-', 'share', 'backbone and it alone'], rows)}\n"
        f"all on one backbone {as_ms(heads['all']['p50'])} ms, a network for each {as_ms(heads['separate_ms'])} ms: "
        f"{100 * heads['saving']:.0f} % saved {_marks([heads], marks)}"
    )


def _energy(telemetry: Mapping[str, Any]) -> str:
    people = telemetry["per_person"]
    return "\n".join(
        f"energy {meter}: {1e3 * joules:.1f} mJ a frame"
        + (f", {1e3 * people[meter]:.1f} mJ a person" if meter in people else "")
        for meter, joules in telemetry["per_frame"].items()
    )


def _form(told: Mapping[str, Any]) -> str:
    return " ".join(told[name] for name in ("target", "engine", "computes") if told[name])


def _letters(measurements: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a short mark for each flag, in the order in which they come."""
    flags = dict.fromkeys(flag for measurement in measurements for flag in measurement["flags"])
    return {flag: ascii_lowercase[i] if i < len(ascii_lowercase) else f"{i}" for i, flag in enumerate(flags)}


def _marks(numbers: Sequence[Mapping[str, Any]], marks: Mapping[str, str]) -> str:
    """Return the marks that any of some numbers bears."""
    borne = "".join(letter for flag, letter in marks.items() if any(flag in number["flags"] for number in numbers))
    return f"[{borne}]" if borne else ""


def _numbers(ms: Mapping[str, Any]) -> list[str]:
    percentiles = [as_ms(ms[name]) for name in ("p90", "p95", "p99", "max", "mean")]
    return [as_ms(ms["p50"]), _half(ms["p50_ci95"]), *percentiles, _half(ms["ci95"]), str(ms["n"]),
            str(ms["outliers"]["count"] or "")]  # fmt: skip


def _half(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else as_ms((interval[1] - interval[0]) / 2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with the first column left, the others right; nothing without rows."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
