"""The report of a profile for people: one HTML page, which needs nothing else and reads well on a phone.

The page shows what ``report.json`` holds (docs/profile.md) and computes nothing that is not there. What was not
measured is left out, and every number that was taken under doubtful conditions says so.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dpal_edge.html import bars, page, table
from dpal_edge.profile.page_blocks import conditions, show_layers, show_roofline
from dpal_edge.profile.plots import COLOURS, Axis, Plot, axis, grid, stacked_bar
from dpal_edge.profile.wording import as_count, as_decimal, as_html, as_ms, as_passes, as_percent, or_dash

_Report = Mapping[str, Any]

_STYLE = """<style>
.bad { color: var(--bad); font-weight: 600; } .warn { color: var(--second); font-weight: 600; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1rem 0; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .8rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
ul { padding-left: 1.2rem; margin: .5rem 0; } li { margin: .25rem 0; overflow-wrap: anywhere; }
ul.verdicts { list-style: none; padding: 0; } .verdicts li { padding: .5rem .7rem .5rem 2rem; border-radius: 8px;
  background: var(--card); margin: .4rem 0; position: relative; }
.verdicts li::before { position: absolute; left: .75rem; font-weight: 700; content: "\\00b7"; }
.verdicts .yes::before { content: "\\2713"; color: var(--good); }
.verdicts .no::before { content: "\\2717"; color: var(--bad); }
.verdicts .mind::before { content: "!"; color: var(--second); }
.key { display: inline-block; margin: .1rem .9rem .1rem 0; } .key i { display: inline-block; width: .7em; height: .7em;
  border-radius: 2px; margin-right: .35em; }
svg.bar { height: 1.9rem; border-radius: 6px; margin: .4rem 0; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
p, h1, h2, td { overflow-wrap: anywhere; } td + td, th + th { white-space: nowrap; }
@media (max-width: 30rem) { th, td { padding: .35rem .3rem; } table { font-size: .88rem; } }
td.words, th.words { white-space: normal; text-align: left; min-width: 15rem; }
</style>"""

_MOST_LINES = 6  # in a plot of curves
_BINS = 40
_HEAT = "color-mix(in srgb, var(--bad) 22%, transparent)"


def render_page(report: _Report) -> str:
    """Return the page of a report as ``report.json`` holds it; sections that are absent, null or empty are left out."""
    bundle, machine = report.get("bundle") or {}, report.get("machine") or {}
    device = machine.get("model") or machine.get("cpu") or "this device"
    sections = [_STYLE, *_opening(report), *_verdicts(report)]
    parts: Sequence[tuple[str, Callable[[_Report], list[str]]]] = (
        ("Three clocks", _clocks),
        ("Spread of the times", _distributions),
        ("Where a frame's time goes", _stages),
        ("Curves", _curves),
        ("What each head costs", _heads),
        ("Over time", _sustained),
        ("Power, clocks and heat", _telemetry),
        ("Blocks of the model", show_layers),
        ("Roofline", show_roofline),
        ("What is missing", _missing),
        ("How this was measured", _method),
    )
    for title, show in parts:
        if shown := show(report):
            sections += [f"<h2>{escape(title)}</h2>", *shown]
    return page(f"{bundle.get('name') or 'A model'} on {device}", sections)


def _opening(report: _Report) -> list[str]:
    """Return what was measured when, and the few numbers that most people come for."""
    bundle, used = report.get("bundle") or {}, (report.get("bundle") or {}).get("used") or {}
    words = [
        f"{used['target']} with {_engine(used)}" if used.get("target") else "",
        " x ".join(map(str, (bundle.get("input") or {}).get("size") or ())) + " pixels" if bundle.get("input") else "",
        f"measured {str(report['created']).replace('T', ' ').partition('+')[0]} UTC" if report.get("created") else "",
        f"dpal-edge {report['version']}" if report.get("version") else "",
    ]
    tiles = [_tile(*one) for one in _numbers(report)]
    return [
        f"<p class='soft'>{escape(', '.join(filter(None, words)))}</p>",
        f"<div class='tiles'>{''.join(tiles)}</div>" if tiles else "",
    ]


def _tile(value: str, text: str, doubt: object) -> str:
    mark = " <span class='warn'>!</span>" if doubt else ""
    return f"<div class='tile'><b>{escape(value)}{mark}</b>{escape(text)}</div>"


def _numbers(report: _Report) -> Iterable[tuple[str, str, object]]:
    """Yield numbers, what they are, and whether they are in doubt."""
    calls = [m for m in _of_used(report, "call") if m["clock"] == "host"]
    if calls:
        first = min(calls, key=lambda m: m["batch"])
        text = f"median of a call with {as_count(first['batch'], 'person', 'people')}"
        yield f"{as_ms(first['ms']['p50'])} ms", text, first.get("flags")
    for one in _of_used(report, "pipeline"):
        if not one.get("placed"):
            key = "p95" if one["ms"]["p95"] is not None else "max"
            text = f"{key} from {_pass(one)} to drawn people, {as_decimal(one['people'])} per frame"
            yield f"{as_ms(one['ms'][key])} ms", text, one.get("flags")
            break
    energy = (report.get("telemetry") or {}).get("per_frame") or {}
    for meter, joules in itertools.islice(energy.items(), 1):
        yield f"{1e3 * joules:.3g} mJ", f"per frame, {meter}", conditions(report)
    if heads := report.get("heads"):
        yield f"{heads['saving']:.0%}", f"saved by one backbone for {len(heads['heads'])} heads", heads.get("flags")


def _verdicts(report: _Report) -> list[str]:
    """Return the verdicts, then what casts doubt on all numbers."""
    classes = {True: "yes", False: "no", None: "mind"}
    told = [(classes[v.get("passed")], str(v.get("text", ""))) for v in report.get("verdicts") or ()]
    if report.get("interrupted") and not any(v.get("kind") == "interrupted" for v in report.get("verdicts") or ()):
        told.insert(0, ("no", f"{report['interrupted']}; what follows was measured until then"))
    warnings = (report.get("telemetry") or {}).get("warnings") or ()
    of_clocks = any(v.get("kind") == "clocks" for v in report.get("verdicts") or ())
    told += [("mind", text) for text in warnings if not (of_clocks and text.startswith("clocks are not locked"))]
    items = "".join(f'<li class="{kind}">{as_html(text[:1].upper() + text[1:])}</li>' for kind, text in told)
    return [f"<ul class='verdicts'>{items}</ul>"] if items else []


def _clocks(report: _Report) -> list[str]:
    shown = _headline(report)
    if not shown:
        return []
    others = [m for m in report["measurements"] if m not in shown]
    told = [f"<li><b>{escape(c['clock'])}</b>: {escape(c['told'])}</li>" for c in report.get("clocks") or ()]
    return [
        "<p class='soft'>Milliseconds. Below the mean stands how far chance alone may have moved it.</p>",
        _side_by_side(shown),
        _doubts(shown),
        f"<details><summary>What each clock counts</summary><ul>{''.join(told)}</ul></details>" if told else "",
        f"<details><summary>All measurements</summary>{_times(others)}{_doubts(others)}</details>" if others else "",
    ]


def _side_by_side(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Return a column for each measurement, which fits a phone."""
    columns = [_cells(m) for m in measurements]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(["", *(m["clock"] + " !" * bool(m.get("flags")) for m in measurements)], rows)


def _times(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each of many measurements."""
    names = ("p50", "p90", "p95", "p99", "max", "mean", "± (95 %)", "calls")
    rows = []
    for m in measurements:
        cells = _cells(m)
        name = f"{_what(m).removeprefix('a call with ')}, {_form(m)}, {m['clock']}" + " !" * bool(m.get("flags"))
        rows.append([name, *(cells[key] for key in names)])
    return table(["", *names], rows)


def _cells(m: Mapping[str, Any]) -> dict[str, str]:
    ms = m["ms"]
    ends, outliers = ms.get("ci95"), (ms.get("outliers") or {}).get("count")
    return {
        "of": _pass(m) if m["what"] == "pipeline" else _what(m).removeprefix("a call with "),
        **{key: as_ms(ms.get(key)) for key in ("p50", "p90", "p95", "p99", "max", "mean")},
        "± (95 %)": as_ms((ends[1] - ends[0]) / 2) if ends else "-",
        "calls": str(ms["n"]),
        "outliers": or_dash(outliers),
    }


def _doubts(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Return the flags of measurements, each once."""
    flags = dict.fromkeys(flag for m in measurements for flag in m.get("flags") or ())
    return f"<p class='warn'>! {escape('; '.join(flags))}</p>" if flags else ""


def _distributions(report: _Report) -> list[str]:
    plots = [_distribution(m) for m in _headline(report) if len(m["ms"].get("samples") or ()) > 1]
    if not plots:
        return []
    text = "Calls after warm-up, up to 200 evenly out of all. Red dots are outliers, which stay in all numbers."
    return [f"<p class='soft'>{text}</p>", grid(plots)]


def _distribution(m: Mapping[str, Any]) -> str:
    """Return how often which time was taken; what lies far beyond stands at the right edge, with its time."""
    ms = m["ms"]
    outliers = ms.get("outliers") or {}
    end = min(ms["max"], outliers.get("above_ms") or ms["max"])
    inside = [value for value in ms["samples"] if value <= end] or list(ms["samples"])
    x = axis(inside, "ms", zero=False)
    width = (x.high - x.low) / _BINS
    counts = [0] * _BINS
    for value in inside:
        counts[min(int((value - x.low) / width), _BINS - 1)] += 1
    shares = [100 * count / len(inside) for count in counts]
    plot = Plot(f"{m['clock']}{' !' * bool(m.get('flags'))}: {_what(m)}", x, axis(shares, "% of calls"))
    for i, share in enumerate(shares):
        if share:
            plot.box(x.low + i * width, x.low + (i + 1) * width, 0, share, COLOURS[0], opacity=0.75)
    for row, key in reversed(list(enumerate(("p50", "p95", "p99")))):  # words over the lines of others
        if ms.get(key) is not None:
            plot.mark(ms[key], f"{key} {as_ms(ms[key])}", COLOURS[1], row=row)
    for one in outliers.get("listed") or ():
        plot.dot(one["ms"], plot.y.high * 0.04, "var(--bad)", title=f"call {one['call']}: {as_ms(one['ms'])} ms")
    if far := sorted(one["ms"] for one in outliers.get("listed") or ()):
        ends = " to ".join(dict.fromkeys((as_ms(far[0]), as_ms(far[-1]))))
        plot.names.append((f"{as_count(outliers['count'], 'outlier')}: {ends} ms", "var(--bad)"))
    return plot.render()


def _stages(report: _Report) -> list[str]:
    stages = report.get("stages")
    if not stages or not stages.get("stages"):
        return []
    own = [s for s in stages["stages"] if s["name"] not in ("total", "age")]
    total = sum(s["ms"]["mean"] for s in own) or 1.0
    source = f"{stages['source']}, {as_passes(stages)}, {as_decimal(stages['people'])} people per frame"
    rows = [
        [s["name"], *(as_ms(s["ms"].get(key)) for key in ("mean", "p50", "p95", "max")),
         f"{s['ms']['mean'] / total:.0%}" if s in own else ""]
        for s in stages["stages"]
    ]  # fmt: skip
    return [
        f"<p class='soft'>Means on {escape(source)}, since some frames show nobody.</p>",
        stacked_bar([(s["name"], s["ms"]["mean"], f"{as_ms(s['ms']['mean'])} ms") for s in own]),
        table(["stage", "mean", "p50", "p95", "max", "share"], rows),
        _doubts([stages]),
    ]


def _curves(report: _Report) -> list[str]:
    curves = [curve for curve in report.get("curves") or () if curve.get("points")]
    if not curves:
        return []
    axes = {"people": "people in a frame", "batch": "images in a call", "cameras": "cameras"}
    plots = []
    for kind, label in axes.items():
        own = [curve for curve in curves if curve["x"] == kind]
        own.sort(key=lambda curve: (not _is_used(report, curve), curve["clock"] != "host"))
        plots += [
            _curve(own[:_MOST_LINES], label, key, unit) for key, unit in (("p50", "ms"), ("each", "ms each")) if own
        ]
    text = (
        "The knee is the first size from which the next saves less than 10 % per person. Dotted is p95; red points are "
        "more in doubt than the others."
    )
    points = [point for curve in curves for point in curve["points"]]
    return [f"<p class='soft'>{text}</p>", grid(plots), _doubts(points)]


def _curve(curves: Sequence[Mapping[str, Any]], label: str, key: str, unit: str) -> str:
    points = [point for curve in curves for point in curve["points"]]
    tops = [p[k] for p in points for k in ((key, "p95") if key == "p50" else (key,)) if p.get(k) is not None]
    title = f"Time by {label.partition(' ')[0]}" if key == "p50" else "Time for each of them"
    sizes = sorted({point["x"] for point in points})
    x = Axis(sizes[0], max(sizes[-1], sizes[0] + 1), label, at=sizes)
    plot = Plot(title, x, axis(tops, unit))
    common = set.intersection(*(set(point.get("flags") or ()) for point in points))
    for colour, curve in zip(COLOURS, curves, strict=False):
        plot.line([(p["x"], p[key]) for p in curve["points"]], colour, name=f"{_form(curve)}, {curve['clock']}")
        for point in curve["points"]:
            if own := [flag for flag in point.get("flags") or () if flag not in common]:
                plot.dot(point["x"], point[key], "var(--bad)", title="; ".join(own))
        if (
            curve is curves[0]
            and key == "p50"
            and (high := [(p["x"], p["p95"]) for p in curve["points"] if p.get("p95") is not None])
        ):
            plot.line(high, colour, dash="1 4")
    if (knee := curves[0].get("knee")) is not None:
        plot.mark(knee, f"knee: {knee:g}", COLOURS[0])
    return plot.render()


def _heads(report: _Report) -> list[str]:
    heads = report.get("heads")
    if not heads or not heads.get("heads"):
        return []
    shown = heads["heads"]
    rows = [
        [
            h["name"],
            as_ms(h["marginal_ms"]) + _interval(h.get("marginal_ci95")),
            as_percent(h["share"]),
            as_ms(h["alone"]["p50"]),
        ]
        for h in shown
    ]
    text = (
        f"All heads on one backbone: {as_ms(heads['all']['p50'])} ms for {as_count(heads['batch'], 'image')}, with "
        f"{heads['runner']}. A network for each head: {as_ms(heads['separate_ms'])} ms; sharing saves "
        f"{heads['saving']:.0%}."
    )
    return [
        f"<p>{escape(text)}</p>",
        bars([(h["name"], max(h["marginal_ms"], 0.0), f"{as_ms(h['marginal_ms'])} ms") for h in shown], accent=""),
        table(["head", "costs, ms", "share", "alone, ms"], rows),
        _doubts([heads]),
    ]


def _sustained(report: _Report) -> list[str]:
    sustained = report.get("sustained")
    if not sustained or not (sustained.get("series") or {}).get("time_s"):
        return []
    series = sustained["series"]
    plot = Plot("Median of a frame", axis(series["time_s"], "seconds"), axis(series["p50_ms"], "ms"))
    plot.line(list(zip(series["time_s"], series["p50_ms"], strict=False)), COLOURS[0])
    text = (
        f"{as_decimal(sustained['minutes'])} minutes: the detector takes "
        f"{as_ms(sustained['first_p50_ms'])} ms at first, "
        f"{as_ms(sustained['last_p50_ms'])} ms at the end ({sustained['slower']:+.0%})."
    )
    return [f"<p>{text}</p>", grid([plot.render()])]


def _telemetry(report: _Report) -> list[str]:
    telemetry = report.get("telemetry") or {}
    series = telemetry.get("series") or {}
    times = series.get("time_s") or []
    watts = {name: _scaled(values, 1e-3) for name, values in (series.get("rails_mw") or {}).items()}
    wanted = (
        ("Power", "W", {"total": _scaled(series.get("total_mw"), 1e-3), **watts}),
        ("Clocks", "MHz", {"GPU": series.get("gpu_mhz"), "CPU": series.get("cpu_mhz")}),
        ("Temperatures", "°C", series.get("temperatures_c") or {}),
        ("Load", "%", {"GPU": series.get("gpu_load"), "CPU": series.get("cpu_load")}),
    )
    spans = _spans(times, series.get("throttled") or [])
    plots = [plot for title, unit, lines in wanted if (plot := _timeline(title, unit, times, lines, spans))]
    return [
        _energy(telemetry),
        "<p class='bad'>Shaded: the device slowed itself down.</p>" if spans and plots else "",
        grid(plots),
    ] if plots or telemetry.get("energy_j") or spans else []  # fmt: skip


def _timeline(
    title: str, unit: str, times: Sequence[float], lines: Mapping[str, Sequence[float | None] | None],
    spans: Sequence[tuple[float, float]],
) -> str:  # fmt: skip
    """Return a plot over time; gaps stay gaps, and nothing is returned where no value is known."""
    known = {
        name: [(t, value) for t, value in zip(times, values or (), strict=False) if value is not None]
        for name, values in lines.items()
    }
    known = {name: points for name, points in known.items() if points}
    if not known:
        return ""
    values = [value for points in known.values() for _, value in points]
    plot = Plot(title, axis(times, "seconds"), axis(values, unit))
    for start, end in spans:
        plot.box(start, end, plot.y.low, plot.y.high, _HEAT)
    for colour, (name, _) in zip(itertools.cycle(COLOURS), known.items(), strict=False):
        label = name
        gaps = zip(times, lines[name] or (), strict=False)
        for present, run in itertools.groupby(gaps, key=lambda pair: pair[1] is not None):
            if present:
                plot.line([(t, value) for t, value in run if value is not None], colour, name=label)
                label = ""
    return plot.render()


def _spans(times: Sequence[float], throttled: Sequence[Sequence[str]]) -> list[tuple[float, float]]:
    """Return from when to when the device throttled: from a sample that says so to the first that does not."""
    spans: list[tuple[float, float]] = []
    for i, (time, why) in enumerate(zip(times, throttled, strict=False)):
        if why:
            end = times[min(i + 1, len(times) - 1)]
            if spans and spans[-1][1] == time:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((time, end))
    return spans


def _energy(telemetry: Mapping[str, Any]) -> str:
    frame, person = telemetry.get("per_frame") or {}, telemetry.get("per_person") or {}
    rows = [
        [name, f"{joules:.4g} J", *(f"{1e3 * per[name]:.3g} mJ" if name in per else "-" for per in (frame, person))]
        for name, joules in (telemetry.get("energy_j") or {}).items()
    ]
    hottest = [f"{name} {value:.0f} °C" for name, value in (telemetry.get("hottest_c") or {}).items()]
    text = f"<p class='soft'>Hottest: {escape(', '.join(hottest))}.</p>" if hottest else ""
    return (table(["energy", "whole run", "per frame", "per person"], rows) if rows else "") + text


def _missing(report: _Report) -> list[str]:
    told = [f"{s['target']} with {_engine(s)}: {s['reason']}" for s in report.get("skipped") or ()]
    told += (report.get("telemetry") or {}).get("missing") or ()
    told += [text for entry in (report.get("layers") or {}).values() for text in entry.get("missing") or ()]
    absent = {"measurements": "times", "stages": "the stages of the pipeline", "layers": "the blocks of the model"}
    told += [f"{words}: not measured" for key, words in absent.items() if not report.get(key)]
    return ["<ul>" + "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(told)) + "</ul>"] if told else []


def _method(report: _Report) -> list[str]:
    machine, bundle = report.get("machine") or {}, report.get("bundle") or {}
    clocks = [
        f"{c['name']} {as_decimal(c.get('min_mhz'))} to {as_decimal(c.get('max_mhz'))} MHz"
        + " (locked)" * bool(c.get("locked"))
        for c in machine.get("clocks") or ()
    ]
    facts = {
        "device": machine.get("model"),
        "processor": f"{machine['cpu']}, {machine.get('cores')} cores" if machine.get("cpu") else "",
        "GPU": ", ".join(map(str, machine.get("gpus") or ())),
        "system": machine.get("os"),
        "engines": ", ".join(machine.get("engines") or ()),
        "power mode": machine.get("power_mode"),
        "clocks": "; ".join([str(machine.get("clock_state") or ""), *dict.fromkeys(clocks)]).strip("; "),
        "bundle": bundle.get("path"),
        "its sha256": bundle.get("sha256"),
        "options": ", ".join(
            f"{k} {v}" for k, v in (report.get("options") or {}).items() if v not in (None, [], False)
        ),
    }
    rows = "".join(f"<tr><td>{k}</td><td class='words'>{escape(str(v))}</td></tr>" for k, v in facts.items() if v)
    return [f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>"] if rows else []


def _headline(report: _Report) -> list[Mapping[str, Any]]:
    """Return the three clocks: of a call with the fewest images, and of the pipeline on its source."""
    calls = _of_used(report, "call")
    least = min((m["batch"] for m in calls), default=None)
    pipeline = [m for m in _of_used(report, "pipeline") if not m.get("placed")] or _of_used(report, "pipeline")
    return [*(m for m in calls if m["batch"] == least), *pipeline[:1]]


def _of_used(report: _Report, what: str) -> list[Mapping[str, Any]]:
    """Return the measurements of this kind of the form that the bundle is used in, or of the first that there is."""
    own = [m for m in report.get("measurements") or () if m["what"] == what]
    used = [m for m in own if _is_used(report, m)]
    return used or [m for m in own if _form(m) == _form(own[0])]


def _is_used(report: _Report, one: Mapping[str, Any]) -> bool:
    used = (report.get("bundle") or {}).get("used") or {}
    return bool(used) and all(one.get(key) == value for key, value in used.items())


def _what(m: Mapping[str, Any]) -> str:
    if m["what"] == "call":
        return f"a call with {as_count(m['batch'], 'image')}"
    number = m.get("people")
    people = "" if number is None else f"{as_decimal(number)} {'person' if number == 1 else 'people'}"
    source = "" if m.get("placed") else m.get("source")
    per_frame = " per frame" * bool(people and source)
    return ", ".join(filter(None, (_pass(m) if m["what"] == "pipeline" else m["what"], source, people + per_frame)))


def _pass(m: Mapping[str, Any]) -> str:
    """Return what a pipeline took at a time."""
    return f"a pass over {m['cameras']} cameras" if (m.get("cameras") or 1) > 1 else "a frame"


def _form(one: Mapping[str, Any]) -> str:
    return f"{one['target']} ({_engine(one)})"


def _engine(one: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (one.get("engine"), one.get("computes"))))


def _scaled(values: Sequence[float | None] | None, factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in values or ()]


def _interval(ends: Sequence[float] | None) -> str:
    return f" ± {as_ms((ends[1] - ends[0]) / 2)}" if ends else ""
