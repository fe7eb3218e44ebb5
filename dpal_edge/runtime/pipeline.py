"""From a camera frame to people."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ModelFileError
from dpal_edge.runtime.detector import Detector, ModelDetector
from dpal_edge.runtime.model import Model, check_images
from dpal_edge.runtime.person import Person, check_heads, decode_heads
from dpal_edge.runtime.preprocess import crop_people, pixel_boxes
from dpal_edge.runtime.tracker import Tracker, unit_rows


class Pipeline:
    """Detector, model and tracker of one camera; call it with every frame. Use it from one thread at a time."""

    def __init__(self, model: Model, detector: Detector, tracker: Tracker | None = None) -> None:
        """Most callers want ``open``."""
        self.timing_ms: dict[str, float] = {}  # of the last call: "detect", "crop", "model", "decode", "track"
        self.manifest = model.manifest
        self.name = model.name  # of the engine, for example "openvino 2026.4.1 cpu f32"
        check_heads(self.manifest.heads, self.manifest.input.size)
        self._model = model
        self._detector = detector
        self._tracker = tracker
        self._opened: ModelDetector | None = None  # what goes with this pipeline
        self._head = next((head for head in self.manifest.heads if head.task == "embedding"), None)

    @classmethod
    def open(
        cls,
        bundle: Path | str,
        *,
        detector: Detector | Path | str | None = None,
        engine: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        tracker: bool = True,
    ) -> "Pipeline":
        """Load a bundle after checking its hashes and that the model file keeps the manifest's contract.

        Args:
            bundle: folder written by ``dpal-edge export``; what `dpal-edge install` chose of it is used, or else its
                first artifact that can run here.
            detector: a bundle of a detector, or anything that finds people; by default this project's own.
            engine: of the bundle, whatever was installed.
            device: of the bundle and the detector, whatever was installed; by default each engine's usual one.
            threads: CPU threads inside one operator; by default one per physical core.

        Raises:
            ModelFileError: a bundle is damaged, or its model does not fit its manifest.
            BackendUnavailable: no engine here runs any of its artifacts.
        """
        model = Model.open(Path(bundle), engine=engine, device=device, threads=threads)
        opened = None
        if detector is None or isinstance(detector, str | Path):
            detector = opened = ModelDetector.open(detector, device=device, threads=threads)
        pipeline = cls(model, detector, Tracker() if tracker else None)
        pipeline._opened = opened
        return pipeline

    def __call__(self, frame: NDArray[np.uint8]) -> list[Person]:
        """Detect, describe and track the people of one (H, W, 3) uint8 BGR frame; no person gives an empty list."""
        check_images(frame, "frame", ("H", "W", 3))
        heads, size = self.manifest.heads, self.manifest.input.size
        with self._timed("detect"):
            found = self._detector(frame)
        with self._timed("crop"):
            boxes = pixel_boxes(found.boxes, frame.shape)
            crops = crop_people(frame, found.boxes, size)
        with self._timed("model"):
            outputs = self._model.run(crops)
        with self._timed("decode"):
            people = decode_heads(heads, outputs, size, boxes)
        with self._timed("track"):
            ids: list[int | None] = [None] * len(people)
            if self._tracker:
                embeddings = np.stack([person["embedding"] for person in people]) if people and self._head else None
                ids = [*self._tracker.update(found.boxes, embeddings)]
        return [
            Person(_corners(box), float(score), track_id, **person)
            for box, score, track_id, person in zip(found.boxes, found.scores, ids, people, strict=True)
        ]

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map (n, H, W, 3) uint8 RGB crops of the model's size to (n, D) embeddings of length 1.

        Raises:
            ModelFileError: the bundle has no embedding head.
        """
        check_images(crops, "crops", ("n", *self.manifest.input.size, 3))
        if self._head is None:
            tasks = ", ".join(head.task for head in self.manifest.heads)
            raise ModelFileError(f"the bundle has no embedding head, only: {tasks}; export one with an embedding")
        return unit_rows(self._model.run(crops)[self._head.name])

    def close(self) -> None:
        """Free the model, and the detector if ``open`` opened it; later calls raise ``ValueError``."""
        self._model.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing_ms[stage] = 1000 * (time.perf_counter() - start)


def _corners(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom
