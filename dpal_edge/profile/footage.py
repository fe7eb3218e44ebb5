"""Frames for a profile that never run out, and people whose number is known."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.runtime.detector import BatchDetector, Detections
from dpal_edge.runtime.sources import WAIT_S, Frame, gather, open_sources

CLIP = Path(__file__).resolve().parents[1] / "assets" / "people-detection.264"  # real people, as many as six at a time
PLACED = "placed people"  # what stands in a report for a source
_MARGIN = 0.1  # of the cell that a placed person has for itself


class Footage:
    """The frames of sources, over and over where they end."""

    def __init__(self, sources: Sequence[str]) -> None:
        """Open the sources, as ``open_source``; errors as there."""
        self._texts = sources
        self._stack = ExitStack()
        self._open()
        self.live = any(source.live for source in self._sources)
        self.name = " + ".join(source.name for source in self._sources)

    def next(self) -> tuple[dict[str, Frame], float]:
        """Return the next frames by source, and the seconds that were lost because sources had to be opened again."""
        frames = next(self._frames, None)
        if frames is not None:
            return frames, 0.0
        start = perf_counter()
        self.close()
        self._open()
        lost = perf_counter() - start
        frames = next(self._frames, None)
        if frames is None:
            raise DataError(f"{self.name}: no picture in it can be decoded; choose another --source")
        return frames, lost

    def close(self) -> None:
        """Close the sources."""
        self._stack.close()

    def _open(self) -> None:
        self._sources = self._stack.enter_context(open_sources(self._texts))
        self._frames = gather(self._sources, wait_s=WAIT_S)


class PlacedPeople:
    """A detector that does its work on every frame, and then gives as many people as are asked for, in rows.

    So the time for n people is known, whoever walks by, and with the detector's own.
    """

    def __init__(self, detector: BatchDetector, count: int) -> None:
        self._detector, self._count = detector, count

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect, and return ``count`` boxes, each twice as high as it is wide, side by side."""
        return self.detect([frame])[0]

    def detect(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Do the same for the frames of several cameras, in one pass of the detector."""
        self._detector.detect(frames)
        return [self._place(frame) for frame in frames]

    def _place(self, frame: NDArray[np.uint8]) -> Detections:
        height, width = frame.shape[:2]
        rows = max(1, round((self._count * height / (2 * width)) ** 0.5))
        columns = -(-self._count // rows)
        cell_height, cell_width = height / rows, width / columns
        tall = (1 - _MARGIN) * min(cell_height, 2 * cell_width)
        row, column = np.divmod(np.arange(self._count), columns)
        left, top = column * cell_width, row * cell_height
        boxes = np.stack([left, top, left + tall / 2, top + tall], axis=1).astype(np.float32)
        return Detections(boxes, np.ones(self._count, np.float32))
