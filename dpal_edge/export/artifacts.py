"""The artifacts of a bundle: written, run, compared with float32 and judged; INT8 gives up layers until it passes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.evaluate.predictor import BundlePredictor, head_info
from dpal_edge.export import openvino, tensorrt_rtx
from dpal_edge.export.calibration import Coverage, Range, calibrate
from dpal_edge.export.crops import Crops
from dpal_edge.export.float16 import to_float16
from dpal_edge.export.gate import Labelled, judge_agreement
from dpal_edge.export.lint import lint
from dpal_edge.export.onnx import INPUT_NAME
from dpal_edge.export.proof import Comparison, Outputs, measure_parity
from dpal_edge.export.quantize import quantize
from dpal_edge.export.sensitivity import Sensitivity, Switched, rank
from dpal_edge.export.targets import TARGETS, Target
from dpal_edge.manifest import Artifact, FileSpec, Latency, Manifest, Parity, Refusal, Verdict
from dpal_edge.runtime.backend import Backend, open_backend, time_in_turns, ways_to_run
from dpal_edge.runtime.model import Model

_RANKED_IMAGES = 8  # that tell which layers are sensitive
_ALLOWANCE = 1.5  # times the error that was measured here: what verify and install let pass elsewhere
_TIMED = ((1, 20), (8, 5))  # batch, least calls


@dataclass(frozen=True)
class Candidate:
    """A written file, and what was found about it."""

    file: Path
    parity: Parity
    errors: Mapping[str, float]  # by head: the largest, over the largest output of float32
    verdicts: tuple[Verdict, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts that it did not pass."""
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)


