"""A profile while it is taken: what was measured so far survives whatever ends it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DpalEdgeError, ModelFileError
from dpal_edge.manifest import Manifest
from dpal_edge.profile.footage import CLIP, PLACED, Footage, PlacedPeople
from dpal_edge.profile.forms import Form
from dpal_edge.profile.sampler import Effort, Series
from dpal_edge.profile.telemetry import Telemetry
from dpal_edge.runtime.annotate import draw
from dpal_edge.runtime.backend import Backend, DeviceClock
from dpal_edge.runtime.detector import DefaultDetector
from dpal_edge.runtime.model import Model
from dpal_edge.runtime.pipeline import Pipeline

USED = Effort()  # for what ``dpal-edge run`` uses
OTHERS = Effort(least_calls=25, usual_s=1.0, most_s=5.0)
TURNS = Effort(least_calls=20, usual_s=6.0, most_s=30.0)  # of all heads
ON_SOURCE = Effort(usual_s=10.0, most_s=30.0, precision=0.0)  # people come and go: no early end

CAMERAS, PEOPLE_PER_CAMERA = (1, 2, 4), 2
_SEVERAL = 2  # images that tell an engine that they do not come alone
LEAVES_WORK_OUT = "onnxruntime"  # the engine that does not compute outputs that nobody wants


class CutOff(Exception):
    """The device became too hot; measuring ends, and what was measured is kept."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a measurement is of."""

    what: str  # call, pipeline, sustained
    form: Form
    runner: str
    source: str | None = None  # None for calls
    placed: bool = False  # whether people were placed into frames, in known numbers
    batch: int | None = None
    people: float | None = None
    cameras: int | None = None


@dataclass(kw_only=True)
class Measured:
    """The timings of one thing, and when they were taken."""

    labels: Labels
    clocks: tuple[str, ...]  # those of the timings that are results of their own
    warm: bool  # whether warm-up came before
    start_s: float  # of ``time.monotonic``, as the next
    end_s: float = inf
    cpu_s: float = 0.0  # that this process took meanwhile, over all its threads
    series: Series = field(default_factory=Series)

    @property
    def frames(self) -> int:
        """Return the frames of all passes of a pipeline, each of which takes one of each camera that has one."""
        return int(sum(self.series.timings_ms["frames"]))

    @property
    def people(self) -> float:
        """Return the people of all calls or passes: those that were asked for, or found."""
        if self.labels.people is not None:
            return self.labels.people * self.series.calls
        return sum(self.series.timings_ms["people"])


class Session:
    """Measures one thing after the other.

    Args:
        telemetry: that is running; gives heat, clocks and energy.
        max_celsius: of any sensor, at which measuring ends.
        advance: called with 1 after each measurement.
        clock: in seconds; what all timings are taken with.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        max_celsius: float,
        advance: Callable[[int], object] = lambda steps: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.telemetry = telemetry
        self.measured: list[Measured] = []
        self.skipped: list[dict[str, str]] = []
        self.clocks_told: dict[str, str] = {}  # by runner: what its device clock counts
        self._max_celsius, self._advance, self._clock = max_celsius, advance, clock

    def find(self, what: str, *, placed: bool = False) -> Measured | None:
        """Return the first measurement of that kind that has a call: of placed people, or else of none of them."""
        for measured in self.measured:
            labels = measured.labels
            if labels.what == what and labels.placed == placed and measured.series.calls:
                return measured
        return None

    def timed_forms(self) -> list[Form]:
        """Return the forms whose calls were measured, and that can be opened here therefore."""
        calls = (m for m in self.measured if m.labels.what == "call" and m.series.calls)
        return list(dict.fromkeys(m.labels.form for m in calls))

    def measure(
        self,
        labels: Labels,
        step: Callable[[], Mapping[str, float]],
        *,
        clocks: tuple[str, ...],
        decides: str,
        effort: Effort,
        warm: bool = False,
    ) -> Measured:
        """Repeat ``step`` as :meth:`Series.collect` does.

        Raises:
            CutOff: the device is too hot.
        """
        measured = Measured(labels=labels, clocks=clocks, warm=warm, start_s=self._now())
        self.measured.append(measured)
        cpu_s = time.process_time()
        try:
            measured.series.collect(step, effort, decides=decides, check=self._check_heat, clock=self._clock)
        finally:
            measured.cpu_s = time.process_time() - cpu_s
            measured.end_s = self._now()
            self._advance(1)
        return measured

    def measure_calls(self, form: Form, manifest: Manifest, images: NDArray[np.uint8], batches: Sequence[int],
                      effort: Effort) -> None:  # fmt: skip
        """Time calls of a form with each number of images; a form that cannot run here is noted in ``skipped``.

        People come in numbers, after which an engine may run a lone image in another way than before: so the largest
        number comes first, once. A detector sees one frame at a time, and begins with that.
        """
        before = len(self.measured)
        try:
            backend = form.open()
            told = backend.device_clock if isinstance(backend, DeviceClock) else "no clock of its own: the host's alone"
            self.clocks_told[backend.name] = told
            if not manifest.detects:
                with suppress(ModelFileError):  # which its own turn tells
                    backend.run(_feeds(manifest, images, max(*batches, _SEVERAL)))
            for batch in batches:
                feeds = _feeds(manifest, images, batch)
                labels = Labels(what="call", form=form, runner=backend.name, batch=batch, people=batch)
                clocks = ("device", "host") if isinstance(backend, DeviceClock) else ("host",)
                self.measure(labels, self._call(backend, feeds), clocks=clocks, decides="host", effort=effort)
        except DpalEdgeError as error:
            told = " ".join(str(error).split())
            self.skipped.append({"target": form.target, "artifact": form.artifact, "engine": form.engine,
                                 "reason": told})  # fmt: skip
            self._advance(before + len(batches) - len(self.measured))

    def measure_heads(self, form: Form, manifest: Manifest, images: NDArray[np.uint8]) -> None:
        """Time a form with all heads, with all but each, and with each alone, in turns."""
        heads, backend, count = manifest.heads, form.open(), manifest.ranked_images
        names = [head.name for head in heads]
        wanted = {"all": names} | {f"without {name}": [n for n in names if n != name] for name in names}
        wanted |= {f"alone {name}": [name] for name in names}
        feeds = _feeds(manifest, images, count)
        clock = self._clock

        def step() -> dict[str, float]:
            timings = {}
            for what, outputs in wanted.items():
                start = clock()
                backend.run(feeds, outputs)
                timings[what] = 1e3 * (clock() - start)
            return timings

        labels = Labels(what="heads", form=form, runner=backend.name, batch=count, people=count)
        self.measure(labels, step, clocks=(), decides="all", effort=TURNS)

    def measure_placed(
        self, form: Form, model: Model, detector: DefaultDetector, people: int, cameras: int | None = None
    ) -> None:
        """Time the pipeline on the clip of this package with so many people, before each of so many cameras."""
        pipeline = Pipeline(model, PlacedPeople(detector, people))
        source = PLACED if cameras is None else f"{PLACED}, {people} before each camera"
        count = people * (cameras or 1)
        labels = Labels(what="pipeline", form=form, runner=pipeline.name, source=source, placed=True, batch=count,
                        people=count, cameras=cameras or 1)  # fmt: skip
        with closing(Footage([str(CLIP)] * (cameras or 1))) as footage:
            self.measure(labels, self._glass(pipeline, footage), clocks=("glass",), decides="glass", effort=USED)

    def measure_source(
        self,
        form: Form,
        model: Model,
        detector: DefaultDetector,
        sources: Sequence[str],
        *,
        minutes: float | None = None,
    ) -> Measured:
        """Time the pipeline on sources, for ten seconds or for ``minutes``."""
        pipeline = Pipeline(model, detector)
        effort = ON_SOURCE
        if minutes is not None:
            effort = Effort(least_calls=1, least_s=60 * minutes, usual_s=60 * minutes, most_s=60 * minutes)
        with closing(Footage(sources)) as footage:
            labels = Labels(what="pipeline" if minutes is None else "sustained", form=form, runner=pipeline.name,
                            source=footage.name, cameras=len(sources))  # fmt: skip
            step = self._glass(pipeline, footage)
            return self.measure(labels, step, clocks=("glass",), decides="glass", effort=effort, warm=True)

    def _call(self, backend: Backend, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], dict[str, float]]:
        """Return what makes one call, timed by the host and by the engine if it has a clock."""
        clock = self._clock
        if isinstance(backend, DeviceClock):
            run_timed = backend.run_timed

            def timed() -> dict[str, float]:
                start = clock()
                device = run_timed(feeds)
                return {"device": device, "host": 1e3 * (clock() - start)}

            return timed

        def step() -> dict[str, float]:
            start = clock()
            backend.run(feeds)
            return {"host": 1e3 * (clock() - start)}

        return step

    def _glass(self, pipeline: Pipeline, footage: Footage) -> Callable[[], dict[str, float]]:
        """Return what takes the next frames from sources to people drawn on them, timed by stage.

        What it returns holds besides when that was, in seconds, and how many frames and people there were.
        """
        clock = self._clock
        began = clock()

        def step() -> dict[str, float]:
            start = clock()
            frames, reopened_s = footage.next()
            start += reopened_s
            taken = clock()
            people = pipeline.look(frames)
            looked = clock()
            for name, frame in frames.items():
                draw(frame.image, people[name])
            end, now = clock(), time.monotonic()
            age = 1e3 * max(now - frame.captured for frame in frames.values())
            return {
                "glass": age if footage.live else 1e3 * (end - start),
                **({} if footage.live else {"video": 1e3 * (taken - start)}),
                **pipeline.timing_ms,
                "draw": 1e3 * (end - looked),
                "age": age,
                "at": end - began,
                "frames": len(frames),
                "people": sum(map(len, people.values())),
            }

        return step

    def _now(self) -> float:
        """Take a sample, and return when."""
        return self.telemetry.sample().time_s or 0.0

    def _check_heat(self) -> None:
        celsius = self.telemetry.samples[-1].temperatures_c
        for sensor, found in celsius.items():
            if found >= self._max_celsius:
                raise CutOff(f"cut off: sensor {sensor} is at {found:.0f} C, the limit is {self._max_celsius:.0f} C")


def _feeds(manifest: Manifest, images: NDArray[np.uint8], count: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of a call with so many images, over and over the same where there are fewer."""
    return {manifest.input.name: images[np.arange(count) % len(images)]}
