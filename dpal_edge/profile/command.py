"""``dpal-edge profile``: measure a bundle on this device, and write what was found."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dpal_edge import __version__
from dpal_edge.errors import BackendUnavailable, ConfigError
from dpal_edge.files import write_text
from dpal_edge.manifest import Manifest
from dpal_edge.profile.curves import build_curves
from dpal_edge.profile.footage import CLIP, Footage
from dpal_edge.profile.forms import Form, find_forms
from dpal_edge.profile.layers import profile_layers
from dpal_edge.profile.locking import locked_clocks, undisturbed
from dpal_edge.profile.machine import describe_bundle, describe_machine
from dpal_edge.profile.page import render_page
from dpal_edge.profile.report import (
    SCHEMA,
    describe_clocks,
    describe_heads,
    describe_measurements,
    describe_stages,
    describe_sustained,
    describe_telemetry,
    find_verdicts,
    rank_calls,
)
from dpal_edge.profile.roofline import build_roofline, find_ceilings
from dpal_edge.profile.session import (
    CAMERAS,
    LEAVES_WORK_OUT,
    OTHERS,
    PEOPLE_PER_CAMERA,
    USED,
    CutOff,
    Session,
)
from dpal_edge.profile.telemetry import Telemetry
from dpal_edge.runtime.detector import DefaultDetector
from dpal_edge.runtime.model import Model, read_goldens

INTERRUPTED = "interrupted by Ctrl-C or SIGTERM"
_UNITS = {"ms": 1.0, "s": 1e3, "us": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    sources: tuple[str, ...] = ()  # empty: the clip of this package
    people: tuple[int, ...] = (1, 2, 4, 8, 16)
    backends: tuple[str, ...] = ()  # empty: all that run here
    minutes: float | None = None
    budget_ms: float | None = None
    lock_clocks: bool = False
    max_celsius: float = 95.0

    def __post_init__(self) -> None:
        limits = {
            "--minutes": (self.minutes, "a number above 0, such as 20"),
            "--budget": (self.budget_ms, "a time above 0, such as 33ms"),
            "--max-celsius": (self.max_celsius, "a temperature above 0, such as 95"),
        }
        for option, (value, expected) in limits.items():
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{option} is {value:g}, expected {expected}")

    @property
    def footage(self) -> tuple[str, ...]:
        """The sources, or the clip of this package where there are none."""
        return self.sources or (str(CLIP),)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; of sources the number alone, since an address may hold a password."""
        kept = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {**kept, "sources": len(self.sources)}


def parse_people(text: str) -> tuple[int, ...]:
    """Return the numbers of ``text``, such as "1,2,4", ascending.

    Raises:
        ConfigError: it is something else, or a number is not in 1..256.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 256 for part in parts):
        raise ConfigError(f"--people is {text!r}, expected numbers from 1 to 256 with commas between, such as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def parse_budget(text: str) -> float:
    """Return the milliseconds of ``text``, such as "33ms", "0.033s" or "33".

    Raises:
        ConfigError: it is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|us)?", text.strip(), re.ASCII)
    if not found:
        raise ConfigError(f"--budget is {text!r}, expected a time above 0, such as 33ms")
    return float(found[1]) * _UNITS[found[2] or "ms"]


def exit_code(report: Mapping[str, Any]) -> int:
    """Return 130 after Ctrl-C, 2 where the device became too hot or the budget is missed, else 0."""
    if report["interrupted"] == INTERRUPTED:
        return 130
    missed = any(verdict["kind"] == "budget" and verdict["passed"] is False for verdict in report["verdicts"])
    return 2 if report["interrupted"] or missed else 0


