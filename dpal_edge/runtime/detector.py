"""Find people in a frame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.manifest import Manifest
from dpal_edge.runtime.boxes import Boxes, area, intersection, iou
from dpal_edge.runtime.model import Model, check_images
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.preprocess import letterbox_frame
from dpal_edge.tasks.detection_decoding import SAME_PERSON_IOU, decode_people
from dpal_edge.tasks.letterbox import fit, to_frame

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
# This project's own: the same weights for frames of about 4:3 and of 16:9.
DEFAULT_DETECTORS = (_ASSETS / "person_detector.json", _ASSETS / "person_detector_wide.json")
# Least score: of the values tried the best mean F1 of video and photographs for the package's own detector, on frames
# that it was trained on ("operating_points" in bench/results/default_models.json), with fewer false alarms than 0.55.
THRESHOLD = 0.6
_TASK = "detection"
_BOX_AND_LOGIT = 5

# OpenCV's people model, in pixels: a window in which the person is 96 high. Windows are loose, so boxes are cut by a
# share of each side; it and the values below were measured on street and indoor video.
_WINDOW = (128, 64)  # height, width
_PERSON_HEIGHT = 96
_LEAST_HEIGHT = 32  # below it the frame would be scaled up beyond use and memory
_MARGIN = np.array([0.18, 0.09], np.float32)  # of the window's width, height
_STRIDE = 8  # pixels between windows
_PYRAMID_STEP = 1.05
_BORDER = 0.2  # of the frame's height, replicated around it: people who touch the edge still get a whole window
_SAME_WINDOW_IOU = 0.4
_SAME_PERSON_INSIDE = 0.6  # share of the smaller box that lies in the larger one
_SUPPORT = 2  # windows that must agree (IoU of 0.5 or more) on a person


@dataclass(frozen=True, eq=False)
class Detections:
    """People found in one frame, best first or in any order."""

    boxes: Boxes  # (n, 4) left, top, right, bottom in pixels, inside the frame or partly outside
    scores: NDArray[np.float32]  # (n,) 0..1

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.scores), 4) or self.scores.ndim != 1:
            raise ValueError(f"boxes {self.boxes.shape} and scores {self.scores.shape} found, expected (n, 4) and (n,)")
        if not np.isfinite(self.boxes).all():
            raise ValueError("a box has a coordinate that is infinite or not a number")


class Detector(Protocol):
    """Anything that finds people; called with one (H, W, 3) uint8 BGR frame at a time."""

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Return the people in ``frame``."""
        ...


