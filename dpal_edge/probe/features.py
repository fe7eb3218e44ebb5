"""Features of a frozen model, wherever it comes from: uint8 crops in, numpy tokens out."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ConfigError, ModelFileError
from dpal_edge.manifest import MANIFEST_NAME, HeadSpec, Manifest
from dpal_edge.runtime.backend import Backend, open_backend
from dpal_edge.runtime.model import choose_artifact
from dpal_edge.tasks.image import Pixels, read_crop
from dpal_edge.tasks.sample import Sample

_TASK = "embedding"  # the head of a bundle that gives the global token


class Features(NamedTuple):
    """What a model says about B crops."""

    whole: NDArray[np.float32]  # (B, D), the global token
    patches: NDArray[np.float32] | None  # (B, rows, columns, D); None from a model that gives none


class FeatureExtractor(Protocol):
    """A frozen model behind one contract."""

    size: tuple[int, int]  # height, width of the crops it takes
    has_patches: bool
    description: dict[str, Any]  # JSON-ready: what it is and where its weights come from

    def __call__(self, crops: Pixels) -> Features:
        """Map crops (B, height, width, 3), RGB, to their features.

        Raises:
            ModelFileError: a feature is not finite.
        """
        ...


def open_extractor(
    model: str,
    *,
    size: tuple[int, int] | None = None,
    layer: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> FeatureExtractor:
    """Open whatever ``model`` names.

    Args:
        model: a bundle, a run folder (its newest checkpoint), a checkpoint or published weights of a student;
            ``teacher:SPEC`` or ``timm:NAME`` for a teacher; ``random:STUDENT`` for a student that learned nothing.
        size: height, width of the crops; None is what the model was made for, 256x128 for a teacher. A bundle has one.
        layer: block whose tokens are taken, 1 to depth; None is the last. A bundle has its last alone.
        device: ``cpu``, ``cuda``, or ``auto`` for the faster one that is there.
        seed: of ``random:``.

    Raises:
        ModelFileError: missing, damaged, or none of these.
        ConfigError: an option that the model cannot follow.
        BackendUnavailable: it needs a package or a device that is not here.
    """
    folder = Path(model)
    if (folder / MANIFEST_NAME).is_file():
        return BundleFeatures.open(folder, size=size, layer=layer, device=device)
    try:
        network = import_module("dpal_edge.probe.network")
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{model} needs {error.name}: pip install 'dpal-edge[train]'") from error
    extractor: FeatureExtractor = network.load(model, size=size, layer=layer, device=device, seed=seed)
    return extractor


def extract(
    samples: Sequence[Sample[Any]], extractor: FeatureExtractor, batch: int
) -> Iterator[tuple[Sequence[Sample[Any]], Features]]:
    """Read the samples and yield them with their features, ``batch`` at a time, in order.

    Raises:
        DataError: an image cannot be read.
    """
    for part, crops in read_batches(samples, extractor.size, batch):
        yield part, extractor(crops)


def read_batches(
    samples: Sequence[Sample[Any]], size: tuple[int, int], batch: int
) -> Iterator[tuple[Sequence[Sample[Any]], Pixels]]:
    """Yield the samples, ``batch`` at a time, with their crops (B, height, width, 3) of ``size``.

    Raises:
        DataError: an image cannot be read.
    """
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        yield part, np.stack([read_crop(sample, size) for sample in part])


def check_finite(features: Features, name: str) -> Features:
    """Return ``features``, refusing a value that is not finite.

    Raises:
        ModelFileError: there is one; the model ``name`` is broken.
    """
    for values in features:
        if values is not None and not np.isfinite(values).all():
            raise ModelFileError(f"{name}: gives features that are not finite; are its weights damaged?")
    return features


class BundleFeatures:
    """The embedding of a bundle, run by its engine: no torch."""

    has_patches = False

    def __init__(self, backend: Backend, manifest: Manifest, head: HeadSpec, description: dict[str, Any]) -> None:
        """Most callers want ``open``."""
        self.size = manifest.input.size
        self.description = description
        self._backend = backend
        self._input = manifest.input.name
        self._output = head.name

    @classmethod
    def open(cls, bundle: Path, *, size: tuple[int, int] | None, layer: int | None, device: str) -> "BundleFeatures":
        """Load the first artifact of ``bundle`` for which there is an engine."""
        manifest = Manifest.read(bundle)
        if layer is not None or size not in (None, manifest.input.size):
            height, width = manifest.input.size
            raise ConfigError(f"{bundle}: a bundle has one size, {height}x{width}, and one layer; leave both out")
        head = next((head for head in manifest.heads if head.task == _TASK), None)
        if head is None:
            raise ModelFileError(f"{bundle}: has no {_TASK} head, only {', '.join(h.task for h in manifest.heads)}")
        artifact = choose_artifact(bundle, manifest)
        backend = open_backend(manifest.open_artifact(bundle, artifact), device="cpu" if device == "auto" else device)
        description = {
            "model": str(bundle),
            "kind": "bundle",
            "architecture": manifest.model,
            "sha256": artifact.file.sha256,
            "size": list(manifest.input.size),
            "engine": backend.name,
        }
        return cls(backend, manifest, head, description)

    def __call__(self, crops: Pixels) -> Features:
        """Map crops to embeddings, without patches."""
        embeddings = self._backend.run({self._input: crops})[self._output]
        return check_finite(Features(embeddings.astype(np.float32), None), self.description["model"])
