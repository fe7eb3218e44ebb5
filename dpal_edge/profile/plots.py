"""Plots of a profile as SVG, in the colours of the page that they stand on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from dpal_edge.html import short, ticks

COLOURS = ("var(--accent)", "var(--second)", "var(--good)", "#a855f7", "#0d9488", "#ca8a04", "#db2777", "var(--soft)")

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 28, 36  # margins
_LETTER, _BOLD_LETTER = 6.3, 7.2  # average width of a letter at 12 pixels
_HALO = "paint-order:stroke;stroke:var(--paper);stroke-width:3px"
_STROKE = 'fill="none" stroke-linecap="round" stroke-linejoin="round"'


@dataclass(frozen=True)
class Axis:
    """What one direction of a plot shows; both ends are finite, and above 0 where it is logarithmic."""

    low: float
    high: float
    label: str
    logarithmic: bool = False
    at: Sequence[float] = ()  # where marks stand; empty: at round values

    def place(self, value: float) -> float:
        """Return where a value lies between the ends, 0..1; what is beyond lies on the end."""
        if self.logarithmic:
            low, high, value = (math.log10(max(x, 1e-30)) for x in (self.low, self.high, value))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)

    def marks(self) -> list[float]:
        """Return the values that are written at the axis: round ones, at most eight."""
        if self.at:
            return list(self.at)
        if not self.logarithmic:
            grid = ticks(self.high - self.low)
            step = grid[1] - grid[0]
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [float(f"{step * i:.10g}") for i in range(first, last + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, -(-(last - first) // 6))
        return [10.0**power for power in range(first, last + 1, step)]


def axis(values: Iterable[float], label: str, *, zero: bool = True, logarithmic: bool = False) -> Axis:
    """Return an axis that shows all of these finite values; there is one at least."""
    known = list(values)
    low, high = min(known), max(known)
    if logarithmic:
        return Axis(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), label, True)
    if zero:
        low = min(low, 0.0)
        return Axis(low, ticks(max(high, low), low)[-1], label)
    return Axis(low, high if high > low else low + 1, label)


@dataclass
class Plot:
    """A plot in the making: marks are drawn in the order in which they are added, over the grid."""

    title: str
    x: Axis
    y: Axis
    marks: list[str] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)  # of lines and dots, with their colours

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        return (
            _LEFT + self.x.place(x) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - self.y.place(y) * (_HEIGHT - _TOP - _BOTTOM),
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, name: str = "", dash: str = "") -> None:
        """Draw a line through points; one point is a dot. A line with a name gets one below the plot."""
        pixels = [self.at(*point) for point in points]
        if len(pixels) == 1:
            self.dot(*points[0], colour)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="1.8" {_STROKE}{dashed}/>')
        if name:
            self.names.append((name, colour))

    def dot(self, x: float, y: float, colour: str, *, radius: float = 3, title: str = "") -> None:
        """Draw a dot, which tells ``title`` to who points at it."""
        cx, cy = self.at(x, y)
        hint = f"<title>{escape(title)}</title>" if title else ""
        self.marks.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:g}" fill="{colour}" fill-opacity=".85">{hint}</circle>'
        )

    def box(self, left: float, right: float, bottom: float, top: float, colour: str, *, opacity: float = 1) -> None:
        """Fill a rectangle between values, at least a pixel wide and high."""
        (x0, y0), (x1, y1) = self.at(left, bottom), self.at(right, top)
        size = f'width="{max(x1 - x0, 1):.1f}" height="{max(y0 - y1, 1):.1f}"'
        self.marks.append(
            f'<rect x="{x0:.1f}" y="{min(y1, y0 - 1):.1f}" {size} fill="{colour}" fill-opacity="{opacity:g}"/>'
        )

    def mark(self, x: float, text: str, colour: str, *, row: int = 0) -> None:
        """Draw an upright line with a word at its top; a row of 1 puts the word below that of others."""
        place, top = self.at(x, self.y.high)
        end = place + 4 + len(text) * _LETTER > _WIDTH
        self.marks.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="{colour}" '
            f'stroke-dasharray="3 3"/><text x="{place + (-4 if end else 4):.1f}" y="{top + 11 + 13 * row:.1f}" '
            f'text-anchor="{"end" if end else "start"}" style="fill:{colour};{_HALO}">{escape(text)}</text>'
        )

    def render(self) -> str:
        """Return the plot as SVG, and the names of what it shows as lines of text below."""
        room = int((_WIDTH - len(self.y.label) * _LETTER) / _BOLD_LETTER) - 1
        title = self.title if len(self.title) <= room else f"{self.title[: room - 1]}…"
        parts = [f'<text x="0" y="14" style="fill:var(--ink);font-weight:600">{escape(title)}</text>']
        for value in self.y.marks():
            y = self.at(self.x.low, value)[1]
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_write(value)}</text>')
        for value in self.x.marks():
            x = self.at(value, self.y.low)[0]
            bottom = _HEIGHT - _BOTTOM
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="var(--soft)"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_write(value)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(self.x.label)}</text>')
        unit = f'<text x="{_WIDTH - _RIGHT}" y="14" text-anchor="end">{escape(self.y.label)}</text>'
        label = escape(f"{self.title}, {self.y.label} over {self.x.label}")
        drawing = "".join((*parts, unit, *self.marks))
        return (
            f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{drawing}</svg>'
            f"{legend(self.names)}</figure>"
        )


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Return a line of coloured names."""
    if not names:
        return ""
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names
    )
    return f"<figcaption>{keys}</figcaption>"


def grid(parts: Sequence[str]) -> str:
    """Return plots side by side where there is room, else below each other."""
    return f"<div class='grid'>{''.join(parts)}</div>" if parts else ""


def stacked_bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """Return one bar of parts side by side, (name, value >= 0, value as text), and its legend."""
    total = sum(value for _, value, _ in parts) or 1.0
    drawn, names, x = [], [], 0.0
    for i, (name, value, shown) in enumerate(parts):
        colour, width = COLOURS[i % len(COLOURS)], value / total * _WIDTH
        drawn.append(
            f'<rect x="{x:.2f}" y="0" width="{max(width - 0.6, 0.4):.2f}" height="26" fill="{colour}">'
            f"<title>{escape(f'{name}: {shown}')}</title></rect>"
        )
        names.append((f"{name} {shown}", colour))
        x += width
    label = escape(", ".join(f"{name} {shown}" for name, _, shown in parts))
    bar = f'<svg viewBox="0 0 {_WIDTH} 26" preserveAspectRatio="none" class="bar" role="img" aria-label="{label}">'
    return f"<figure>{bar}{''.join(drawn)}</svg>{legend(names)}</figure>"


def _write(value: float) -> str:
    """Write a mark of an axis in few characters: 2000 as 2k."""
    return f"{value / 1000:g}k" if 1000 <= abs(value) < 1e6 else short(value)
