"""What a person sees of a run: a panel that follows it on a terminal, a line per checkpoint anywhere else."""

import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpal_edge.train.watcher import Record, Watcher

_REFRESH_S = 0.25
_NAMED = 3  # files named in a line; the rest is counted
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40  # characters, at most
_BAR_WIDTH = 10  # characters of a share of 100 %, at most
_SLOW = 0.05  # share of time spent waiting for data that is worth a colour


class Panel(Watcher):
    """Show what is trained on what, then progress, speed, loss terms, router usage, last validation and probe.

    All goes to standard error. It is drawn between updates and not by a thread of its own, which a data worker that is
    forked could inherit in the middle of a line.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        drawable = self._console.is_terminal and not self._console.is_dumb_terminal
        self._draws = drawable and not self._console.options.ascii_only
        self._live: Live | None = None
        self._drawn = 0.0
        self._facts: dict[str, Any] = {}
        self._step = 0
        self._clock: tuple[float, int] | None = None  # time and step of the first update seen, which is a slow one
        self._record: Record | None = None
        self._history: dict[str, list[float]] = {}
        self._notes: dict[str, str] = {}

    def __enter__(self) -> "Panel":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)
            self._live.stop()
            self._live = None

    def started(self, facts: dict[str, Any]) -> None:
        """Say what is trained on what, and begin to draw."""
        self._facts, self._step = facts, facts["from_step"]
        self._say(*opening(facts))
        if self._draws:
            self._live = Live(
                self._draw(), console=self._console, auto_refresh=False, redirect_stdout=False, transient=False
            )
            self._live.start(refresh=True)

    def updated(self, step: int) -> None:
        """Count an update."""
        self._step = step
        self._clock = self._clock or (time.monotonic(), step)
        self._refresh()

    def recorded(self, record: Record) -> None:
        """Take the newest numbers."""
        self._record = record
        for name, value in record.values.items():
            self._history.setdefault(name, []).append(value)

    def saved(self, path: Path, validation: dict[str, float]) -> None:
        """Show a checkpoint and the losses on held-out images."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in validation.items())
        self._note("saved", path.stem + (f"; loss on held-out images: {losses}" if losses else ""))

    def probed(self, step: int, scores: dict[str, float]) -> None:
        """Show what the frozen student is worth."""
        self._note("probe", f"{', '.join(f'{name} {value:.4g}' for name, value in scores.items())} (update {step})")

    def warned(self, text: str) -> None:
        """Say what went wrong."""
        self._say(f"warning: {text}")

    def stopping(self) -> None:
        """Say why nothing seems to happen for a moment."""
        self._say("stopping: saving what was learned; once more gives up at once")

    def _note(self, name: str, text: str) -> None:
        self._notes[name] = text
        if self._live is not None:
            self._refresh(now=True)
        else:
            self._say(f"{self._progress()}: {self._speed()}; {name} {text}")

    def _say(self, *lines: str) -> None:
        """Write lines above the panel if there is one."""
        for line in lines:
            if self._live is not None:
                self._console.print(Text(line))
            else:
                sys.stderr.write(f"{line}\n")

    def _refresh(self, *, now: bool = False) -> None:
        if self._live is not None and (now or time.monotonic() - self._drawn > _REFRESH_S):
            self._live.update(self._draw(), refresh=True)
            self._drawn = time.monotonic()

    def _draw(self) -> RenderableType:
        facts = self._facts
        teachers = " + ".join(Path(teacher["spec"].partition("?")[0]).name for teacher in facts["teachers"])
        title = f"{facts['method']}: {teachers} → {facts['student']}"
        where = f"{facts['device']} {facts['precision']}"
        where += f", {facts['processes']} processes" if facts["processes"] > 1 else ""
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(Text(title, "bold"), Text(where, "dim"))
        head.add_row(ProgressBar(total=facts["steps"], completed=self._step, complete_style="cyan"), self._progress())
        parts: list[RenderableType] = [Rule(style="dim"), head, Text(self._speed(), self._speed_style())]
        if self._record is not None:
            width = self._console.width
            parts += [Text(), self._terms(self._record, min(max(width - 30, 4), _SPARK_WIDTH))]
            parts += _usage(self._record, min(max((width - 20) // 3 - 7, 0), _BAR_WIDTH))
        if self._notes:
            notes = Table.grid(padding=(0, 2))
            notes.add_column(style="dim")
            for name, text in self._notes.items():
                notes.add_row(name, Text(text))
            parts += [Text(), notes]
        return Group(*parts)

    def _progress(self) -> str:
        """Return updates done, of how many, and the time that is left."""
        steps = self._facts["steps"]
        text = f"{self._step:,} of {steps:,} updates"
        if self._clock is not None and self._step > self._clock[1]:
            per_update = (time.monotonic() - self._clock[0]) / (self._step - self._clock[1])
            text += f", {timedelta(seconds=round(per_update * (steps - self._step)))} left"
        return text

    def _speed(self) -> str:
        record = self._record
        if record is None:
            return "the first updates are on their way"
        return (
            f"{record.images_per_s:.1f} images/s, {100 * record.data_wait:.0f} % waiting for data, lr {record.lr:.2e}"
        )

    def _speed_style(self) -> str:
        return "yellow" if self._record is not None and self._record.data_wait > _SLOW else ""

    def _terms(self, record: Record, width: int) -> Table:
        """Return a row per loss term: its mean over the last interval and its course over this session."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, overflow="crop", style="cyan")
        for name in sorted(record.values, key=lambda name: (name != "loss", name == "grad_norm")):
            if not name.startswith("usage/"):
                style = "bold" if name == "loss" else ""
                table.add_row(
                    Text(name.replace("_", " "), style), Text(f"{record.values[name]:.4g}", style),
                    sparkline(self._history[name], width),
                )  # fmt: skip
        return table


def opening(facts: dict[str, Any]) -> list[str]:
    """Return the lines that say what is trained on what."""
    counts = facts["parameters"]
    lines = [
        f"student   {facts['student']}, {counts['backbone'] / 1e6:.2f} M parameters, "
        f"and {counts['train_only'] / 1e6:.2f} M that only training needs (method {facts['method']})"
    ]
    if facts["explained"] is not None:
        lines.append(f"          sliced from the teacher: explains {100 * facts['explained']:.1f} % of its variance")
    for teacher in facts["teachers"]:
        roles = f" for {', '.join(teacher['roles'])}" if len(facts["teachers"]) > 1 else ""
        lines.append(
            f"teacher   {teacher['spec']}{roles}, {teacher['parameters'] / 1e6:.1f} M parameters, layer "
            f"{teacher['layer']}, {100 * teacher['keys_matched']:.4g} % of keys matched, licence {teacher['licence']}"
        )
        lines += [f"          {teacher[key]}" for key in ("limits", "note") if teacher[key]]
    ignored = facts["ignored"]
    more = f"; {len(ignored)} files ignored, no images by name: {named(ignored)}" if ignored else ""
    processes = f" by {facts['processes']} processes" if facts["processes"] > 1 else ""
    passes = f" in {facts['accumulate']} passes" if facts["accumulate"] > 1 else ""
    lines += [
        f"images    {facts['images']} to train on, {facts['validation_images']} held out{more}",
        f"device    {facts['device']} in {facts['precision']}",
        f"updates   {facts['from_step']} to {facts['steps']} of {facts['batch']} images{passes}{processes}",
    ]
    return lines + [
        f"changed   {change['name']}: {change['before']} → {change['after']}" for change in facts["changes"]
    ]


def named(files: list[str]) -> str:
    """Name the first few of ``files`` and count the rest."""
    more = len(files) - _NAMED
    return ", ".join(files[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def sparkline(values: list[float], width: int) -> str:
    """Draw the course of ``values`` in at most ``width`` characters, between their least and greatest mean."""
    count = min(len(values), width)
    bounds = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    if not finite:
        return " " * count
    low, high = min(finite), max(finite)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] if abs(mean) < float("inf") else " " for mean in means)


def _usage(record: Record, width: int) -> list[RenderableType]:
    """Return bars of how much each pattern uses the expert of each, if the method has a router."""
    rows: dict[str, list[float]] = {}
    for name, value in record.values.items():
        if name.startswith("usage/"):
            rows.setdefault(name.split("/")[1], []).append(value)
    if not rows:
        return []
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(text, "dim") for text in ("uses expert of", *rows)))
    for name, shares in rows.items():
        table.add_row(name, *(_bar(share, width) for share in shares))
    return [Text(), table]


def _bar(share: float, width: int) -> Text:
    filled = round(width * min(max(share, 0.0), 1.0))
    return Text.assemble(("█" * filled, "green"), ("░" * (width - filled), "dim"), f" {100 * share:3.0f} %")
