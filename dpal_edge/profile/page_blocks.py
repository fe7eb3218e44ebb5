"""The part of a profile's page on the blocks of the model: where time goes, and how far that is from the ceilings."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dpal_edge.html import table
from dpal_edge.profile.plots import COLOURS, Plot, axis, grid, stacked_bar
from dpal_edge.profile.wording import as_count, as_html, as_ms, as_percent, or_dash

_BLOCK = re.compile(r"^(stage \d+ )?block \d+ ")


def show_layers(report: Mapping[str, Any]) -> list[str]:
    """Return where the time of calls goes, by block, for each artifact that was looked into."""
    shown: list[str] = []
    doubt = conditions(report)
    for name, entry in (report.get("layers") or {}).items():
        if not entry.get("groups"):
            continue
        sums: dict[str, list[float]] = {}
        for group in entry["groups"]:
            kind = _BLOCK.sub("", group["group"])
            sums.setdefault(kind if kind == group["group"] else f"{kind} of all blocks", []).append(group["ms"])
        parts = [(kind, sum(ms), f"{as_ms(sum(ms))} ms") for kind, ms in sums.items()]
        parts.sort(key=lambda part: -part[1])
        text = (
            f"{name} with {entry['engine']}: {as_ms(entry['plain_ms'])} ms a call with "
            f"{as_count(entry['batch'], 'image')}. By {entry['source']}, kernels take {as_ms(entry['sum_ms'])} of "
            f"{as_ms(entry['host_ms'])} ms while profiling; {entry['unaccounted_share']:.0%} is outside of them."
        )
        if attention := entry.get("attention"):
            text += f" {attention['fused']} of {attention['blocks']} attentions are one kernel."
        shown += [f"<p>{escape(text)}</p>", stacked_bar(parts), _kernels(entry)]
    return [*shown, f"<p class='warn'>! {escape(doubt)}</p>"] if shown and doubt else shown


def conditions(report: Mapping[str, Any]) -> str:
    """Return what casts doubt on all numbers of a run: clocks that could move, throttling; "" where none is."""
    state = (report.get("machine") or {}).get("clock_state")
    share = ((report.get("telemetry") or {}).get("throttled") or {}).get("any")
    doubts = [f"clocks were {state}" if state and state != "locked" else ""]
    doubts.append(f"the device throttled {share:.0%} of the time" if share else "")
    return "; ".join(filter(None, doubts))


def _kernels(entry: Mapping[str, Any]) -> str:
    top = sorted(entry.get("kernels") or (), key=lambda kernel: -kernel["ms"])[:40]
    rows = [[k["name"], k["group"], f"{k['kind']} {k['kernel']}".strip(), k["precision"], as_ms(k["ms"])] for k in top]
    what = f"The {len(rows)} slowest of {len(entry['kernels'])} kernels" if rows else ""
    shown = table(["kernel", "block", "kind", "in", "ms"], rows)
    return f"<details><summary>{what}</summary>{shown}</details>" if rows else ""


def show_roofline(report: Mapping[str, Any]) -> list[str]:
    """Return where the blocks stand below the ceilings, what to try next, and floors for Jetsons."""
    roofline = report.get("roofline")
    if not roofline or not roofline.get("groups"):
        return []
    device, total = roofline.get("device"), roofline.get("total") or {}
    advice = "".join(f"<li>{as_html(text)}</li>" for text in roofline.get("advice") or ())
    shown = []
    if total.get("achieved_share"):
        shown.append(
            f"<p>{escape(roofline['file'])} could not take less than {as_ms(total['floor_ms'])} ms here; it takes "
            f"{as_ms(total['ms'])} ms, <b>{total['achieved_share']:.0%}</b> of what the device can do.</p>"
        )
    shown.append(f"<p>What to try next, the most worthwhile first:</p><ul>{advice}</ul>" if advice else "")
    if device:
        shown += [
            grid([_roofline_plot(roofline["groups"], device)]),
            f"<p class='soft'>Ceilings: {escape(device['source'])}.</p>",
        ]
    return [*shown, _roofline_table(roofline["groups"]), _floors(roofline)]


def _roofline_plot(groups: Sequence[Mapping[str, Any]], device: Mapping[str, Any]) -> str:
    """Return the blocks below the ceilings, both axes logarithmic; blocks without products have no place there."""
    dots = [g for g in groups if g.get("intensity") and g.get("achieved_gops")]
    peaks, bandwidth = device["peak_gops"], device["bandwidth_gb_s"]
    ridges = [peak / bandwidth for peak in peaks.values()]
    x = axis([*(g["intensity"] for g in dots), *ridges], "operations per byte", logarithmic=True)
    y = axis([*(g["achieved_gops"] for g in dots), *peaks.values()], "1e9 per second", logarithmic=True)
    plot = Plot("Operations, below the ceilings", x, y)
    start = max(x.low, y.low / bandwidth)
    for peak in peaks.values():
        plot.line([(start, start * bandwidth), (peak / bandwidth, peak), (x.high, peak)], "var(--soft)")
    for i, (name, peak) in enumerate(peaks.items()):
        px, py = plot.at(x.high, peak)
        plot.marks.append(f'<text x="{px - 2 - 34 * i:.1f}" y="{py - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    kinds = list(dict.fromkeys(_BLOCK.sub("", g["group"]) for g in dots))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    for g in dots:
        title = f"{g['group']}: {as_ms(g['ms'])} ms, {as_percent(g.get('achieved_share'))} of its ceiling"
        plot.dot(g["intensity"], g["achieved_gops"], colours[_BLOCK.sub("", g["group"])], radius=4, title=title)
    plot.names += colours.items()
    return plot.render()


def _roofline_table(groups: Sequence[Mapping[str, Any]]) -> str:
    head = ["block", "ms", "of ceiling", "bound by", "in", "1e6 operations", "kB", "operations/byte"]
    rows = [
        [g["group"], as_ms(g["ms"]), as_percent(g["achieved_share"]), or_dash(g["bound"]), or_dash(g["precision"]),
         or_dash(g["operations"] and f"{g['operations'] / 1e6:.1f}"), or_dash(g["bytes"] and f"{g['bytes'] / 1e3:.0f}"),
         or_dash(g["intensity"] and f"{g['intensity']:.0f}")]
        for g in groups
    ]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group.get("next"):
            reasons.setdefault(group["next"], []).append(group["group"])
    words = "".join(f"<li>{as_html(text)}: {escape(', '.join(names))}</li>" for text, names in reasons.items())
    return f"<details open><summary>Each block</summary>{table(head, rows)}</details>" + (
        f"<details><summary>What to try next at each block</summary><ul>{words}</ul></details>" if words else ""
    )


def _floors(roofline: Mapping[str, Any]) -> str:
    floors = roofline.get("floors") or ()
    if not floors:
        return ""
    rows = [[f["device"], f"{f['floor_ms']:.3f}", f["bound"]] for f in floors]
    text = (
        "<b>Floors, not measurements.</b> What a Jetson's data sheet allows for the same call at best: weights read "
        "once, products at the dense peak, nothing else. Real engines take longer, and starting their kernels is not "
        "counted at all. Only a profile on the device tells its time."
    )
    sources: dict[str, list[str]] = {}
    for floor in floors:
        sources.setdefault(floor["source"], []).append(floor["device"])
    told = ". ".join(f"{', '.join(names)}: {source}" for source, names in sources.items())
    return (
        f"<details><summary>Floors for Jetson modules</summary><p>{text}</p>"
        f"{table(['module', 'floor, ms', 'bound by'], rows)}<p class='soft'>{escape(told)}.</p></details>"
    )
