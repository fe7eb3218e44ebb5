"""Two reports side by side: what became slower or faster, and whether that is more than chance."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.profile.report import SCHEMA
from dpal_edge.profile.statistics import significant_changes
from dpal_edge.profile.wording import as_count

_KEY = ("what", "source", "placed", "target", "engine", "computes", "batch", "people", "cameras", "clock")
# What must be the same in both reports, and what is noted where it differs.
_SAME = ("machine model", "machine cpu", "machine cores", "machine gpus", "machine power_mode", "bundle name",
         "bundle input", "bundle heads")  # fmt: skip
_NOTED = {"machine engines": "engines", "machine os": "system", "machine clock_state": "clocks"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One measurement in both reports."""

    name: str
    before_ms: float  # medians
    after_ms: float
    percent: float  # above 0 where it became slower
    significant: bool
    flags: tuple[str, ...]  # that only one of the two numbers bears, such as that other programs ran


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changed from one report to another."""

    changes: tuple[Change, ...]  # of all that both measured
    threshold: float  # percent
    notes: tuple[str, ...]  # what else differs

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What became slower by more than the threshold, and not by chance."""
        return tuple(c for c in self.changes if c.significant and c.percent > self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON-ready values."""
        return {**asdict(self), "regressions": [change.name for change in self.regressions]}

    def as_text(self) -> str:
        """Return a line for each measurement that moved, and a verdict."""
        moved = [c for c in self.changes if c.significant and abs(c.percent) > self.threshold]
        lines = [f"note: {note}" for note in self.notes]
        for c in sorted(moved, key=lambda change: -change.percent):
            word = "slower" if c.percent > 0 else "faster"
            marks = f" [{'; '.join(c.flags)}]" * bool(c.flags)
            lines.append(f"{word} {c.percent:+7.1f} %  {c.before_ms:9.3f} -> {c.after_ms:9.3f} ms  {c.name}{marks}")
        slower, faster = len(self.regressions), len(moved) - len(self.regressions)
        found = f"{slower} slower and {faster} faster by more than {self.threshold:g} % and not by chance"
        return "\n".join([*lines, f"{'REGRESSION' if slower else 'ok'}: {len(self.changes)} compared, {found}"])


def compare(before: Path, after: Path, *, threshold: float) -> Comparison:
    """Compare what two reports have both measured.

    Args:
        before: a report.json, or the folder that it lies in.
        after: likewise.
        threshold: percent of the median that a change must be beyond to count.

    Raises:
        DataError: a file is no report.
        ConfigError: the reports are of different devices, models or sizes, or the threshold is no percentage.
    """
    if not 0 <= threshold < inf:
        raise ConfigError(f"--threshold is {threshold:g}, expected a percentage of 0 or more, such as 15")
    old, new = read_report(before), read_report(after)
    for place in _SAME:
        section, _, key = place.partition(" ")
        found, expected = new[section][key], old[section][key]
        if found != expected:
            raise ConfigError(
                f"{after} cannot be compared with {before}: {key} of the {section} is {_short(found)}, expected "
                f"{_short(expected)}; profile the same model on the same device"
            )
    first, second = (_by_key(report) for report in (old, new))
    both = [key for key in first if key in second]
    if not both:
        raise ConfigError(
            f"{after} cannot be compared with {before}: they share no measurement; give both the same --people, "
            f"--backend and --source"
        )
    tested = significant_changes({key: (first[key]["ms"]["blocks"], second[key]["ms"]["blocks"]) for key in both})
    changes = []
    for key in both:
        was, now = (measured[key]["ms"]["p50"] for measured in (first, second))
        percent = round(100 * (now / was - 1), 2)
        flags = tuple(sorted({*first[key]["flags"]} ^ {*second[key]["flags"]}))
        changes.append(Change(name=_name(first[key]), before_ms=was, after_ms=now, percent=percent, flags=flags,
                              significant=key in tested))  # fmt: skip
    return Comparison(changes=tuple(changes), threshold=threshold, notes=_notes(old, new, first, second))


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        DataError: it is missing, damaged, or of another schema.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected a report.json of dpal-edge profile") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); expected a report.json of dpal-edge profile") from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        raise DataError(f"{file}: schema {found}, expected a profile of schema {SCHEMA}; profile again")
    try:
        _require_whole(report)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: a damaged report ({type(error).__name__}: {error}), expected what dpal-edge profile wrote; "
            f"profile again"
        ) from error
    return dict(report)


def _require_whole(report: Mapping[str, Any]) -> None:
    """Touch all that a comparison reads; an error tells what is missing or of another type."""
    for place in (*_SAME, *_NOTED, "bundle sha256", "telemetry throttled"):
        section, _, key = place.partition(" ")
        report[section][key]
    report["interrupted"]
    for measurement in report["measurements"]:
        ms = measurement["ms"]
        if not (ms["p50"] > 0 and all(isfinite(value) for value in (ms["p50"], *ms["blocks"]))):
            raise ValueError(f"a median of {ms['p50']} ms, or of a block, is no time")
        "".join(measurement["flags"])
        for key in _KEY:
            measurement[key]


def _by_key(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return measurements by what they are of; people found in a source are a result and part of no key."""
    found = {}
    for measurement in report["measurements"]:
        key = [measurement[name] for name in _KEY if name != "people" or measurement["placed"]]
        found[json.dumps(key)] = measurement
    return found


def _name(measurement: Mapping[str, Any]) -> str:
    """Return a name that no other measurement of the report has."""
    told = [measurement[part] for part in ("what", "target", "engine", "computes", "source")]
    batch, cameras = measurement["batch"], measurement["cameras"]
    told.append(batch and as_count(batch, "person", "people"))
    told.append(cameras and as_count(cameras, "camera"))
    return " ".join(str(part) for part in (*told, measurement["clock"]) if part)


def _notes(
    old: Mapping[str, Any], new: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return what differs and does not forbid a comparison."""
    differs = old["bundle"]["sha256"] != new["bundle"]["sha256"]
    notes = ["the bundles differ, of the same architecture"] * differs
    for place, what in _NOTED.items():
        section, _, key = place.partition(" ")
        was, now = old[section][key], new[section][key]
        notes += [f"{what}: {_short(was)}, now {_short(now)}"] * (was != now)
    for report, when, alone in ((old, "first", first.keys() - second), (new, "second", second.keys() - first)):
        notes += [f"measured only in the {when} report: {len(alone)}"] * bool(alone)
        notes += [f"the {when} report was {report['interrupted']}"] * bool(report["interrupted"])
        notes += [f"the device throttled during the {when} report"] * bool(report["telemetry"]["throttled"])
    return tuple(notes)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
