"""Export: from a checkpoint to a bundle that has proven what it is.

The float32 graph is written, run, compared with torch on real images, and must agree; every other artifact is made of
it and must pass the gate. Everything happens in a folder beside the bundle that replaces it at the end.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError, ParityError
from dpal_edge.evaluate.predictor import BundlePredictor
from dpal_edge.export import tensorrt_rtx
from dpal_edge.export.artifacts import Workshop
from dpal_edge.export.crops import Crops, read_inputs
from dpal_edge.export.gate import Labelled
from dpal_edge.export.onnx import INPUT_NAME, ExportedModel, write_onnx
from dpal_edge.export.proof import Outputs, check_parity, prove_stripped, torch_outputs
from dpal_edge.export.report import write_report
from dpal_edge.export.source import DETECTION, Source, head_specs, open_source
from dpal_edge.export.targets import TARGETS
from dpal_edge.files import sha256_of
from dpal_edge.manifest import MANIFEST_NAME, Artifact, FileSpec, InputSpec, Manifest, Stripped, Verdict
from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.model import Model

GOLDEN_IMAGES = 8  # inputs that travel in the bundle with their expected outputs
_COMPARED = 5  # one image in so many is compared on, the others calibrate


@dataclass(frozen=True)
class ExportSettings:
    """What may be chosen about an export."""

    targets: tuple[str, ...] = ("onnx",)  # of targets.TARGETS
    calibration: tuple[str, ...] = ()  # folders of real crops; empty takes those that the checkpoint was trained on
    size: tuple[int, int] | None = None  # height, width of the input; None is the checkpoint's
    weights: str = "best"  # backbone, ema, or the better on held-out images
    images: int = 32  # crops compared
    calibration_images: int = 128  # others, that INT8 takes its ranges from
    tolerance: float = 1e-4  # of float32, on the largest error over the largest output
    gate: tuple[str, ...] = ()  # NAME=DIR of data sets that less precise artifacts are scored on; none: agreement
    gate_images: int | None = None  # of each of their splits; None is all
    max_drop: float = 0.5  # points of a hundred that a task's metric may lose

    def __post_init__(self) -> None:
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ConfigError(f"target {', '.join(unknown)}: expected {', '.join(TARGETS)}")
        if not self.targets or self.max_drop < 0:
            raise ConfigError(f"max_drop {self.max_drop}, {len(self.targets)} targets: expected 0 or more, and one")

    @property
    def quantized(self) -> bool:
        """Whether a target needs calibration."""
        return any(TARGETS[name].precision == "int8" for name in self.targets)


def export(checkpoint: Path, out: Path, settings: ExportSettings) -> Manifest:
    """Export the model in ``checkpoint`` (a file or a run folder) as a bundle in the folder ``out``.

    Targets that do not pass the gate are left out and named in the manifest's ``refused``. Where none passes the bundle
    holds the report and nothing that runs.

    Raises:
        ConfigError: ``out`` holds something that is not a bundle, or the size does not fit the patches or a head.
        DataError: no real images to compare on, or none fit to calibrate on.
        ModelFileError: the checkpoint cannot be read, or training parts are left in the graph.
        BackendUnavailable: a package that a target needs is not installed.
        ParityError: the float32 graph differs from torch by more than the tolerance, or no target passes where ``out``
            holds some that run; it stays as it was.
    """
    _restore(out)
    if out.is_symlink() or (out.exists() and not _may_replace(out)):
        raise ConfigError(f"{out}: exists and is no bundle; choose another --out, it would be replaced")
    source = open_source(checkpoint, settings.weights, settings.size)
    images, crops, reference = read_images(source, settings)
    with draft_beside(out) as folder:
        draft = folder / "bundle"
        draft.mkdir()
        file = draft / TARGETS["onnx"].file
        model = ExportedModel(source.model, source.mean, source.std)
        write_onnx(model, file, size=model.size, outputs=model.outputs)
        stripped = prove_stripped(file, model, source.parameters)
        exact = check_parity(file, crops, reference, settings.tolerance)
        golden = write_golden(draft / "golden.npz", crops, reference, GOLDEN_IMAGES)
        manifest = make_manifest(source, reference, (), golden, stripped)
        workshop = Workshop(draft, manifest, images, crops, reference, exact, open_labelled(file, manifest, settings))
        artifacts, refused = workshop.make(settings.targets)
        if not artifacts and _holds_artifacts(out):  # a report is not worth what runs
            reasons = " | ".join(f"{refusal.target}: {refusal.reason}" for refusal in refused)
            raise ParityError(f"no target passes the gate ({reasons}); {out} stays as it was")
        manifest = replace(manifest, artifacts=workshop.time(artifacts), refused=refused)
        if workshop.layers:  # what is compiled is read by this version of its runtime alone
            compiler = {"version": tensorrt_rtx.version(), "options": tensorrt_rtx.OPTIONS.to_dict()}
            manifest = replace(manifest, provenance={**manifest.provenance, "tensorrt_rtx": compiler})
        manifest = replace(manifest, documents=write_report(draft, manifest, workshop))
        _remove_unnamed(draft, manifest)
        manifest.write(draft)
        _replace(draft, out)
    return manifest


def read_images(source: Source, settings: ExportSettings) -> tuple[Crops, Crops, Outputs]:
    """Read the images to calibrate on, others to compare on, and what torch makes of the latter.

    Raises:
        DataError: there are none.
    """
    size = source.model.backbone.config.size
    frames = DETECTION in source.model.configs
    if not settings.quantized:
        crops = read_inputs(settings.calibration, source.metadata, size, settings.images, frames=frames)
        return crops, crops, torch_outputs(source.model, crops, source.mean, source.std)
    count = settings.images + settings.calibration_images
    read = read_inputs(settings.calibration, source.metadata, size, count, frames=frames)
    compared = read[::_COMPARED][: settings.images]
    rest = np.delete(read, np.arange(0, len(read), _COMPARED)[: settings.images], axis=0)
    return rest, compared, torch_outputs(source.model, compared, source.mean, source.std)


def open_labelled(file: Path, manifest: Manifest, settings: ExportSettings) -> Labelled | None:
    """Score float32 on the data sets of the gate, by the graph that was just proven to be torch's equal."""
    if not settings.gate:
        return None
    predictor = BundlePredictor(Model(open_backend(file), manifest), {"model": file.name})
    return Labelled.measure(settings.gate, predictor, settings.max_drop, settings.gate_images)


