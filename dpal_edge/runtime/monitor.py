"""What a running app can be asked: frames, drops, ages and the time of each stage; safe to read from other threads."""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpal_edge.runtime.person import Person
from dpal_edge.runtime.sources import Frame, Source

_RECENT = 300  # passes that percentiles look back
_RATE_S = 3.0  # that frames per second look back
_MOST_TIMES = 3000  # of frames that are remembered for them
_HUNG_S = 10.0  # without a pass, while cameras give frames, the app counts as ill


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds."""

    mean: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Latency":
        """Summarise values; no value gives zeros."""
        p50, p95 = np.percentile(values, [50, 95]) if values else (0.0, 0.0)
        return cls(mean=round(float(np.mean(values or [0])), 3), p50=round(float(p50), 3), p95=round(float(p95), 3))


@dataclass(frozen=True, eq=False)
class Result:
    """The newest result of a source."""

    frame: Frame
    people: Sequence[Person]


class Monitor:
    """Counts what a run does. Written by its loop, read by anybody."""

    def __init__(self, sources: Sequence[Source], engine: str) -> None:
        self.sources, self.engine = sources, engine
        self.began = time.monotonic()
        self.slow_viewers = 0  # that a server let go
        self.newest: dict[str, Result] = {}  # by source; replaced, never changed
        self.stages: dict[str, tuple[float, int]] = {}  # by stage: seconds in all, passes
        self._lock = threading.Lock()
        self._timings: deque[dict[str, float]] = deque(maxlen=_RECENT)
        self._ages = {source.name: deque[float](maxlen=_RECENT) for source in sources}
        self._times = {source.name: deque[float](maxlen=_MOST_TIMES) for source in sources}
        self._last = self.began  # pass
        self._processed = dict.fromkeys(self._ages, 0)

    def add(
        self, frames: Mapping[str, Frame], people: Mapping[str, Sequence[Person]], timing_ms: Mapping[str, float]
    ) -> None:
        """Take the results of one pass."""
        now = time.monotonic()
        with self._lock:
            self._last = now
            self._timings.append(dict(timing_ms))
            for stage, value in timing_ms.items():
                seconds, passes = self.stages.get(stage, (0.0, 0))
                self.stages[stage] = seconds + value / 1000, passes + 1
            for name, frame in frames.items():
                self.newest[name] = Result(frame, people[name])
                self._ages[name].append(1000 * (now - frame.captured))
                self._times[name].append(now)
                self._processed[name] += 1

    def latency_ms(self) -> dict[str, Latency]:
        """Return the recent time of each stage."""
        with self._lock:
            timings = list(self._timings)
        return {stage: Latency.of([timing[stage] for timing in timings]) for stage in (timings[-1] if timings else ())}

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        now = time.monotonic()
        sources = {}
        for source in self.sources:
            with self._lock:
                recent = [moment for moment in self._times[source.name] if now - moment < _RATE_S]
                ages, newest = list(self._ages[source.name]), self.newest.get(source.name)
                processed = self._processed[source.name]
            sources[source.name] = {
                **asdict(source.counters),
                "processed": processed,
                "live": source.live,
                "ended": source.ended,
                "stalled": source.stalled,
                "fps": round(len(recent) / min(_RATE_S, max(now - self.began, 1e-3)), 2),
                "people": len(newest.people) if newest else 0,
                "age_ms": asdict(Latency.of(ages)),
            }
        stages = {stage: asdict(latency) for stage, latency in self.latency_ms().items()}
        return {
            "engine": self.engine,
            "uptime_s": round(now - self.began, 1),
            "slow_viewers": self.slow_viewers,
            "sources": sources,
            "stages_ms": stages,
        }

    @property
    def healthy(self) -> bool:
        """Whether every live source gives frames, and the app takes them."""
        live = any(source.live and not source.ended for source in self.sources)
        hangs = live and time.monotonic() - self._last > _HUNG_S
        return not hangs and not any(source.stalled for source in self.sources)
