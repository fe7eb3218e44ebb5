"""The report of a profile for people: one HTML page, which needs nothing else and reads well on a phone.

The page shows what ``report.json`` holds (docs/profile.md) and computes nothing that is not there. What was not
measured is left out, and every number that was taken under doubtful conditions says so.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dpal_edge.html import bars, page, table
from dpal_edge.profile.plots import COLOURS, Plot, axis, stacked_bar

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
td.words, th.words { white-space: normal; text-align: left; min-width: 15rem; }
</style>"""

_BLOCK = re.compile(r"^(stage \d+ )?block \d+ ")
_MOST_LINES = 6  # in a plot of curves
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
        ("Blocks of the model", _layers),
        ("Roofline", _roofline),
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
    tiles = [_tile(value, text) for value, text in _numbers(report)]
    return [
        f"<p class='soft'>{escape(', '.join(filter(None, words)))}</p>",
        f"<div class='tiles'>{''.join(tiles)}</div>" if tiles else "",
    ]


def _tile(value: str, text: str) -> str:
    return f"<div class='tile'><b>{escape(value)}</b>{escape(text)}</div>"


def _numbers(report: _Report) -> Iterable[tuple[str, str]]:
    calls = [m for m in _of_used(report, "call") if m["clock"] == "host"]
    if calls:
        first = min(calls, key=lambda m: m["batch"])
        yield f"{_ms(first['ms']['p50'])} ms", f"median of a call with {_count(first['batch'], 'person', 'people')}"
    for one in _of_used(report, "pipeline"):
        if not one.get("placed"):
            key = "p95" if one["ms"]["p95"] is not None else "max"
            yield (
                f"{_ms(one['ms'][key])} ms",
                f"{key} from a frame to drawn people, {_decimal(one['people'])} per frame",
            )
            break
    energy = (report.get("telemetry") or {}).get("per_frame") or {}
    for meter, joules in itertools.islice(energy.items(), 1):
        yield f"{1e3 * joules:.3g} mJ", f"per frame, {meter}"
    if heads := report.get("heads"):
        yield f"{heads['saving']:.0%}", f"saved by one backbone for {len(heads['heads'])} heads"


def _verdicts(report: _Report) -> list[str]:
    """Return the verdicts, then what casts doubt on all numbers."""
    classes = {True: "yes", False: "no", None: "mind"}
    told = [(classes[v.get("passed")], str(v.get("text", ""))) for v in report.get("verdicts") or ()]
    if report.get("interrupted") and not any(v.get("kind") == "interrupted" for v in report.get("verdicts") or ()):
        told.insert(0, ("no", f"{report['interrupted']}; what follows was measured until then"))
    warnings = (report.get("telemetry") or {}).get("warnings") or ()
    told += [("mind", text) for text in warnings if not any(text in other for _, other in told)]
    items = "".join(f'<li class="{kind}">{escape(text[:1].upper() + text[1:])}</li>' for kind, text in told)
    return [f"<ul class='verdicts'>{items}</ul>"] if items else []


def _clocks(report: _Report) -> list[str]:
    shown = _headline(report)
    if not shown:
        return []
    others = [m for m in report["measurements"] if m not in shown]
    rest = [(f"{_what(m)}, {_form(m)}, {m['clock']}", m) for m in others]
    told = [f"<li><b>{escape(c['clock'])}</b>: {escape(c['told'])}</li>" for c in report.get("clocks") or ()]
    return [
        "<p class='soft'>Milliseconds. An interval is the range of the mean that chance alone would leave (95 %); "
        "! marks numbers with a doubt, which is told below the table.</p>",
        _times([(f"{m['clock']}: {_what(m)}", m) for m in shown]),
        _doubts(shown),
        f"<details><summary>What each clock counts</summary><ul>{''.join(told)}</ul></details>" if told else "",
        f"<details><summary>All measurements</summary>{_times(rest)}{_doubts(others)}</details>" if others else "",
    ]