def _remove_unnamed(draft: Path, manifest: Manifest) -> None:
    """Remove what artifacts were made of and is none itself."""
    specs = [spec for artifact in manifest.artifacts for spec in (artifact.file, *artifact.data)]
    named = {spec.file for spec in (manifest.golden, *manifest.documents, *specs)}
    for path in draft.iterdir():
        if path.name not in named:
            path.unlink()


def write_golden(path: Path, crops: Crops, reference: Outputs, count: int) -> FileSpec:
    """Write the first ``count`` images and their outputs."""
    arrays: dict[str, Any] = {"images": crops, **reference}
    np.savez_compressed(path, **{name: array[:count] for name, array in arrays.items()})
    return FileSpec.of(path)


def make_manifest(
    source: Source, reference: Outputs, artifacts: tuple[Artifact, ...], golden: FileSpec, stripped: Stripped
) -> Manifest:
    """Write down what a device needs to know of an exported model, and where it comes from."""
    size = source.model.backbone.config.size
    return Manifest(
        model=source.name,
        input=InputSpec(name=INPUT_NAME, size=size, mean=source.mean, std=source.std),
        heads=head_specs(source.model, reference),
        artifacts=artifacts,
        golden=golden,
        stripped=stripped,
        provenance={
            "checkpoint": {
                "file": source.path.name,
                "sha256": sha256_of(source.path),
                "weights": source.metadata["weights"],
            },
            "step": source.metadata.get("step"),
            "teachers": source.metadata.get("teachers", []),
            **({"origin": origin} if (origin := source.metadata.get("origin")) else {}),
            "dpal_edge": __version__,
            "torch": torch.__version__,
        },
    )