@runtime_checkable
class BatchDetector(Protocol):
    """A detector that takes the frames of several cameras at once."""

    def detect(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Return the people in each frame (H, W, 3) uint8 BGR; sizes may differ."""
        ...


class ModelDetector:
    """A detector's bundle: one pass over a frame, or over those of several cameras. Use it from one thread at a time.

    Args:
        model: with one head, for detection.
        threshold: least score, 0..1.
        iou: boxes that overlap a better one by more are dropped as the same person, 0..1.

    Raises:
        ConfigError: a threshold out of range.
        ModelFileError: the model is no detector.
    """

    def __init__(self, model: Model, *, threshold: float = THRESHOLD, iou: float = SAME_PERSON_IOU) -> None:
        if not (0 <= threshold <= 1 and 0 < iou <= 1):
            raise ConfigError(f"threshold {threshold} and iou {iou} found, expected both in 0..1")
        heads = model.manifest.heads
        if len(heads) != 1 or heads[0].task != _TASK or len(heads[0].shape) != 2 or heads[0].shape[1] != _BOX_AND_LOGIT:
            found = ", ".join(f"{head.task} {head.shape}" for head in heads)
            raise ModelFileError(
                f"not a detector's bundle: its heads are {found}, expected one for {_TASK} of shape (any, 5)"
            )
        self.name = model.name
        self._model, self._threshold, self._iou = model, threshold, iou

    @classmethod
    def open(
        cls,
        bundle: Path | str,
        *,
        engine: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        threshold: float = THRESHOLD,
        iou: float = SAME_PERSON_IOU,
    ) -> "ModelDetector":
        """Load a bundle after checking its hashes.

        Raises:
            ModelFileError, BackendUnavailable: as ``Model.open``, or it is no detector.
        """
        model = Model.open(Path(bundle), engine=engine, device=device, threads=threads)
        return cls(model, threshold=threshold, iou=iou)

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Return the people in ``frame``, best first, clipped to the frame."""
        return self.detect([frame])[0]

    def detect(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Return the people in each frame, in one pass."""
        for frame in frames:
            check_images(frame, "frame", ("H", "W", 3))
        manifest = self._model.manifest
        size = manifest.input.size
        inputs = np.empty((len(frames), *size, 3), np.uint8)
        for i, frame in enumerate(frames):
            inputs[i] = letterbox_frame(frame, size)
        found = []
        for frame, raw in zip(frames, self._model.run(inputs)[manifest.heads[0].name], strict=True):
            boxes, scores = decode_people(raw, threshold=self._threshold, iou=self._iou)
            found.append(Detections(to_frame(boxes, (frame.shape[0], frame.shape[1]), size), scores))
        return found

    def close(self) -> None:
        """Free the model; later calls raise ``ValueError``."""
        self._model.close()


class DefaultDetector:
    """The detector that comes with this package; each shape of frames is served by the input that it fills best.

    An input of 4:3 is a quarter grey where frames are of 16:9, and costs as much as if it were not. What a shape needs
    is loaded when the first frame of that shape comes. Use it from one thread at a time.

    Args:
        open_detector: loads one of the bundles.
        bundles: of detectors that differ in the size of their input; by default those of the package.

    Raises:
        ModelFileError: a manifest is damaged.
    """

    def __init__(
        self,
        open_detector: Callable[[Path], ModelDetector] = ModelDetector.open,
        bundles: Sequence[Path] | None = None,
    ) -> None:
        self._open = open_detector
        self._bundles = {Manifest.read(bundle).input.size: bundle for bundle in bundles or DEFAULT_DETECTORS}
        self._detectors: dict[tuple[int, int], ModelDetector] = {}  # by size of the input

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Return the people in ``frame``, best first, clipped to the frame."""
        return self.detect([frame])[0]

    def detect(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Return the people in each frame; frames that need the same input share a pass."""
        for frame in frames:
            check_images(frame, "frame", ("H", "W", 3))
        sizes = [self._best_size(frame.shape[0], frame.shape[1]) for frame in frames]
        found: dict[int, Detections] = {}
        for size in dict.fromkeys(sizes):
            if size not in self._detectors:
                self._detectors[size] = self._open(self._bundles[size])
            places = [i for i, wanted in enumerate(sizes) if wanted == size]
            found |= zip(places, self._detectors[size].detect([frames[i] for i in places]), strict=True)
        return [found[i] for i in range(len(frames))]

    def _best_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the input that shows a frame largest, the smaller one of equals."""
        return max(self._bundles, key=lambda size: (fit((height, width), size), -size[0] * size[1]))

    def close(self) -> None:
        """Free the models; later calls raise ``ValueError`` for frames of the shapes that came before."""
        for detector in self._detectors.values():
            detector.close()


class HogDetector:
    """OpenCV's built-in people detector: no model file, no GPU, modest accuracy.

    It knows upright, fully visible people seen from about eye level. It misses people who are seen from steeply
    above, bent, cut by the frame's edge or occluded. Time and false alarms both grow as ``min_height`` falls.

    Args:
        min_height: pixels of the smallest person to be found; the frame is scaled so that this one just fits.
        threshold: distance from the decision border that a window needs; higher gives fewer false alarms.

    Scores are ``1 - exp(-distance)``: they rank boxes, they are not probabilities.

    Source: Dalal and Triggs, 2005. Differs: windows that stand alone, or that lie inside a better one, are dropped.
    """

    def __init__(self, *, min_height: int = 128, threshold: float = 0.6) -> None:
        if min_height < _LEAST_HEIGHT:
            raise ConfigError(f"min_height is {min_height}, expected {_LEAST_HEIGHT} or more pixels")
        cv2 = load_opencv()
        if not hasattr(cv2, "HOGDescriptor"):
            raise ConfigError(f"OpenCV {cv2.__version__} has no HOG people detector; pip install 'dpal-edge[camera]'")
        self._cv2: Any = cv2
        self._scale = _PERSON_HEIGHT / min_height
        self._threshold = threshold
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Return the people in ``frame``, best first, clipped to the frame."""
        windows, distances = self._windows(frame)
        trim = _MARGIN * (windows[:, 2:] - windows[:, :2])
        boxes = np.concatenate([windows[:, :2] + trim, windows[:, 2:] - trim], axis=1)
        limit = np.array([frame.shape[1], frame.shape[0]] * 2, np.float32)
        boxes = np.clip(boxes, 0, limit).astype(np.float32)
        kept = [i for i in _one_per_person(boxes, distances) if distances[i] >= self._threshold]
        return Detections(boxes[kept], 1 - np.exp(-distances[kept]))

    def _windows(self, frame: NDArray[np.uint8]) -> tuple[Boxes, NDArray[np.float32]]:
        """Return all windows on the person side as (n, 4) pixels of the frame, and their distances (n,)."""
        cv2 = self._cv2
        smooth = cv2.INTER_AREA if self._scale < 1 else cv2.INTER_LINEAR
        height, width = (round(edge * self._scale) for edge in frame.shape[:2])
        border = round(_BORDER * height)
        if height + 2 * border < _WINDOW[0] or width + border // 2 * 2 < _WINDOW[1]:
            return np.empty((0, 4), np.float32), np.empty(0, np.float32)  # OpenCV would abort the whole process
        scaled = cv2.resize(frame, (width, height), interpolation=smooth)
        padded = cv2.copyMakeBorder(scaled, border, border, border // 2, border // 2, cv2.BORDER_REPLICATE)
        found, distances = self._hog.detectMultiScale(
            padded, hitThreshold=0, winStride=(_STRIDE, _STRIDE), scale=_PYRAMID_STEP, groupThreshold=0
        )
        windows = np.asarray(found, np.float32).reshape(-1, 4)
        windows[:, 2:] += windows[:, :2]
        offset = np.array([border // 2, border] * 2, np.float32)
        return (windows - offset) / self._scale, np.asarray(distances, np.float32).reshape(-1)


def _one_per_person(boxes: Boxes, distances: NDArray[np.float32]) -> list[int]:
    """Return the indices of the best window of each group, best first; groups below the support are dropped."""
    # OpenCV's threads append windows in any order: the box breaks ties, so that results repeat.
    order = np.lexsort((*boxes.T, -distances))
    kept = []
    while len(order):
        best, candidates = order[0], boxes[order]
        overlap = iou(boxes[[best]], candidates)[0]
        smaller = np.minimum(area(boxes[[best]]), area(candidates))
        inside = intersection(boxes[[best]], candidates)[0] / np.maximum(smaller, 1)
        if (overlap >= 0.5).sum() >= _SUPPORT:
            kept.append(int(best))
        same = (overlap > _SAME_WINDOW_IOU) | (inside > _SAME_PERSON_INSIDE)
        same[0] = True  # also a box that clipping left without any area
        order = order[~same]
    return kept