def profile(
    bundle: Path,
    out: Path,
    options: Options,
    *,
    say: Callable[[str], object],
    progress: Callable[[int], AbstractContextManager[Callable[[int], object]]],
    telemetry: Telemetry | None = None,
) -> dict[str, Any]:
    """Measure ``bundle``, write ``report.json`` and ``report.html`` into the folder ``out``, and return the report.

    Ctrl-C, a device that becomes too hot, and errors end the measuring; the report then holds what came before.

    Args:
        bundle: folder written by ``dpal-edge export``, or a manifest.
        out: folder to write; the report of an earlier profile in it is replaced.
        options: see there.
        say: takes a line on what happens.
        progress: given the number of things to measure, a context whose value is called with 1 after each.
        telemetry: sensors that are not running yet; None opens this machine's.

    Raises:
        ModelFileError: the bundle is damaged.
        BackendUnavailable: nothing here runs it, or the clocks cannot be locked.
        ConfigError, DataError: a source that cannot be opened, a folder that cannot be written.
    """
    manifest = Manifest.read(bundle)
    forms, skipped = find_forms(bundle, manifest, options.backends)
    if not manifest.detects:
        Footage(options.footage).close()  # a wrong source is an error now
    with ExitStack() as stack:
        stack.enter_context(_folder(out))
        if options.lock_clocks:
            stack.enter_context(locked_clocks(say))
        telemetry = stack.enter_context(telemetry or Telemetry.open())
        advance = stack.enter_context(progress(_count_steps(manifest, len(forms), options)))
        run = _Run(bundle, manifest, forms, options, Session(telemetry, options.max_celsius, advance))
        run.session.skipped += skipped
        interrupted, failure = None, None
        try:
            run.measure()
        except KeyboardInterrupt:
            interrupted = INTERRUPTED
        except CutOff as cut:
            interrupted = str(cut)
        except Exception as error:
            if not run.session.measured:
                raise
            failure, interrupted = error, f"stopped by an error: {' '.join(str(error).split())}"
        with undisturbed():  # a second Ctrl-C must not cost the report
            telemetry.sample()
            report = run.report(interrupted)
            try:
                write_text(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
            finally:  # neither is lost through the other
                write_text(out / "report.html", render_page(report))
    if failure is not None:
        say(f"what was measured before the error is in {out}")
        raise failure
    return report


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make a folder; where nothing is written into it, it and what was made above it are gone at the end."""
    made = []
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # what cannot be written should be said before minutes of measuring
            pass
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be made or written ({error.strerror}), expected a folder to write report.json and "
            f"report.html into; choose another --out"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # it holds the report
            for folder in made:
                folder.rmdir()


def _count_steps(manifest: Manifest, forms: int, options: Options) -> int:
    """Return how many things will be measured, as far as they can run."""
    calls = forms * len(options.people) + (len(manifest.heads) > 1)
    if manifest.detects:
        return calls
    return calls + len(options.people) + len(CAMERAS) + 1 + (options.minutes is not None)


class _Run:
    """One profile: what is measured in which order, the most important first."""

    def __init__(
        self, bundle: Path, manifest: Manifest, forms: Sequence[Form], options: Options, session: Session
    ) -> None:
        self.session = session
        self._bundle, self._manifest, self._forms, self._options = bundle, manifest, forms, options
        self._layers: dict[str, Any] = {}
        self._roofline: dict[str, Any] | None = None

    def measure(self) -> None:
        """Measure all; what ends it early passes through."""
        session, manifest, people = self.session, self._manifest, self._options.people
        images, _ = read_goldens(self._bundle, manifest)
        used, sources = self._forms[0], self._options.footage
        if not manifest.detects:
            with self._open_pipeline() as (model, detector):
                for count in people:  # known numbers first: that warms up all sizes
                    session.measure_placed(used, model, detector, count)
                session.measure_source(used, model, detector, sources)
                for cameras in CAMERAS:
                    session.measure_placed(used, model, detector, PEOPLE_PER_CAMERA, cameras)
        for form in self._forms:
            session.measure_calls(form, manifest, images, people, USED if form is used else OTHERS)
        if not any(measured.series.calls for measured in session.measured):
            reasons = "; ".join(dict.fromkeys(one["reason"] for one in session.skipped))
            raise BackendUnavailable(f"{self._bundle}: nothing here runs it ({reasons}); `dpal-edge doctor` tells more")
        whole = next((form for form in session.timed_forms() if form.engine == LEAVES_WORK_OUT), None)
        if whole is not None and len(manifest.heads) > 1:
            session.measure_heads(whole, manifest, images)
        self._look_inside()
        if self._options.minutes is not None and not manifest.detects:
            with self._open_pipeline() as (model, detector):
                session.measure_source(used, model, detector, sources, minutes=self._options.minutes)

    @contextmanager
    def _open_pipeline(self) -> Iterator[tuple[Model, DefaultDetector]]:
        """Open the model that ``dpal-edge run`` uses, and its detector."""
        with closing(Model(self._forms[0].open(), self._manifest)) as model, closing(DefaultDetector()) as detector:
            yield model, detector

    def _look_inside(self) -> None:
        """Take the layers of what is used and of what is fastest here, and place the first's below the ceilings."""
        images = self._manifest.ranked_images
        ranked = rank_calls(describe_measurements(self.session), images)
        wanted = [self._forms[0].to_dict(), *ranked[:1]]
        for form in self.session.timed_forms():
            if not any(form.to_dict().items() <= one.items() for one in wanted):
                continue
            key = form.artifact if form.artifact not in self._layers else form.label
            self._layers[key] = profile_layers(
                form.path, engine=form.engine, batch=images, precision=form.computes, graph=form.graph
            )
        if not self._layers:
            return
        first, *others = self._layers.values()
        memory_mb = self.session.telemetry.samples[-1].ram_total_mb
        self._roofline = build_roofline(first, find_ceilings(first, memory_mb=memory_mb), others=others)

    def report(self, interrupted: str | None) -> dict[str, Any]:
        """Return all that was measured."""
        session = self.session
        measurements = describe_measurements(session)
        report = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "version": __version__,
            "machine": describe_machine(session.telemetry),
            "bundle": describe_bundle(self._bundle, self._manifest, self._forms[0]),
            "options": self._options.to_dict(),
            "skipped": session.skipped,
            "clocks": describe_clocks(session),
            "measurements": measurements,
            "curves": build_curves(measurements),
            "heads": describe_heads(session.find("heads"), self._manifest.heads, session.telemetry),
            "stages": describe_stages(session.find("pipeline"), session.telemetry),
            "sustained": describe_sustained(session.find("sustained")),
            "telemetry": describe_telemetry(session),
            "layers": self._layers,
            "roofline": self._roofline,
            "interrupted": interrupted,
        }
        return {**report, "verdicts": find_verdicts(report, self._manifest.ranked_images)}
