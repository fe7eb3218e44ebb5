"""From a camera frame to people."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ModelFileError
from dpal_edge.runtime.detector import BatchDetector, DefaultDetector, Detections, Detector, ModelDetector
from dpal_edge.runtime.model import Model, check_images
from dpal_edge.runtime.person import Person, check_heads, decode_heads
from dpal_edge.runtime.preprocess import as_bgr, crop_people, pixel_boxes
from dpal_edge.runtime.sources import Frame
from dpal_edge.runtime.tracker import Tracker, unit_rows


class Pipeline:
    """Detector, model and a tracker for each camera; call it with every frame. Use it from one thread at a time.

    Several pipelines in one process do not share anything. Close it, or use it in a ``with`` statement: engines hold
    memory outside of Python's.
    """

    def __init__(self, model: Model, detector: Detector, *, tracker: Callable[[], Tracker] | None = Tracker) -> None:
        """Most callers want ``open``."""
        self.timing_ms: dict[str, float] = {}  # of the last call: "detect", "crop", "model", "decode", "track"
        self.manifest = model.manifest
        self.name = model.name  # of the engine, for example "openvino 2026.4.1 cpu f32"
        check_heads(self.manifest.heads, self.manifest.input.size)
        self._model = model
        self._detector = detector
        self._new_tracker = tracker
        self._trackers: dict[str, Tracker] = {}  # by camera
        self._times_s: dict[str, float] = {}  # of each camera's last frame
        self._opened: ModelDetector | DefaultDetector | None = None  # what goes with this pipeline
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
        tracker: Callable[[], Tracker] | None = Tracker,
    ) -> "Pipeline":
        """Load a bundle after checking its hashes and that the model file keeps the manifest's contract.

        Args:
            bundle: folder written by ``dpal-edge export``; what `dpal-edge install` chose of it is used, or else its
                first artifact that can run here.
            detector: a bundle of a detector, or anything that finds people; by default this project's own.
            engine: of the bundle, whatever was installed.
            device: of the bundle and the detector, whatever was installed; by default each engine's usual one.
            threads: CPU threads inside one operator; by default one per physical core.
            tracker: makes the tracker of each camera; None gives no tracks.

        Raises:
            ModelFileError: a bundle is damaged, or its model does not fit its manifest.
            BackendUnavailable: no engine here runs any of its artifacts.
        """
        model = Model.open(Path(bundle), engine=engine, device=device, threads=threads)
        opened: ModelDetector | DefaultDetector | None = None
        if detector is None:
            detector = opened = DefaultDetector(partial(ModelDetector.open, device=device, threads=threads))
        elif isinstance(detector, str | Path):
            detector = opened = ModelDetector.open(detector, device=device, threads=threads)
        pipeline = cls(model, detector, tracker=tracker)
        pipeline._opened = opened
        return pipeline

    def __call__(self, frame: Frame | NDArray[np.uint8]) -> list[Person]:
        """Detect, describe and track the people of one frame of one camera; no person gives an empty list."""
        return self.look({"": frame})[""]

    def look(
        self, frames: Mapping[str, Frame | NDArray[np.uint8]], *, tasks: Collection[str] | None = None
    ) -> dict[str, list[Person]]:
        """Do the same for frames of several cameras at once: one pass of the model serves the people of all.

        Args:
            frames: by camera, each of its own size, uint8: (H, W, 3) BGR, or (H, W) grey and (H, W, 4) BGRA, which are
                converted; each camera has its own tracks. A ``Frame`` tells when it was taken as well: where others
                were dropped, people are then looked for further on.
            tasks: whose heads are wanted, such as ("pose",); None is all. The others' fields of ``Person`` are None.
                ONNX Runtime leaves their work out, other engines only their decoding.

        Raises:
            ValueError: a frame of another shape or type, or a task that the bundle has no head for.
        """
        images = {
            camera: as_bgr(frame.image if isinstance(frame, Frame) else frame) for camera, frame in frames.items()
        }
        if unknown := set(tasks or ()) - {head.task for head in self.manifest.heads}:
            raise ValueError(f"no head for {', '.join(sorted(unknown))}, expected {self._tasks()}")
        heads = tuple(head for head in self.manifest.heads if tasks is None or head.task in tasks)
        size = self.manifest.input.size
        with self._timed("detect"):
            found = self._detect(images)
        with self._timed("crop"):
            boxes = [np.empty((0, 4), np.int64)]
            crops = np.empty((sum(len(seen.scores) for seen in found.values()), *size, 3), np.uint8)
            end = 0
            for camera, image in images.items():
                boxes.append(pixel_boxes(found[camera].boxes, image.shape))
                start, end = end, end + len(boxes[-1])
                crop_people(image, found[camera].boxes, size, out=crops[start:end])
        with self._timed("model"):
            outputs = self._model.run(crops, heads)
        with self._timed("decode"):
            people = iter(decode_heads(heads, outputs, size, np.concatenate(boxes)))
        with self._timed("track"):
            return {
                camera: self._follow(camera, frames[camera], seen, [next(people) for _ in seen.scores])
                for camera, seen in found.items()
            }

    def _detect(self, images: Mapping[str, NDArray[np.uint8]]) -> dict[str, Detections]:
        """Find the people of each camera, in one pass where the detector can."""
        if images and isinstance(self._detector, BatchDetector):
            return dict(zip(images, self._detector.detect(list(images.values())), strict=True))
        return {camera: self._detector(image) for camera, image in images.items()}

    def _follow(
        self, camera: str, frame: Frame | NDArray[np.uint8], found: Detections, people: list[dict[str, Any]]
    ) -> list[Person]:
        """Give the people of one camera their tracks, and the means over them."""
        ids: list[int | None] = [None] * len(people)
        if self._new_tracker is not None:
            if camera not in self._trackers:
                self._trackers[camera] = self._new_tracker()
            ids = self._identify(camera, frame.time_s if isinstance(frame, Frame) else None, found, people)
        return [
            Person(_corners(box), float(score), track_id, **person)
            for box, score, track_id, person in zip(found.boxes, found.scores, ids, people, strict=True)
        ]

    def _identify(
        self, camera: str, time_s: float | None, found: Detections, people: list[dict[str, Any]]
    ) -> list[int | None]:
        """Return the tracks of one camera's people; their embeddings and attributes become the means over them."""
        tracker = self._trackers[camera]
        before, seconds = self._times_s.get(camera), None
        if time_s is not None:
            seconds = None if before is None else max(0.0, time_s - before)  # a clock may be set back
            self._times_s[camera] = time_s
        embeddings = (
            np.stack([person["embedding"] for person in people]) if people and "embedding" in people[0] else None
        )
        ids = tracker.update(found.boxes, embeddings, found.scores, seconds=seconds)
        if embeddings is not None:
            for person, mean in zip(people, tracker.smooth_embeddings(ids, embeddings), strict=True):
                person["embedding"] = mean
        if people and "attributes" in people[0]:
            shares = np.array([list(person["attributes"].values()) for person in people], np.float32)
            for person, mean in zip(people, tracker.smooth(ids, {"attributes": shares})["attributes"], strict=True):
                person["attributes"] = dict(zip(person["attributes"], mean.tolist(), strict=True))
        return ids

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map (n, H, W, 3) uint8 RGB crops of the model's size to (n, D) embeddings of length 1.

        Raises:
            ModelFileError: the bundle has no embedding head.
        """
        check_images(crops, "crops", ("n", *self.manifest.input.size, 3))
        if self._head is None:
            raise ModelFileError(
                f"the bundle has no embedding head, only: {self._tasks()}; export one with an embedding"
            )
        return unit_rows(self._model.run(crops)[self._head.name])

    def _tasks(self) -> str:
        return ", ".join(head.task for head in self.manifest.heads)

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
