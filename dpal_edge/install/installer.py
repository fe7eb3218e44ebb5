"""``dpal-edge install``: every form of a bundle that can run on this device, checked and timed; the fastest stays."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpal_edge.errors import BackendUnavailable, DpalEdgeError, ModelFileError
from dpal_edge.install.engines import BindingsBuilder, Builder, obtain_engine
from dpal_edge.install.trtexec import TrtExec
from dpal_edge.manifest import Artifact, Latency, Manifest
from dpal_edge.runtime.backend import ENGINES, Backend, open_backend, time_in_turns, ways_to_run
from dpal_edge.runtime.cuda import Cuda
from dpal_edge.runtime.installed import BUILT_TARGETS, Choice, write_record
from dpal_edge.runtime.model import Model, Outputs, largest_errors, read_goldens, worst_head
from dpal_edge.runtime.tensorrt import SILENTLY_WRONG, BuildOptions

_BATCHES = ((1, 30), (4, 20), (8, 10))  # people in a frame, least calls; a detector sees one frame at a time
# Of the largest output: what sums in half precision may differ, where the host's are in float32. bf16 on a CPU came to
# 0.011; no GPU was measured yet.
_HALF_ALLOWANCE = 0.02
_TRTEXEC = "trtexec"  # which runs an engine to check and to time it, not for an app


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One form of the bundle on this device."""

    target: str
    engine: str  # that runs it
    precision: str | None = None  # that the engine is told to compute in; None: the file's own
    passed: bool | None  # None: it cannot run here
    found: str  # in words
    error: float | None = None  # largest, over the largest output of the same head
    allowed: float | None = None
    latency: tuple[Latency, ...] = ()
    file: str | None = None  # the engine in the cache; None: the bundle's own file
    sha256: str = ""  # of that engine

    @property
    def runner(self) -> str:
        """The engine, and the precision if one was chosen."""
        return f"{self.engine} {self.precision}" if self.precision else self.engine

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

    Every form is compared with the goldens. One that a GPU or a CPU computes in half precision may differ more than on
    the host that exported it, where sums are in float32: 2 % of the largest output, unless the bundle allows more.

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
        choice = Choice(target=chosen.target, engine=chosen.engine, precision=chosen.precision, file=chosen.file,
                        sha256=chosen.sha256)  # fmt: skip
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
        self._open: dict[tuple[str, str], Backend] = {}
        self._trtexec: TrtExec | None = None
        self._builder: Builder | None = None

    def attempt(self, artifact: Artifact, engine: str, precision: str | None) -> Attempt:
        """Build what has to be built, and compare with the goldens."""
        attempt = Attempt(target=artifact.target, engine=engine, precision=precision, passed=None, found="")
        file = self.manifest.open_artifact(self.bundle, artifact)
        try:
            if artifact.target in BUILT_TARGETS:
                attempt, file = self._build(attempt, file)
            found, name = self._run(attempt, file)
        except DpalEdgeError as error:
            failed = False if isinstance(error, ModelFileError) else None
            return replace(attempt, passed=failed, found=str(error))
        errors = largest_errors(found, self._expected)
        worst = worst_head(errors)
        allowed = artifact.parity.tolerance
        if precision or engine.startswith("tensorrt"):
            allowed = max(allowed, _HALF_ALLOWANCE)
        text = f"{name}: error {errors[worst]:.1e} ({worst}), allowed {allowed:.1e}"
        return replace(attempt, passed=bool(errors[worst] <= allowed), found=text, error=errors[worst], allowed=allowed)

    def time(self, attempts: list[Attempt]) -> list[Attempt]:
        """Time in turns all that passed."""
        passed = {(a.target, a.runner): a for a in attempts if a.passed}
        measured: dict[tuple[str, str], list[Latency]] = {key: [] for key in passed}
        for batch, least in _BATCHES[:1] if self.manifest.detects else _BATCHES:
            images = self._images[np.arange(batch) % len(self._images)]
            running = {"/".join(key): self._open[key] for key in passed if key in self._open}
            times = time_in_turns(running, {self.manifest.input.name: images}, least)
            for key, attempt in passed.items():
                calls = times.get("/".join(key)) or self._require_trtexec().times(Path(str(attempt.file)), batch)
                median = 1e3 * float(np.median(calls))
                measured[key].append(Latency(batch=batch, median_ms=median, runs=len(calls)))
        return [replace(a, latency=tuple(measured.get((a.target, a.runner), ()))) for a in attempts]

    def _build(self, attempt: Attempt, graph: Path) -> tuple[Attempt, Path]:
        """Obtain an engine, and say how long that took."""
        builder, cuda = self._require_builder(), Cuda.open()
        if any(f" {version}." in builder.name for version in SILENTLY_WRONG):
            self._say(f"{builder.name} is known to build ViT engines that are silently wrong; only the goldens tell")
        began = time.perf_counter()
        engine = obtain_engine(graph, builder, cuda, BuildOptions(), self._say)
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
        self._open[attempt.target, attempt.runner] = backend
        return Model(backend, self.manifest).run(self._images), backend.name

    def _require_builder(self) -> Builder:
        """Return TensorRT's bindings, or trtexec where they cannot be imported."""
        if self._builder is None:
            try:
                self._builder = BindingsBuilder()
            except BackendUnavailable as error:
                shape = (*self.manifest.input.size, 3)
                try:
                    self._builder = self._trtexec = TrtExec.find({self.manifest.input.name: shape})
                except BackendUnavailable as second:
                    raise BackendUnavailable(f"{error}; {second}") from second
                self._say(f"{error}; building and checking with {self._trtexec.name}, though Python cannot run it then")
        return self._builder

    def _require_trtexec(self) -> TrtExec:
        if self._trtexec is None:
            raise ModelFileError(f"{self.bundle}: nothing is open that could be timed")
        return self._trtexec
