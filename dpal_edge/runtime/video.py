"""A video file as its frames."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.runtime.opencv import frame_rate, load_opencv


class Video:
    """A video file; iterate over its frames, (H, W, 3) uint8 BGR, once.

    Raises:
        DataError: the file is missing or OpenCV cannot decode its first frame.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file, expected a video")
        cv2 = load_opencv()
        self._capture = cv2.VideoCapture(str(path))
        decoded, self._first = self._capture.read()
        if not decoded:
            self._capture.release()
            raise DataError(f"{path}: not a video that OpenCV can decode; convert it to H.264 in .mp4")
        self.size: tuple[int, int] = self._first.shape[:2]  # height, width
        self.fps = frame_rate(self._capture)
        declared = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.declared_frames: int | None = int(declared) if declared > 0 else None  # None: raw streams do not tell

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        decoded, frame = True, self._first
        while decoded:
            yield frame
            decoded, frame = self._capture.read()

    def close(self) -> None:
        """Close the file."""
        self._capture.release()

    def __enter__(self) -> "Video":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
