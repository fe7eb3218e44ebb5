"""From a frame and boxes to the crops a model takes."""

import numpy as np
from numpy.typing import NDArray

from dpal_edge.runtime.boxes import Boxes
from dpal_edge.runtime.opencv import load_opencv
from dpal_edge.tasks.letterbox import GREY, fit

_INTERPOLATED = 1.25  # pixels for each of the output, up to which interpolation leaves out next to nothing


def as_bgr(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture as (H, W, 3) BGR: itself, or converted from (H, W) or (H, W, 1) grey or (H, W, 4) BGRA.

    Raises:
        ValueError: it is of another shape or type, or has no pixel.
    """
    channels = 0
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3) and image.size:
        channels = 1 if image.ndim == 2 else image.shape[2]
    if channels not in (1, 3, 4):
        shape, kind = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
        raise ValueError(
            f"a frame of shape {shape} and type {kind}, expected uint8 (H, W, 3) BGR, (H, W) grey or (H, W, 4) BGRA"
        )
    if channels == 3:
        return image
    cv2 = load_opencv()
    converted: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR if channels == 1 else cv2.COLOR_BGRA2BGR)
    return converted


def crop_people(
    frame: NDArray[np.uint8], boxes: Boxes, size: tuple[int, int], *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Cut the boxes out of a frame and resize them, aspect ratio not kept, as person datasets do.

    Edges are rounded to whole pixels and clipped to the frame: what lies outside is left out, never invented, as in
    the crops that models are trained on. A box that keeps no pixel becomes the nearest one at the frame's edge.
    Pixels are averaged where a crop has more of them than the output, else interpolated linearly.

    Args:
        frame: (H, W, 3) BGR.
        boxes: (n, 4) left, top, right, bottom in pixels.
        size: height, width of the output.
        out: where to write it, a part of a larger batch; None makes it.

    Returns:
        (n, height, width, 3) RGB; n may be 0.
    """
    crops = np.empty((len(boxes), *size, 3), np.uint8) if out is None else out
    if not len(boxes):
        return crops
    cv2 = load_opencv()
    for crop, (left, top, right, bottom) in zip(crops, pixel_boxes(boxes, frame.shape), strict=True):
        resized = _resize(frame[top:bottom, left:right], size)
        cv2.cvtColor(resized, cv2.COLOR_BGR2RGB, dst=crop)  # writes straight into the batch
    return crops


def letterbox_frame(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Put a BGR frame (H, W, 3), resized in its proportions, at the top left of a grey RGB image (*size, 3).

    Pixels are averaged and interpolated as in ``crop_people``; ``tasks.letterbox`` moves boxes there and back.
    """
    cv2 = load_opencv()
    height, width = fit((frame.shape[0], frame.shape[1]), size)
    padded = np.full((*size, 3), GREY, np.uint8)
    cv2.cvtColor(_resize(frame, (height, width)), cv2.COLOR_BGR2RGB, dst=padded[:height, :width])
    return padded


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Average whole blocks of pixels where they divide the image, then average or interpolate what is left.

    It is as close to training's views as an average over fractions of pixels, in a third of its time for usual frames
    (bench/results/resize.json).
    """
    cv2 = load_opencv()
    rows, columns = (side // _block(side, wanted) for side, wanted in zip(image.shape[:2], size, strict=True))
    if (rows, columns) != image.shape[:2]:
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    shrinks = max(rows / size[0], columns / size[1]) > _INTERPOLATED
    smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, size[::-1], interpolation=smooth)
    return resized


def _block(side: int, wanted: int) -> int:
    """Return the largest whole number of pixels that divides a side and leaves as many as are wanted."""
    return next((block for block in range(side // wanted, 1, -1) if side % block == 0), 1)


def pixel_boxes(boxes: Boxes, frame_shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Round boxes to whole pixels inside a frame of shape (H, W, ...).

    Each keeps at least one pixel; one that lies outside becomes the nearest at the frame's edge.

    Returns:
        (n, 4) left, top, right, bottom; right and bottom exclusive.
    """
    limit = np.array([frame_shape[1], frame_shape[0]])
    edges = np.rint(boxes).astype(np.int64)
    low = np.clip(edges[:, :2], 0, limit - 1)
    high = np.clip(edges[:, 2:], low + 1, limit)
    return np.concatenate([low, high], axis=1)
