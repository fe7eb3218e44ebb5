"""Draw people on a frame."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.runtime.pipeline import Person
from dpal_edge.runtime.preprocess import pixel_boxes

_GOLDEN_RATIO = 0.618034  # steps through the hues so that neighbouring track ids differ most
_GREY = (200, 200, 200)
_Plate = tuple[int, int, int, int]  # left, top, right, bottom in pixels
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def draw(frame: NDArray[np.uint8], people: Sequence[Person]) -> NDArray[np.uint8]:
    """Return a copy of a (H, W, 3) BGR frame with one rectangle and label ("#3 0.87": track, score) per person.

    Lines and text scale with the frame; a track keeps its colour.
    """
    cv2 = load_opencv()
    drawn: NDArray[np.uint8] = frame.copy()
    unit = min(frame.shape[:2]) / 432  # line widths and text are chosen for 768 x 432
    boxes = pixel_boxes(np.array([person.box for person in people], np.float32).reshape(-1, 4), frame.shape)
    for person, (left, top, right, bottom) in zip(people, boxes.tolist(), strict=True):
        color = track_color(person.track_id)
        cv2.rectangle(drawn, (left, top), (right - 1, bottom - 1), color, max(1, round(2 * unit)), cv2.LINE_AA)
    # Labels last: no rectangle may cross a text, and no label covers another.
    plates: list[_Plate] = []
    for person, (left, top, _, _) in zip(people, boxes.tolist(), strict=True):
        number = "" if person.track_id is None else f"#{person.track_id} "
        color = track_color(person.track_id)
        plates.append(_label(cv2, drawn, f"{number}{person.score:.2f}", (left, top), color, unit, plates))
    return drawn


def track_color(track_id: int | None) -> tuple[int, int, int]:
    """Return the BGR colour of a track, the same on every call; grey without a track."""
    if track_id is None:
        return _GREY
    red, green, blue = colorsys.hsv_to_rgb(track_id * _GOLDEN_RATIO % 1, 0.75, 1.0)
    return round(255 * blue), round(255 * green), round(255 * red)


def _label(
    cv2: Any,
    image: NDArray[np.uint8],
    text: str,
    corner: tuple[int, int],
    color: tuple[int, int, int],
    unit: float,
    others: Sequence[_Plate],
) -> _Plate:
    """Write ``text`` on a plate above ``corner``, inside the image and clear of ``others`` where there is room."""
    font, scale, thickness = cv2.FONT_HERSHEY_SIMPLEX, max(0.4, 0.55 * unit), max(1, round(1.3 * unit))
    (width, height), baseline = cv2.getTextSize(text, font, scale, thickness)
    pad = max(2, round(4 * unit))
    wide, high = width + 2 * pad, height + baseline + 2 * pad
    left = max(0, min(corner[0], image.shape[1] - wide))
    top = max(0, corner[1] - high)
    for other in sorted(others, key=lambda plate: -plate[1]):  # from the lowest up
        if left < other[2] and left + wide > other[0] and top < other[3] and top + high > other[1]:
            top = max(0, other[1] - high)
    cv2.rectangle(image, (left, top), (left + wide, top + high), color, cv2.FILLED)
    ink = _BLACK if np.dot(color, (0.114, 0.587, 0.299)) > 110 else _WHITE  # luma of BGR
    cv2.putText(image, text, (left + pad, top + high - pad - baseline // 2), font, scale, ink, thickness, cv2.LINE_AA)
    return (left, top, left + wide, top + high)
