"""People in fixed-camera footage: whatever differs from the empty room and has a person's shape.

Both clips of the demo begin with an empty room, so their first frames are the background; no model and no label is
needed. It also shows how any detector plugs into a pipeline.
"""

from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.runtime.detector import Detections
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.video import Video

ASSETS = Path(__file__).parents[1] / "assets"
TABLE_CLIP, ROOM_CLIP = ASSETS / "one-by-one-person-detection.mp4", ASSETS / "people-detection.264"
NEW_PEOPLE = 330  # from this frame of the room clip on, people appear who are in no frame before

Frame = NDArray[np.uint8]  # (height, width, 3) BGR

_EMPTY_FRAMES = 15  # at the start of a clip
_DIFFERENCE = 35  # grey levels in any channel; below it lie noise, shadows and the camera's own exposure changes
_LEAST_HEIGHT = 90  # pixels
_ASPECTS = (0.2, 0.75)  # width / height of a person, arms and strides included
_LEAST_FILL = 0.3  # share of the box that differs
_MARGIN = (0.06, 0.04)  # of width and height, added on each side


class EmptyRoomDetector:
    """A detector for one fixed camera whose empty view is known; the score is the share of the box that differs."""

    def __init__(self, room: Frame) -> None:
        self._cv2 = load_opencv()
        self._room = room

    def __call__(self, frame: Frame) -> Detections:
        """Return what differs from the room and is shaped like a person, clipped to the frame."""
        cv2 = self._cv2
        changed = (cv2.absdiff(frame, self._room).max(axis=2) > _DIFFERENCE).astype(np.uint8)
        changed = cv2.morphologyEx(changed, cv2.MORPH_OPEN, np.ones((3, 3)))
        changed = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, np.ones((25, 7)))  # joins heads, bodies and shoes
        left, top, width, height, area = cv2.connectedComponentsWithStats(changed)[2][1:].T
        fill, aspect = area / (width * height), width / height
        person = (height >= _LEAST_HEIGHT) & (fill >= _LEAST_FILL) & (aspect > _ASPECTS[0]) & (aspect < _ASPECTS[1])
        dx, dy = _MARGIN[0] * width, _MARGIN[1] * height
        boxes = np.stack([left - dx, top - dy, left + width + dx, top + height + dy], axis=1)[person]
        limit = np.array([frame.shape[1], frame.shape[0]] * 2)
        return Detections(np.clip(boxes, 0, limit).astype(np.float32), fill[person].astype(np.float32))


def empty_room(clip: Path) -> Frame:
    """Return the median of the first frames of ``clip``, where nobody is in sight yet.

    Raises:
        DataError: the clip cannot be decoded.
    """
    with Video(clip) as video:
        room: Frame = np.median(np.stack(list(islice(video, _EMPTY_FRAMES))), axis=0).astype(np.uint8)
    return room


def cut_people(clip: Path, folder: Path, *, first: int, last: int | None, every: int) -> int:
    """Write a JPEG per person of each ``every``-th frame from ``first`` to ``last`` (exclusive); return their number.

    Raises:
        DataError: the clip cannot be decoded, or the folder cannot be written.
    """
    cv2 = load_opencv()
    detector = EmptyRoomDetector(empty_room(clip))
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with Video(clip) as video:
        for i, frame in enumerate(islice(video, last)):
            if i < first or i % every:
                continue
            for k, (left, top, right, bottom) in enumerate(detector(frame).boxes.astype(int)):
                path = folder / f"{clip.stem}-{i:05d}-{k}.jpg"
                if not cv2.imwrite(str(path), frame[top:bottom, left:right]):
                    raise DataError(f"{path}: cannot be written; is the disk full?")
                count += 1
    return count