def describe(manifest: Manifest, out: Path) -> str:
    """Say in a few lines what was written, what was proven about it, and what was refused."""
    stripped = manifest.stripped
    counts = {part: f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count}" for part, count in stripped.removed.items()}
    removed = " and ".join(f"{part} {count}" for part, count in counts.items()) or "nothing"
    use = f"dpal-edge run BUNDLE --detector {out}" if manifest.detects else f"dpal-edge run {out}"
    images = "frames" if manifest.detects else "crops"
    lines = [
        f"stripped  {removed}: {stripped.parameters_before / 1e6:.2f} M parameters became "
        f"{stripped.parameters_after / 1e6:.2f} M"
    ]
    for artifact in manifest.artifacts:
        parity = artifact.parity
        against = f", tolerance {parity.tolerance:.0e}" if artifact.precision == "float32" else ""
        lines.append(
            f"verified  {artifact.target}: largest error {parity.max_rel_error:.1e} of the largest output "
            f"({parity.head}) on {parity.images} real {images} ({parity.backend}{against})"
        )
        lines += [f"          {_verdict(verdict)}" for verdict in artifact.verdicts]
    for refusal in manifest.refused:
        lines.append(f"REFUSED   {refusal.target}: {refusal.reason}")
    if not manifest.artifacts:
        return "\n".join([*lines, f"wrote     {out}: nothing that runs; report.html in it says what was found"])
    lines.append(f"wrote     {out} (input uint8 {manifest.input.size[0]}x{manifest.input.size[1]}, outputs "
                 f"{', '.join(head.name for head in manifest.heads)}):")  # fmt: skip
    for artifact in manifest.artifacts:
        size = sum(spec.bytes for spec in (artifact.file, *artifact.data)) / 1e6
        speed = ", ".join(f"{one.median_ms:.1f} ms for {one.batch}" for one in artifact.latency) or "does not run here"
        kept = f", {len(artifact.kept)} layers kept in float" if artifact.kept else ""
        lines.append(f"          {artifact.target:<14}{size:5.1f} MB  {artifact.precision}{kept}; {speed}")
    return "\n".join([*lines, f"next: {use} --source VIDEO --out annotated.mp4"])


def _verdict(verdict: Verdict) -> str:
    return (
        f"{verdict.head}: {verdict.measure} {verdict.found:.4f} (float32 {verdict.reference:.4f}, at least "
        f"{verdict.least:.4f})"
    )


@contextmanager
def draft_beside(out: Path) -> Iterator[Path]:
    """Yield a folder to write in beside ``out``; remove what is left of it.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); free some space or choose another --out, nothing "
            f"was left half-written"
        ) from error


def _holds_artifacts(out: Path) -> bool:
    """Say whether ``out``, which may be replaced, is a bundle with something that runs."""
    manifest = out / MANIFEST_NAME
    return manifest.exists() and bool(json.loads(manifest.read_text(encoding="utf-8"))["artifacts"])


def _may_replace(out: Path) -> bool:
    """Say whether ``out`` is an empty folder or a bundle of any schema; others have a manifest.json too."""
    if not out.is_dir():
        return False
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(out.iterdir())
    return isinstance(manifest, dict) and {"schema", "artifacts", "golden"} <= manifest.keys()


def _replace(draft: Path, out: Path) -> None:
    """Put the finished folder ``draft`` in the place of ``out``, an earlier bundle or nothing."""
    for path in (*draft.iterdir(), draft):
        _sync(path)  # a rename must not become durable before what it names
    old = _aside(out)
    if out.exists():
        out.rename(old)
    try:
        draft.rename(out)
    except BaseException:  # also Ctrl-C
        _restore(out)
        raise
    _sync(out.parent)
    _restore(out)


def _restore(out: Path) -> None:
    """Give an earlier bundle its name again where there is no new one, as after a crash; remove it where there is."""
    old = _aside(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(out)


def _aside(out: Path) -> Path:
    """Return where an earlier bundle waits until the new one has its name."""
    return out.with_name(f".{out.name}.replaced")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
