"""``dpal-edge install``: every form of a bundle that can run on this device, checked and timed; the fastest stays."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DpalEdgeError, ModelFileError
from dpal_edge.install.engines import BindingsBuilder, Builder, obtain_engine
from dpal_edge.install.trtexec import TrtExec
from dpal_edge.manifest import Artifact, Latency, Manifest, Parity
from dpal_edge.runtime.backend import ENGINES, Backend, open_backend, time_in_turns, ways_to_run
from dpal_edge.runtime.cuda import Cuda
from dpal_edge.runtime.installed import BUILT_TARGETS, Choice, write_record
from dpal_edge.runtime.model import Model, Outputs, largest_errors, least_cosines, read_goldens, worst_head
from dpal_edge.runtime.tensorrt import NEWER, SILENTLY_WRONG, BuildOptions

_BATCHES = ((1, 30), (4, 20), (8, 10))  # people in a frame, least calls; a detector sees one frame at a time
# Of the largest output: what sums in half precision may differ, where the host's are in float32. bf16 on a CPU came to
# 0.011; no GPU was measured yet.
_HALF_ALLOWANCE = 0.02
# How far cosines may be from 1: this times what the export found, and a rest. bf16 on a CPU came to 3e-5, INT8 to 1e-3.
_GAP_FACTOR, _GAP_ALLOWANCE = 1.5, 1e-3
_DETECTOR_BATCHES = (1, 1, 32)  # one frame, at times those of several cameras: as many as Model passes on
_TRTEXEC = "trtexec"  # which runs an engine to check and to time it, not for an app


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One form of the bundle on this device."""

    target: str
    engine: str  # that runs it
    precision: str | None = None  # that the engine is told to compute in; None: the file's own
    passed: bool | None  # None: it cannot run here
    found: str  # in words
    name: str = ""  # of the engine that ran it, with its version and device
    error: float | None = None  # largest, over the largest output of the same head
    allowed: float | None = None
    cosine: float | None = None  # least similarity of an image's output with the golden one, of all heads
    latency: tuple[Latency, ...] = ()
    file: str | None = None  # the engine in the cache; None: the bundle's own file
    sha256: str = ""  # of that engine

    @property
    def runner(self) -> str:
        """The engine, and the precision if one was chosen."""
        return f"{self.engine} {self.precision}" if self.precision else self.engine

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.target}/{self.runner}"

    def median_ms(self, batch: int) -> float:
        """Return the time of a call with ``batch`` images."""
        return next(latency.median_ms for latency in self.latency if latency.batch == batch)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What an installation found, and what it chose."""

    bundle: str
    attempts: tuple[Attempt, ...]
    chosen: Attempt | None
    ranked: int  # images whose time decided
    record: str | None  # the file that Pipeline.open reads

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON-ready values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a line for each attempt, and what was chosen."""
        words = {True: "ok", False: "FAILED", None: "-"}
        lines = []
        for attempt in self.attempts:
            times = ", ".join(f"{latency.median_ms:.2f} ms for {latency.batch}" for latency in attempt.latency)
            told = f"{attempt.found}; {times}" if times else attempt.found
            lines.append(f"{words[attempt.passed]:<8}{attempt.target:<15}{attempt.runner:<15}{told}")
        if self.chosen is None:
            return "\n".join([*lines, f"{self.bundle}: nothing here runs it as it should; nothing was installed"])
        chosen = self.chosen
        best = (
            f"{chosen.target} with {chosen.runner}, {chosen.median_ms(self.ranked):.2f} ms for {self.ranked} at a time"
        )
        use = f"the engine is {chosen.file}"
        if self.record is not None:
            use = f"dpal-edge run and Pipeline.open now use it, as long as {self.record} is there"
        return "\n".join([*lines, f"{self.bundle}: {best}; {use}"])