def _times(named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = []
    for name, m in named:
        ms = m["ms"]
        low, high = ms.get("ci95") or (None, None)
        spread = f" [{_ms(low)}, {_ms(high)}]" if low is not None else ""
        doubt = " !" if m.get("flags") else ""
        quantiles = [_ms(ms.get(key)) for key in ("p50", "p90", "p95", "p99", "max")]
        outliers = (ms.get("outliers") or {}).get("count")
        rows.append([name + doubt, *quantiles, _ms(ms["mean"]) + spread, str(ms["n"]), _or_dash(outliers)])
    return table(["clock", "p50", "p90", "p95", "p99", "max", "mean", "calls", "outliers"], rows)


def _doubts(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Return the flags of measurements, each once."""
    flags = dict.fromkeys(flag for m in measurements for flag in m.get("flags") or ())
    return f"<p class='warn'>! {escape('; '.join(flags))}</p>" if flags else ""


def _distributions(report: _Report) -> list[str]:
    plots = [_distribution(m) for m in _headline(report) if m["ms"].get("histogram")]
    if not plots:
        return []
    text = "Every call after warm-up is in here. Dots are outliers, which stay in all numbers."
    return [f"<p class='soft'>{text}</p>", _grid(plots)]


def _distribution(m: Mapping[str, Any]) -> str:
    ms = m["ms"]
    edges, counts = ms["histogram"]["edges"], ms["histogram"]["counts"]
    plot = Plot(f"{m['clock']}: {_what(m)}", axis(edges, "ms", zero=False), axis(counts, "calls"))
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            plot.box(left, right, 0, count, COLOURS[0], opacity=0.75)
    plot.mark(ms["p50"], f"p50 {_ms(ms['p50'])}", COLOURS[1])
    if ms.get("p95") is not None:
        plot.mark(ms["p95"], f"p95 {_ms(ms['p95'])}", COLOURS[1], row=1)
    for one in (ms.get("outliers") or {}).get("listed") or ():
        plot.dot(one["ms"], plot.y.high * 0.04, "var(--bad)", title=f"call {one['call']}: {_ms(one['ms'])} ms")
    return plot.render()


def _stages(report: _Report) -> list[str]:
    stages = report.get("stages")
    if not stages or not stages.get("stages"):
        return []
    own = [s for s in stages["stages"] if s["name"] not in ("total", "age")]
    total = sum(s["ms"]["p50"] for s in own) or 1.0
    source = f"{stages['source']}, {stages['frames']} frames, {_decimal(stages['people'])} people per frame"
    rows = [
        [s["name"], *(_ms(s["ms"].get(key)) for key in ("p50", "p95", "p99", "max")),
         f"{s['ms']['p50'] / total:.0%}" if s in own else ""]
        for s in stages["stages"]
    ]  # fmt: skip
    return [
        f"<p class='soft'>Medians on {escape(source)}.</p>",
        stacked_bar([(s["name"], s["ms"]["p50"], f"{_ms(s['ms']['p50'])} ms") for s in own]),
        table(["stage", "p50", "p95", "p99", "max", "share"], rows),
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
    text = "The knee is the first size from which the next saves less than 10 % per person; dotted lines are p95."
    return [f"<p class='soft'>{text}</p>", _grid(plots)]


def _curve(curves: Sequence[Mapping[str, Any]], label: str, key: str, unit: str) -> str:
    points = [point for curve in curves for point in curve["points"]]
    tops = [p[k] for p in points for k in ((key, "p95") if key == "p50" else (key,)) if p.get(k) is not None]
    title = f"Time by {label.partition(' ')[0]}" if key == "p50" else "Time for each of them"
    plot = Plot(title, axis((p["x"] for p in points), label), axis(tops, unit))
    for colour, curve in zip(COLOURS, curves, strict=False):
        plot.line([(p["x"], p[key]) for p in curve["points"]], colour, name=f"{_form(curve)}, {curve['clock']}")
        if key == "p50" and (high := [(p["x"], p["p95"]) for p in curve["points"] if p.get("p95") is not None]):
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
            _ms(h["marginal_ms"]) + _interval(h.get("marginal_ci95")),
            f"{h['share']:.0%}",
            _ms(h["alone"]["p50"]),
        ]
        for h in shown
    ]
    text = (
        f"All heads on one backbone: {_ms(heads['all']['p50'])} ms for {_count(heads['batch'], 'image')}, with "
        f"{heads['runner']}. A network for each head: {_ms(heads['separate_ms'])} ms; sharing saves {heads['saving']:.0%}."
    )
    return [
        f"<p>{escape(text)}</p>",
        bars([(h["name"], max(h["marginal_ms"], 0.0), f"{_ms(h['marginal_ms'])} ms") for h in shown], accent=""),
        table(["head", "costs, ms", "share", "alone, ms"], rows),
        f"<p class='soft'>{escape(heads['note'])}</p>" if heads.get("note") else "",
    ]


def _sustained(report: _Report) -> list[str]:
    sustained = report.get("sustained")
    if not sustained or not (sustained.get("series") or {}).get("time_s"):
        return []
    series = sustained["series"]
    plot = Plot("Median of a frame", axis(series["time_s"], "seconds"), axis(series["p50_ms"], "ms"))
    plot.line(list(zip(series["time_s"], series["p50_ms"], strict=False)), COLOURS[0])
    text = (
        f"{_decimal(sustained['minutes'])} minutes: {_ms(sustained['first_p50_ms'])} ms at first, "
        f"{_ms(sustained['last_p50_ms'])} ms at the end ({sustained['slower']:+.0%})."
    )
    return [f"<p>{text}</p>", _grid([plot.render()])]


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
        _grid(plots),
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
        [name, f"{joules:.4g} J", *(f"{1e3 * per[name]:.3g} mJ" if name in per else "–" for per in (frame, person))]
        for name, joules in (telemetry.get("energy_j") or {}).items()
    ]
    hottest = [f"{name} {value:.0f} °C" for name, value in (telemetry.get("hottest_c") or {}).items()]
    text = f"<p class='soft'>Hottest: {escape(', '.join(hottest))}.</p>" if hottest else ""
    return (table(["energy", "whole run", "per frame", "per person"], rows) if rows else "") + text


def _layers(report: _Report) -> list[str]:
    shown: list[str] = []
    for name, entry in (report.get("layers") or {}).items():
        if not entry.get("groups"):
            continue
        sums: dict[str, list[float]] = {}
        for group in entry["groups"]:
            kind = _BLOCK.sub("", group["group"])
            sums.setdefault(kind if kind == group["group"] else f"{kind} of all blocks", []).append(group["ms"])
        parts = [(kind, sum(ms), f"{_ms(sum(ms))} ms") for kind, ms in sums.items()]
        parts.sort(key=lambda part: -part[1])
        text = (
            f"{name} with {entry['engine']}, {_count(entry['batch'], 'image')}: {_ms(entry['plain_ms'])} ms a call. "
            f"{entry['source']}: kernels take {_ms(entry['sum_ms'])} of {_ms(entry['host_ms'])} ms while profiling, "
            f"{entry['unaccounted_share']:.0%} is outside of them."
        )
        if attention := entry.get("attention"):
            text += f" {attention['fused']} of {attention['blocks']} attentions are one kernel."
        shown += [f"<p>{escape(text)}</p>", stacked_bar(parts), _kernels(entry)]
    return shown


def _kernels(entry: Mapping[str, Any]) -> str:
    top = sorted(entry.get("kernels") or (), key=lambda kernel: -kernel["ms"])[:40]
    rows = [[k["name"], k["group"], f"{k['kind']} {k['kernel']}".strip(), k["precision"], _ms(k["ms"])] for k in top]
    what = f"The {len(rows)} slowest of {len(entry['kernels'])} kernels" if rows else ""
    return (
        f"<details><summary>{what}</summary>{table(['kernel', 'block', 'kind', 'in', 'ms'], rows)}</details>"
        if rows
        else ""
    )


def _roofline(report: _Report) -> list[str]:
    roofline = report.get("roofline")
    if not roofline or not roofline.get("groups"):
        return []
    device, total = roofline.get("device"), roofline.get("total") or {}
    advice = "".join(f"<li>{escape(text)}</li>" for text in roofline.get("advice") or ())
    shown = []
    if total.get("achieved_share"):
        shown.append(
            f"<p>{escape(roofline['file'])} could not take less than {_ms(total['floor_ms'])} ms here; it takes "
            f"{_ms(total['ms'])} ms, <b>{total['achieved_share']:.0%}</b> of what the device can do.</p>"
        )
    shown.append(f"<p>What to try next, the most worthwhile first:</p><ul>{advice}</ul>" if advice else "")
    if device:
        shown += [
            _grid([_roofline_plot(roofline["groups"], device)]),
            f"<p class='soft'>Ceilings: {escape(device['source'])}.</p>",
        ]
    return [*shown, _roofline_table(roofline["groups"]), _floors(roofline)]


def _roofline_plot(groups: Sequence[Mapping[str, Any]], device: Mapping[str, Any]) -> str:
    """Return the blocks below the ceilings, both axes logarithmic; blocks without products have no place there."""
    dots = [g for g in groups if g.get("intensity") and g.get("achieved_gops")]
    peaks, bandwidth = device["peak_gops"], device["bandwidth_gb_s"]
    ridges = [peak / bandwidth for peak in peaks.values()]
    x = axis([*(g["intensity"] for g in dots), *ridges], "operations per byte", logarithmic=True)
    y = axis([*(g["achieved_gops"] for g in dots), *peaks.values()], "1e9 operations/s", logarithmic=True)
    plot = Plot(f"Below the ceilings of {device['name']}"[:58], x, y)
    start = max(x.low, y.low / bandwidth)
    for peak in peaks.values():
        plot.line([(start, start * bandwidth), (peak / bandwidth, peak), (x.high, peak)], "var(--soft)")
    for name, peak in peaks.items():
        px, py = plot.at(x.high, peak)
        plot.marks.append(f'<text x="{px - 2:.1f}" y="{py - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    kinds = list(dict.fromkeys(_BLOCK.sub("", g["group"]) for g in dots))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    for g in dots:
        title = f"{g['group']}: {_ms(g['ms'])} ms, {_percent(g.get('achieved_share'))} of its ceiling"
        plot.dot(g["intensity"], g["achieved_gops"], colours[_BLOCK.sub("", g["group"])], radius=4, title=title)
    plot.names += colours.items()
    return plot.render()


def _roofline_table(groups: Sequence[Mapping[str, Any]]) -> str:
    head = ["block", "ms", "1e6 operations", "kB", "operations/byte", "in", "bound by", "of ceiling"]
    rows = [
        [g["group"], _ms(g["ms"]), _or_dash(g["operations"] and f"{g['operations'] / 1e6:.1f}"),
         _or_dash(g["bytes"] and f"{g['bytes'] / 1e3:.0f}"), _or_dash(g["intensity"] and f"{g['intensity']:.0f}"),
         _or_dash(g["precision"]), _or_dash(g["bound"]), _percent(g["achieved_share"])]
        for g in groups
    ]  # fmt: skip
    words = [
        f"<tr><td>{escape(g['group'])}</td><td class='words'>{escape(g['next'])}</td></tr>"
        for g in groups
        if g.get("next")
    ]
    table_of_words = f"<div class='scroll'><table><tbody>{''.join(words)}</tbody></table></div>"
    return f"<details open><summary>Each block</summary>{table(head, rows)}</details>" + (
        f"<details><summary>What to try next at each block</summary>{table_of_words}</details>" if words else ""
    )


def _floors(roofline: Mapping[str, Any]) -> str:
    floors = roofline.get("floors") or ()
    if not floors:
        return ""
    rows = [[f["device"], f"{f['floor_ms']:.3f}", f["bound"]] for f in floors]
    text = (
        "<b>Floors, not measurements.</b> What a Jetson's data sheet allows for the same call at best: weights read "
        "once, products at the dense peak, nothing else. Real engines take several times as long, with one image most "
        "of it for starting kernels. Only a profile on the device tells its time."
    )
    sources = "; ".join(dict.fromkeys(f["source"] for f in floors))
    return (
        f"<details><summary>Floors for Jetson modules</summary><p>{text}</p>"
        f"{table(['module', 'floor, ms', 'bound by'], rows)}<p class='soft'>{escape(sources)}.</p></details>"
    )


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
        f"{c['name']} {_decimal(c.get('min_mhz'))} to {_decimal(c.get('max_mhz'))} MHz"
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
        return f"a call with {_count(m['batch'], 'image')}"
    people = f"{_decimal(m['people'])} people" if m.get("people") is not None else ""
    cameras = f"{m['cameras']} cameras" if (m.get("cameras") or 1) > 1 else ""
    source = "" if m.get("placed") else m.get("source")
    return ", ".join(filter(None, ("a frame" if m["what"] == "pipeline" else m["what"], source, people, cameras)))


def _form(one: Mapping[str, Any]) -> str:
    return f"{one['target']} ({_engine(one)})"


def _engine(one: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (one.get("engine"), one.get("computes"))))


def _grid(parts: Sequence[str]) -> str:
    return f"<div class='grid'>{''.join(parts)}</div>" if parts else ""


def _scaled(values: Sequence[float | None] | None, factor: float) -> list[float | None]:
    return [None if value is None else value * factor for value in values or ()]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _interval(ends: Sequence[float] | None) -> str:
    return f" [{_ms(ends[0])}, {_ms(ends[1])}]" if ends else ""


def _ms(value: float | None) -> str:
    """Write a time in three digits at least, never more than a microsecond precise."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _or_dash(value: object) -> str:
    return "–" if value is None or value == "" else str(value)
