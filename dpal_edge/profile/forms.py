"""The ways in which a bundle can run on this device: each artifact, with each engine and precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpal_edge.errors import BackendUnavailable
from dpal_edge.manifest import Artifact, Manifest
from dpal_edge.runtime.backend import ENGINES, Backend, open_backend, ways_to_run
from dpal_edge.runtime.installed import BUILT_TARGETS, Choice, read_choice
from dpal_edge.runtime.model import choose_artifact

_BUILDER = "tensorrt"  # the engine that `dpal-edge install` compiles targets for


@dataclass(frozen=True, kw_only=True)
class Form:
    """An artifact and what runs it."""

    target: str
    artifact: str  # its file in the bundle
    path: Path  # of what is opened: that file, or the engine that was built of it
    graph: Path | None  # the file that the engine was built of; None where that file itself is opened
    engine: str
    precision: str  # of the artifact
    computes: str | None  # what the engine is told to compute in; None: as the file says

    @property
    def label(self) -> str:
        """A name for people."""
        return f"{self.target} {self.engine}" + (f" {self.computes}" if self.computes else "")

    def open(self) -> Backend:
        """Load it; errors as ``open_backend``."""
        return open_backend(self.path, engine=self.engine, precision=self.computes)

    def to_dict(self) -> dict[str, str | None]:
        """Return what a report says of it."""
        return {
            "target": self.target,
            "artifact": self.artifact,
            "engine": self.engine,
            "precision": self.precision,
            "computes": self.computes,
        }


def find_forms(bundle: Path, manifest: Manifest, engines: Sequence[str]) -> tuple[list[Form], list[dict[str, str]]]:
    """Return the forms of a bundle, first the one that ``dpal-edge run`` uses, and what is left out and why.

    A form may still turn out not to open here.

    Args:
        bundle: folder written by ``dpal-edge export``, or a manifest.
        manifest: of the bundle.
        engines: those that count, the first one for the pipeline; empty is all.

    Raises:
        BackendUnavailable: an engine that does not exist, none that reads an artifact, or nothing built for it yet.
        ModelFileError: a file is damaged.
    """
    known = sorted({name for readers in ENGINES.values() for name in readers})
    if unknown := set(engines) - {*known}:
        raise BackendUnavailable(f"no engine {', '.join(sorted(unknown))}, expected one of: {', '.join(known)}")
    wanted = engines or known
    built = _BUILDER in wanted and any(artifact.target in BUILT_TARGETS for artifact in manifest.artifacts)
    installed = read_choice(bundle) if built or not engines else None
    forms, skipped = [], []
    for artifact in manifest.artifacts:
        path = manifest.open_artifact(bundle, artifact)
        if artifact.target not in BUILT_TARGETS:
            forms += [
                _form(artifact, path, engine, computes) for engine, computes in ways_to_run(path) if engine in wanted
            ]
        elif installed and installed.file and installed.target == artifact.target and installed.engine in wanted:
            forms.append(_form(artifact, Path(installed.file), installed.engine, installed.precision, path))
        elif built:
            reason = "dpal-edge install builds it on this device, and did not choose it or was not run"
            skipped.append({"target": artifact.target, "artifact": artifact.file.file, "engine": _BUILDER,
                            "reason": reason})  # fmt: skip
    if skipped and not any(form.engine in (engines[:1] or known) for form in forms):
        held = ", ".join(one["target"] for one in skipped)
        raise BackendUnavailable(
            f"{bundle}: it holds {held} for {_BUILDER}, and no engine built of it on this device is in use; build and "
            f"choose one: dpal-edge install {bundle} --backend {_BUILDER}"
        )
    if not forms:
        choose_artifact(bundle, manifest, engine=engines[0] if engines else None)  # which says what is missing
        raise BackendUnavailable(f"{bundle}: nothing here runs it; try `dpal-edge install {bundle}`")
    choice = None if engines and engines[0] != _BUILDER else installed
    return sorted(forms, key=lambda form: not _is_used(form, bundle, manifest, engines, choice)), skipped


def _form(artifact: Artifact, path: Path, engine: str, computes: str | None, graph: Path | None = None) -> Form:
    return Form(
        target=artifact.target,
        artifact=artifact.file.file,
        path=path,
        graph=graph,
        engine=engine,
        precision=artifact.precision,
        computes=computes,
    )


def _is_used(form: Form, bundle: Path, manifest: Manifest, engines: Sequence[str], choice: Choice | None) -> bool:
    """Whether ``dpal-edge run`` would use a form, with ``--engine`` where there are ``engines``."""
    if choice is not None:
        return (form.target, form.engine, form.computes) == (choice.target, choice.engine, choice.precision)
    artifact = choose_artifact(bundle, manifest, engine=engines[0] if engines else None)
    engine = engines[0] if engines else next(ways_to_run(form.path))[0]
    return (form.target, form.engine, form.computes) == (artifact.target, engine, None)