def install(bundle: Path, *, backend: str | None = None, say: Callable[[str], None]) -> Installation:
    """Build, check and time what can run on this device, and record the fastest form that passed.

    Every form is compared with the goldens, by its largest error and its least cosine similarity. One that a GPU or a
    CPU computes in half precision may err more than on the host that exported it, where sums are in float32: 2 % of the
    largest output, unless the bundle allows more.

    Args:
        bundle: folder written by ``dpal-edge export``, or a manifest.
        backend: engine to install for; by default all that are here.
        say: takes a line of progress.

    Raises:
        ModelFileError: the bundle is damaged.
        BackendUnavailable: there is no such engine.
    """
    known = sorted({name for readers in ENGINES.values() for name in readers})
    if backend is not None and backend not in known:
        raise BackendUnavailable(f"no engine {backend!r}, expected one of: {', '.join(known)}")
    installer = _Installer(bundle, Manifest.read(bundle), say)
    attempts = [
        installer.attempt(artifact, engine, precision)
        for artifact in installer.manifest.artifacts
        for engine, precision in _engines(artifact)
        if backend in (None, engine)
    ]
    attempts = installer.time(attempts)
    passed = [attempt for attempt in attempts if attempt.passed]
    ranked = installer.manifest.ranked_images
    chosen = min(passed, key=lambda a: (a.engine == _TRTEXEC, a.median_ms(ranked)), default=None)
    record = None
    if chosen is not None and chosen.engine != _TRTEXEC:
        choice = Choice(target=chosen.target, engine=chosen.engine, name=chosen.name, precision=chosen.precision,
                        file=chosen.file, sha256=chosen.sha256)  # fmt: skip
        record = str(write_record(bundle, choice, {"attempts": [asdict(attempt) for attempt in attempts]}))
    return Installation(bundle=str(bundle), attempts=tuple(attempts), chosen=chosen, ranked=ranked, record=record)


def _engines(artifact: Artifact) -> Iterator[tuple[str, str | None]]:
    """Yield the engines that may run an artifact on a device, and the precisions that each may be told."""
    if artifact.target in BUILT_TARGETS:
        yield "tensorrt", None
    else:
        yield from ways_to_run(Path(artifact.file.file))


