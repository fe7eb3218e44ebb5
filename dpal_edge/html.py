"""Self-contained HTML pages: text, tables, line charts, images and video in one file, readable on a phone."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

_MIME = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".webm": "video/webm", ".mp4": "video/mp4"}

_COLOURS = ("var(--accent)", "var(--second)", "var(--good)", "var(--soft)")  # of the lines in a chart
_ROUND = 'stroke-linecap="round" stroke-linejoin="round"'

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --paper: #fff; --card: #f5f7f9;
        --accent: #0b6bcb; --second: #c2410c; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --soft: #9aa5b1; --line: #333b44; --paper: #14181c; --card: #1c2228;
          --accent: #5aa9f8; --second: #fb923c; --good: #4ade80; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; font: 16px/1.55 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); font-size: .9rem; } .good { color: var(--good); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); } td + td, th + th { text-align: right; }
td:first-child { white-space: nowrap; } td:last-child { overflow-wrap: anywhere; min-width: 5rem; }
.scroll { overflow-x: auto; }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.strip { display: grid; gap: 3px; grid-template-columns: repeat(auto-fill, minmax(3.4rem, 1fr)); }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
img, video { width: 100%; height: auto; display: block; border-radius: 4px; }
.card { background: var(--card); border-radius: 8px; padding: .75rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
code { font-size: .9em; background: var(--card); padding: .1em .3em; border-radius: 4px; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole document with ``sections`` (HTML) under the heading ``title`` (text)."""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text cells; the first column is aligned left, the others right."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def line_chart(title: str, xs: Sequence[float], ys: Sequence[float], *, x_label: str) -> str:
    """Return an SVG line chart of finite ``ys`` over ascending ``xs``, from zero, with the last value written out."""
    return lines_chart(title, {f"{short(ys[0])} to {short(ys[-1])}": (xs, ys)}, x_label=x_label)


def lines_chart(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str) -> str:
    """Return an SVG chart of one to four lines, name -> (ascending xs, finite ys); it includes zero."""
    width, height, left, right, top, bottom = 340, 200, 44, 12, 30, 34
    everything = [y for _, ys in series.values() for y in ys]
    grid = ticks(max(*everything, 0.0), min(*everything, 0.0))
    low = min(xs[0] for xs, _ in series.values())
    high = max(low + 1, *(xs[-1] for xs, _ in series.values()))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - low) / (high - low) * (width - left - right),
            height - bottom - (y - grid[0]) / (grid[-1] - grid[0]) * (height - top - bottom),
        )

    parts = [f'<text x="0" y="14" style="fill:var(--ink);font-weight:600">{escape(title)}</text>']
    for tick in grid:
        y = at(low, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for x, anchor in ((low, "start"), (high, "end")):
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{height - bottom + 16}" text-anchor="{anchor}">{x:g}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for colour, (xs, ys) in zip(_COLOURS, series.values(), strict=False):
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(xs, ys, strict=True))
        points += f" {points}" if len(xs) == 1 else ""  # a dot
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" {_ROUND}/>')
    named = zip(_COLOURS, series, strict=False)
    names = " ".join(
        f'<tspan dx="6" style="fill:{colour if len(series) > 1 else "var(--soft)"}">{escape(name)}</tspan>'
        for colour, name in named
    )
    parts.append(f'<text x="{width - right}" y="14" text-anchor="end">{names}</text>')
    label = escape(f"{title}: {', '.join(series)}")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def bars(rows: Sequence[tuple[str, float, str]], *, accent: str) -> str:
    """Return horizontal bars as SVG: (label, value >= 0, value as text); the row ``accent`` stands out."""
    width, step, left = 420, 30, 130
    widest = max(value for _, value, _ in rows) or 1.0
    parts = []
    for i, (label, value, shown) in enumerate(rows):
        y, length = i * step, max(value / widest * (width - left - 70), 1)
        colour = "var(--good)" if label == accent else "var(--soft)"
        parts.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 5}" width="{length:.1f}" height="20" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + length + 8:.1f}" y="{y + 19}">{escape(shown)}</text>')
    label = escape(", ".join(f"{name} {shown}" for name, _, shown in rows))
    size = f'viewBox="0 0 {width} {len(rows) * step}" style="max-width:36rem"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def image(content: bytes, suffix: str, alt: str) -> str:
    """Return an <img> that carries its content; ``suffix`` tells the format."""
    return f'<img src="{_data(content, suffix)}" alt="{escape(alt)}" loading="lazy">'


def video(content: bytes, suffix: str, *, poster: bytes) -> str:
    """Return a <video> with controls that carries its content; shows the JPEG ``poster`` until it plays."""
    sources = f'src="{_data(content, suffix)}" poster="{_data(poster, ".jpg")}"'
    return f'<video {sources} controls muted loop playsinline preload="metadata"></video>'


def _data(content: bytes, suffix: str) -> str:
    return f"data:{_MIME[suffix]};base64,{base64.b64encode(content).decode('ascii')}"


def ticks(highest: float, lowest: float = 0.0) -> list[float]:
    """Return two to seven round values, 0 among them, from at most ``lowest`` <= 0 to at least ``highest`` >= 0."""
    if highest == lowest:
        highest = 1.0
    raw = (highest - lowest) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [float(f"{step * i:.10g}") for i in range(first, last + 1)]


def short(number: float) -> str:
    """Write a number in three digits and few characters: 0.00025 as 2.5e-4."""
    if number and abs(number) < 0.01:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:g}"