@dataclass
class Workshop:
    """Writes the artifacts of one bundle; what several of them need is computed once."""

    folder: Path  # of the bundle, with the float32 graph in it
    manifest: Manifest  # without artifacts
    calibration: Crops
    compared: Crops  # other images where there are enough
    reference: Outputs  # float32, of ``compared``
    exact: Comparison  # of the float32 graph
    labelled: Labelled | None
    layers: dict[str, tensorrt_rtx.Layers] = field(default_factory=dict)  # by target, what a compiler made of it
    speeds: dict[str, dict[str, list[Latency]]] = field(default_factory=dict)  # by file, and by what runs it here
    _ranges: tuple[dict[str, Range], Coverage] | None = None
    _ranking: list[Sensitivity] | None = None
    _candidates: dict[tuple[str, str], Candidate] = field(default_factory=dict)

    def make(self, names: Sequence[str]) -> tuple[tuple[Artifact, ...], tuple[Refusal, ...]]:
        """Write the targets of these names, in this order.

        One that cannot be made is refused, as one that does not pass the gate.

        Raises:
            BackendUnavailable: a package that a target needs is not installed.
            DataError: the images are not fit to calibrate on.
        """
        if any(TARGETS[name].form == "tensorrt-rtx" for name in names):
            tensorrt_rtx.version()  # what is missing should be said before an hour of work
        artifacts, refused = [], []
        for name in names:
            target = TARGETS[name]
            try:
                candidate = self.settle(target)
                if candidate.failed:
                    refused.append(Refusal(target=name, reason=_explain(candidate), verdicts=candidate.verdicts))
                    continue
                if target.form == "tensorrt-rtx":
                    self.layers[name] = tensorrt_rtx.compile_engine(candidate.file, self.folder / target.file)
            except ModelFileError as error:
                refused.append(Refusal(target=name, reason=str(error)))
                continue
            artifacts.append(self._describe(name, target, candidate))
        return tuple(artifacts), tuple(refused)

    def time(self, artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
        """Time float32 and what can run here, in every way that it can, all in turns: a busy moment meets all of them.

        The times of an artifact are those of the way in which it was compared with float32.
        """
        opened = [
            (file, backend)
            for file in dict.fromkeys((self.float32.name, *(artifact.file.file for artifact in artifacts)))
            for backend in self._open_all(self.folder / file)
        ]
        for batch, least in _TIMED:
            images = self.compared[np.arange(batch) % len(self.compared)]
            backends = {f"{file} {backend.name}": backend for file, backend in opened}
            measured = time_in_turns(backends, {INPUT_NAME: images}, least)
            for (file, backend), times in zip(opened, measured.values(), strict=True):
                latency = Latency(batch=batch, median_ms=1e3 * float(np.median(times)), runs=len(times))
                self.speeds.setdefault(file, {}).setdefault(backend.name, []).append(latency)
        return tuple(
            replace(a, latency=tuple(self.speeds.get(a.file.file, {}).get(a.parity.backend, ()))) for a in artifacts
        )

    def _open_all(self, path: Path) -> Iterator[Backend]:
        """Yield each way to run a file that works here."""
        for engine, precision in ways_to_run(path):
            try:
                backend = open_backend(path, engine=engine, precision=precision)
                backend.run({INPUT_NAME: self.compared[:1]})  # OpenVINO compiles, and may fail, when images come
            except (BackendUnavailable, ModelFileError):
                continue
            yield backend

    @property
    def float32(self) -> Path:
        """The graph that all others are made of."""
        return self.folder / TARGETS["onnx"].file

    @property
    def coverage(self) -> Coverage | None:
        """What the calibration images are; None where nothing was calibrated."""
        return self._ranges[1] if self._ranges else None

    @property
    def ranges(self) -> dict[str, Range]:
        """By tensor; empty where nothing was calibrated."""
        return self._ranges[0] if self._ranges else {}

    @property
    def ranking(self) -> list[Sensitivity]:
        """The layers by what INT8 costs them, the most costly first; empty where nothing was quantized."""
        return self._ranking or []

    def settle(self, target: Target) -> Candidate:
        """Return what is shipped for a target, or compiled for it, or the last that was tried."""
        form, precision = "openvino" if target.form == "openvino" else "onnx", target.precision
        key = (form, precision)
        if key not in self._candidates:
            if precision == "float32":
                self._candidates[key] = Candidate(self.float32, self.exact.parity, self.exact.errors)
            elif precision == "float16":
                self._candidates[key] = self._judge(self._write_half(form))
            else:
                self._candidates[key] = self._give_up_layers(form)
        return self._candidates[key]

    def _give_up_layers(self, form: str) -> Candidate:
        """Leave ever more layers in float until the gate holds; never all of them.

        The most sensitive come first, but those that nothing but the failing heads sees before those that all share:
        how far outputs move tells little of what that costs a metric, and a head's own layers are few.
        """
        ranking, count = self._rank(), 0
        names = {head.task: head.name for head in self.manifest.heads}
        failing: set[str] = set()
        while True:
            order = sorted(ranking, key=lambda one: not one.heads <= failing)
            kept = tuple(one.layer for one in order[:count])
            candidate = self._judge(self._write_int8(form, kept), kept)
            failing |= {names.get(verdict.head, verdict.head) for verdict in candidate.failed}
            count = 2 * count or 1
            if not candidate.failed or count >= len(ranking):
                return candidate

    def _write_half(self, form: str) -> Path:
        if form == "openvino":
            path = self.folder / TARGETS["openvino-fp16"].file
            openvino.write_fp16(self.float32, path)
            return path
        path = self.folder / TARGETS["onnx-fp16"].file
        _save(to_float16(onnx.load(self.float32)), path)
        return path

    def _write_int8(self, form: str, kept: tuple[str, ...]) -> Path:
        if form == "openvino":
            path = self.folder / TARGETS["openvino-int8"].file
            openvino.write_int8(self.float32, path, self.calibration, kept)
            return path
        path = self.folder / TARGETS["onnx-int8"].file
        quantized = to_float16(quantize(onnx.load(self.float32), self._calibrate(), kept))
        report = lint(quantized)
        if report.errors:
            raise ModelFileError(
                f"the quantized graph breaks the rules of its own linter ({report.findings[0].rule} at "
                f"{report.findings[0].where}); this is a bug, please report it"
            )
        if not report.quantized:
            raise ModelFileError("no layer of this model can be INT8; export it in another precision")
        _save(quantized, path)
        return path

    def _calibrate(self) -> Mapping[str, Range]:
        if self._ranges is None:
            self._ranges = calibrate(onnx.load(self.float32), self.calibration)
        return self._ranges[0]

    def _rank(self) -> list[Sensitivity]:
        if self._ranking is None:
            switched = Switched(onnx.load(self.float32), self._calibrate())
            self._ranking = rank(switched, self.compared[:_RANKED_IMAGES])
        return self._ranking

    def _judge(self, file: Path, kept: tuple[str, ...] = ()) -> Candidate:
        backend = open_backend(file)
        found = measure_parity(backend, self.compared, self.reference, 0.0)
        # On a device the goldens may come out a little further off, but not by another order.
        parity = replace(found.parity, tolerance=_ALLOWANCE * found.parity.max_rel_error + 1e-3)
        verdicts: tuple[Verdict, ...] = ()
        heads = self.manifest.heads
        if self.labelled is not None:
            predictor = BundlePredictor(Model(backend, self.manifest), {"model": file.name})
            verdicts = self.labelled.judge(predictor)
            labelled = self.labelled.folders
            heads = tuple(head for head in heads if head_info(head.task, head.kind, head.labels).task not in labelled)
        verdicts += judge_agreement(heads, self.manifest.input.size, self.reference, found.outputs)
        return Candidate(file, parity, found.errors, verdicts, kept)

    def _describe(self, name: str, target: Target, candidate: Candidate) -> Artifact:
        data = [path for path in (candidate.file.with_suffix(".bin"),) if target.form == "openvino" and path.exists()]
        return Artifact(
            target=name,
            precision=target.precision,
            file=FileSpec.of(self.folder / target.file),
            parity=candidate.parity,
            data=tuple(FileSpec.of(path) for path in data),
            verdicts=candidate.verdicts,
            kept=candidate.kept,
        )


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _explain(candidate: Candidate) -> str:
    worst = "; ".join(f"{v.head}: {v.measure} {v.found:.4f}, least {v.least:.4f}" for v in candidate.failed)
    if candidate.kept:
        return f"{worst}, with {len(candidate.kept)} layers in float; with twice as many none would be left in INT8"
    return worst