class _Installer:
    """What an installation has open."""

    def __init__(self, bundle: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
        self.bundle, self.manifest, self._say = bundle, manifest, say
        self._images, self._expected = read_goldens(bundle, manifest)
        self._open: dict[str, Backend] = {}
        self._trtexec: TrtExec | None = None
        self._builder: Builder | None = None
        self._silently_wrong = False  # the builder is known to be, at times

    def attempt(self, artifact: Artifact, engine: str, precision: str | None) -> Attempt:
        """Build what has to be built, and compare with the goldens."""
        attempt = Attempt(target=artifact.target, engine=engine, precision=precision, passed=None, found="")
        file = self.manifest.open_artifact(self.bundle, artifact)
        try:
            if artifact.target in BUILT_TARGETS:
                attempt, file = self._build(attempt, artifact, file)
            found, name = self._run(attempt, file)
        except DpalEdgeError as error:
            attempt = replace(attempt, passed=False if isinstance(error, ModelFileError) else None, found=str(error))
        else:
            half = precision is not None or engine.startswith("tensorrt")
            attempt = self._judge(attempt, artifact.parity, found, name, half)
        if attempt.passed is False and attempt.file and self._silently_wrong:
            attempt = replace(attempt, found=f"{attempt.found}; {NEWER}")
        return attempt

    def time(self, attempts: list[Attempt]) -> list[Attempt]:
        """Time in turns all that passed; one that fails meanwhile has not."""
        for batch, least in _BATCHES[:1] if self.manifest.detects else _BATCHES:
            images = self._images[np.arange(batch) % len(self._images)]
            runners = {a.key: _Runner(self._open[a.key]) for a in attempts if a.passed and a.key in self._open}
            times = time_in_turns(runners, {self.manifest.input.name: images}, least)
            attempts = [self._timed(a, batch, runners, times) if a.passed else a for a in attempts]
        return attempts

    def _judge(self, attempt: Attempt, parity: Parity, found: Outputs, name: str, half: bool) -> Attempt:
        """Compare the outputs that ``name`` gave with the goldens; ``half``: its sums may be in half precision."""
        errors, cosines = largest_errors(found, self._expected), least_cosines(found, self._expected)
        worst, farthest = worst_head(errors), min(cosines, key=lambda head: cosines[head])
        error, cosine = errors[worst], cosines[farthest]
        allowed = max(parity.tolerance, _HALF_ALLOWANCE) if half else parity.tolerance
        least = 1 - _GAP_FACTOR * (1 - parity.min_cosine) - _GAP_ALLOWANCE
        text = (
            f"{name}: error {error:.1e} ({worst}), allowed {allowed:.1e}; cosine {cosine:.4f} ({farthest}), "
            f"least {least:.4f}"
        )
        passed = error <= allowed and cosine >= least
        return replace(attempt, passed=passed, found=text, name=name, error=error, allowed=allowed, cosine=cosine)

    def _timed(
        self, attempt: Attempt, batch: int, runners: Mapping[str, "_Runner"], times: Mapping[str, list[float]]
    ) -> Attempt:
        """Return ``attempt`` with the time of a call, or as failed."""
        try:
            if attempt.key in runners:
                calls = runners[attempt.key].require(times[attempt.key])
            else:
                calls = self._require_trtexec().times(Path(str(attempt.file)), batch)
        except DpalEdgeError as error:
            found = f"{attempt.found}; failed when it was timed with {batch} at a time: {error}"
            return replace(attempt, passed=False, found=found, latency=())
        latency = Latency(batch=batch, median_ms=1e3 * float(np.median(calls)), runs=len(calls))
        return replace(attempt, latency=(*attempt.latency, latency))

    def _build(self, attempt: Attempt, artifact: Artifact, graph: Path) -> tuple[Attempt, Path]:
        """Obtain an engine, and say how long that took."""
        builder, cuda = self._require_builder(), Cuda.open()
        options = BuildOptions(batches=_DETECTOR_BATCHES) if self.manifest.detects else BuildOptions()
        began = time.perf_counter()
        engine = obtain_engine(artifact, graph, builder, cuda, options, self._say)
        how = "from the cache" if engine.reused else f"built in {time.perf_counter() - began:.0f} s"
        self._say(f"{attempt.target}: engine {how}")
        runner = _TRTEXEC if self._trtexec else attempt.engine
        return replace(attempt, engine=runner, file=str(engine.path), sha256=engine.sha256), engine.path

    def _run(self, attempt: Attempt, file: Path) -> tuple[Outputs, str]:
        """Return the outputs for the goldens, and the name of what gave them."""
        if attempt.engine == _TRTEXEC:
            trtexec = self._require_trtexec()
            return trtexec.outputs(file, {self.manifest.input.name: self._images}), trtexec.name
        backend = open_backend(file, engine=attempt.engine, precision=attempt.precision)
        self._open[attempt.key] = backend
        return Model(backend, self.manifest).run(self._images), backend.name

    def _require_builder(self) -> Builder:
        """Return TensorRT's bindings, or trtexec where they cannot be imported."""
        if self._builder is None:
            try:
                self._builder = BindingsBuilder(self._say)
            except BackendUnavailable as error:
                shape = (*self.manifest.input.size, 3)
                try:
                    self._builder = self._trtexec = TrtExec.find({self.manifest.input.name: shape})
                except BackendUnavailable as second:
                    raise BackendUnavailable(f"{error}; {second}") from second
                self._say(f"{error}; building and checking with {self._trtexec.name}, though Python cannot run it then")
            if any(f" {version}." in self._builder.name for version in SILENTLY_WRONG):
                self._silently_wrong = True
                name = self._builder.name
                self._say(f"{name} is known to build ViT engines that are silently wrong; only goldens tell; {NEWER}")
        return self._builder

    def _require_trtexec(self) -> TrtExec:
        if self._trtexec is None:
            raise ModelFileError(f"{self.bundle}: nothing is open that could be timed")
        return self._trtexec


class _Runner:
    """A backend that keeps its failure to itself, so that those that are timed in turns with it go on."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.inputs = backend.name, backend.inputs
        self._backend = backend
        self._error: DpalEdgeError | None = None

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run as the backend does, or give nothing where it fails."""
        try:
            return self._backend.run(feeds, outputs)
        except DpalEdgeError as error:
            self._error = error
            return {}

    def require(self, calls: list[float]) -> list[float]:
        """Return the seconds of its calls, or raise what failed in them."""
        if self._error is not None:
            raise self._error
        return calls
