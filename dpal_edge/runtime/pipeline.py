"""From a camera frame to people."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.manifest import Artifact, HeadSpec, Manifest
from dpal_edge.runtime.backend import ENGINES, Backend, open_backend
from dpal_edge.runtime.detector import Detector, HogDetector
from dpal_edge.runtime.preprocess import crop_people
from dpal_edge.runtime.tracker import Tracker, unit_rows

_MAX_BATCH = 32  # crops per pass of the backbone: bounds the memory a crowd can take


@dataclass(frozen=True, eq=False)
class Person:
    """One person in one frame."""

    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    score: float  # of the detector, 0..1
    track_id: int | None  # from 1; None without a tracker
    embedding: NDArray[np.float32] | None  # (D,) of length 1; None if the bundle has no embedding head

    def to_dict(self, *, embedding: bool = False) -> dict[str, Any]:
        """Return what JSON can hold, with the embedding as a list only if asked."""
        person = {
            "box": [round(edge, 2) for edge in self.box],
            "score": round(self.score, 4),
            "track_id": self.track_id,
        }
        if embedding:
            person["embedding"] = None if self.embedding is None else [round(x, 6) for x in self.embedding.tolist()]
        return person


class Pipeline:
    """Detector, backbone and tracker of one camera; call it with every frame. Use it from one thread at a time."""

    def __init__(
        self, backend: Backend, manifest: Manifest, detector: Detector, tracker: Tracker | None = None
    ) -> None:
        """Most callers want ``open``; the backend must be loaded from an artifact of the manifest."""
        self.timing_ms: dict[str, float] = {}  # of the last call: "detect", "embed" (with cropping), "track"
        self.manifest = manifest
        self._backend: Backend | None = backend
        self._detector = detector
        self._tracker = tracker
        self._head = next((head for head in manifest.heads if head.task == "embedding"), None)
        _check_inputs(backend, manifest)
        # Outputs can only be seen by running; this is also the slow first pass of most engines.
        self._run(np.zeros((1, *manifest.input.size, 3), np.uint8))

    @classmethod
    def open(
        cls,
        bundle: Path | str,
        *,
        detector: Detector | None = None,
        engine: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        tracker: bool = True,
    ) -> "Pipeline":
        """Load a bundle after checking its hashes and that the model file keeps the manifest's contract.

        Args:
            bundle: folder written by ``dpal-edge export``; its first artifact that can run here is used.
            detector: ``HogDetector()`` by default.
            threads: CPU threads inside one operator; by default one per physical core.

        Raises:
            ModelFileError: the bundle is damaged, or its model does not fit its manifest.
            BackendUnavailable: no engine here runs any of its artifacts.
        """
        folder = Path(bundle)
        manifest = Manifest.read(folder)
        artifact = _choose(folder, manifest, engine)
        path = manifest.file(folder, artifact.file)
        backend = open_backend(path, engine=engine, device=device, threads=threads)
        return cls(backend, manifest, detector or HogDetector(), Tracker() if tracker else None)

    def __call__(self, frame: NDArray[np.uint8]) -> list[Person]:
        """Detect, embed and track the people of one (H, W, 3) uint8 BGR frame; no person gives an empty list."""
        _check_images(frame, "frame", ("H", "W", 3))
        with self._timed("detect"):
            found = self._detector(frame)
        with self._timed("embed"):
            embeddings = self._embed(crop_people(frame, found.boxes, self.manifest.input.size))
        with self._timed("track"):
            ids = self._tracker.update(found.boxes, embeddings) if self._tracker else [None] * len(found.scores)
        rows = [None] * len(ids) if embeddings is None else embeddings
        return [
            Person((float(box[0]), float(box[1]), float(box[2]), float(box[3])), float(score), track_id, row)
            for box, score, track_id, row in zip(found.boxes, found.scores, ids, rows, strict=True)
        ]

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map (n, H, W, 3) uint8 RGB crops of the model's size to (n, D) embeddings of length 1.

        Raises:
            ModelFileError: the bundle has no embedding head.
        """
        _check_images(crops, "crops", ("n", *self.manifest.input.size, 3))
        embeddings = self._embed(crops)
        if embeddings is None:
            tasks = ", ".join(head.task for head in self.manifest.heads)
            raise ModelFileError(f"the bundle has no embedding head, only: {tasks}; export one with an embedding")
        return embeddings

    def close(self) -> None:
        """Free the model; later calls raise ``ValueError``."""
        self._backend = None

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """Return (n, D) embeddings of length 1, or None if the model gives none."""
        if self._head is None:
            return None
        batches = [crops[start : start + _MAX_BATCH] for start in range(0, len(crops), _MAX_BATCH)]
        parts = [self._run(batch)[self._head.name] for batch in batches]
        return unit_rows(np.concatenate([np.empty((0, *self._head.shape), np.float32), *parts]))

    def _run(self, crops: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every head's output, after checking its shape."""
        if self._backend is None:
            raise ValueError("the pipeline is closed; open it again")
        outputs = self._backend.run({self.manifest.input.name: crops})
        for head in self.manifest.heads:
            _check_output(head, outputs, len(crops))
        return outputs

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing_ms[stage] = 1000 * (time.perf_counter() - start)


def _choose(bundle: Path, manifest: Manifest, engine: str | None) -> Artifact:
    for artifact in manifest.artifacts:
        implied = ENGINES.get(Path(artifact.file.file).suffix)
        if implied is not None and engine in (None, implied):
            return artifact
    targets = ", ".join(artifact.target for artifact in manifest.artifacts) or "nothing"
    raise BackendUnavailable(
        f"{bundle}: holds {targets}, which {f'{engine} cannot' if engine else 'no engine here can'} run; "
        f"engines here: {', '.join(sorted(set(ENGINES.values())))}"
    )


def _check_inputs(backend: Backend, manifest: Manifest) -> None:
    expected = {manifest.input.name: (None, *manifest.input.size, 3)}
    if dict(backend.inputs) != expected:
        raise ModelFileError(
            f"the model takes {dict(backend.inputs)}, its manifest says {expected} (None: any number of crops); "
            f"export the bundle again"
        )


def _check_output(head: HeadSpec, outputs: dict[str, NDArray[np.float32]], count: int) -> None:
    found = outputs[head.name].shape if head.name in outputs else "nothing"
    if found != (count, *head.shape):
        raise ModelFileError(
            f"the model gives {found} as {head.name!r}, its manifest says {(count, *head.shape)}; "
            f"export the bundle again"
        )


def _check_images(array: NDArray[np.uint8], name: str, shape: tuple[int | str, ...]) -> None:
    """Raise unless ``array`` is uint8 of this shape; a named axis may have any length, but only "n" may be empty."""
    expected = f"({', '.join(map(str, shape))})"
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is {type(array).__name__}, expected a numpy array {expected} of uint8")
    if array.dtype != np.uint8:
        raise TypeError(f"{name} holds {array.dtype}, expected uint8 in 0..255")
    axes = zip(array.shape, shape, strict=False)
    fits = all(length == axis if isinstance(axis, int) else length or axis == "n" for length, axis in axes)
    if array.ndim != len(shape) or not fits:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
