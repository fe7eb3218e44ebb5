"""``dpal-edge verify``: what can be checked of a bundle or a graph on this machine, and what that found."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.manifest import Artifact, FileSpec, Manifest
from dpal_edge.runtime.backend import ENGINES, open_backend
from dpal_edge.runtime.model import Model, Outputs, largest_errors, read_goldens, worst_head


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str  # an artifact's target, or a file
    check: str  # artifacts, files, goldens or quantization
    passed: bool | None  # None: it cannot be told here
    found: str


@dataclass(frozen=True)
class Verification:
    """All that was looked at."""

    path: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether anything is wrong."""
        return any(check.passed is False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON-ready values."""
        return {**asdict(self), "failed": self.failed}

    def as_text(self) -> str:
        """Return a line for each check, and one that sums them up."""
        words = {True: "ok", False: "FAILED", None: "-"}
        width = max(16, *(len(check.what) + 2 for check in self.checks))
        lines = [f"{words[c.passed]:<8}{c.what:<{width}}{c.check:<14}{c.found}" for c in self.checks]
        skipped = sum(check.passed is None for check in self.checks)
        rest = f", {skipped} could not be made here" if skipped else ""
        return "\n".join([*lines, f"{self.path}: {'does not hold' if self.failed else 'holds'}{rest}"])


def verify(path: Path) -> Verification:
    """Check a bundle, by folder or manifest: hashes, contract, goldens, quantization; of an .onnx file the last alone.

    Raises:
        ModelFileError: a file is missing, damaged, or neither.
        BackendUnavailable: an .onnx file is given, and the package that reads it is not installed.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        if find_spec("onnx") is None:
            raise BackendUnavailable(f"{path} needs onnx: pip install 'dpal-edge[export]'")
        return Verification(str(path), (_lint(path.name, path),))
    manifest = Manifest.read(path)
    files = {artifact.target: manifest.open_artifact(path, artifact) for artifact in manifest.artifacts}
    images, expected = read_goldens(path, manifest)
    for document in manifest.documents:
        manifest.file(path, document)
    checks: list[Check] = []
    if not manifest.artifacts:
        checks.append(Check("bundle", "artifacts", False, f"nothing in it runs: {_refusals(manifest)}"))
    for artifact in manifest.artifacts:
        file = files[artifact.target]
        checks.append(Check(artifact.target, "files", True, ", ".join(_told(spec) for spec in artifact.files)))
        checks.append(_run(artifact, file, manifest, images, expected))
        if artifact.precision == "int8" and file.suffix == ".onnx":
            checks.append(_quantization(artifact.target, file))
    return Verification(str(path), tuple(checks))


def _refusals(manifest: Manifest) -> str:
    return "; ".join(f"export refused {one.target} ({one.reason})" for one in manifest.refused) or "it has none"


def _told(spec: FileSpec) -> str:
    return f"{spec.file} {spec.bytes / 1e6:.1f} MB, sha256 {spec.sha256[:12]}"


def _run(artifact: Artifact, file: Path, manifest: Manifest, images: Any, expected: Outputs) -> Check:
    """Run an artifact on the goldens; one that cannot be loaded or computes no numbers fails."""
    if file.suffix not in ENGINES:
        return Check(artifact.target, "goldens", None, f"nothing here runs {file.suffix} files")
    try:
        backend = open_backend(file)
        found = Model(backend, manifest).run(images)
    except BackendUnavailable as error:
        return Check(artifact.target, "goldens", None, str(error))
    except ModelFileError as error:
        return Check(artifact.target, "goldens", False, str(error))
    errors = largest_errors(found, expected)
    worst = worst_head(errors)
    passed = errors[worst] <= artifact.parity.tolerance
    text = (
        f"largest error {errors[worst]:.1e} of the largest output ({worst}) on {len(images)} images, allowed "
        f"{artifact.parity.tolerance:.1e} ({backend.name})"
    )
    return Check(artifact.target, "goldens", passed, text)


def _quantization(target: str, file: Path) -> Check:
    """Lint an artifact, where that can be done; one that is no ONNX model fails."""
    if find_spec("onnx") is None:
        return Check(target, "quantization", None, "needs onnx: pip install 'dpal-edge[export]'")
    try:
        return _lint(target, file)
    except ModelFileError as error:
        return Check(target, "quantization", False, str(error))


def _lint(what: str, file: Path) -> Check:
    from dpal_edge.export.lint import lint  # onnx may be missing on a device

    report = lint(file)
    text = report.as_text().replace("\n", "\n" + " " * 24) if report.findings else report.as_text()
    return Check(what, "quantization", not report.errors, text)
