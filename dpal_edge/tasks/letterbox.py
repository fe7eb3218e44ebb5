"""Whole frames as a model's input: proportions stay, the frame lies at the top left, grey fills the right and bottom.

The geometry is apart from the pixels, so that a device resizes with OpenCV and gets the same boxes back.
"""

import numpy as np
from numpy.typing import NDArray

from dpal_edge.tasks.image import Pixels

GREY = 114  # of each channel

Floats = NDArray[np.float32]


def fit(frame: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width that a frame takes of an input, the largest of its proportions, small ones enlarged.

    Args:
        frame: height, width of the frame in pixels.
        size: height, width of the input.
    """
    scale = min(size[0] / frame[0], size[1] / frame[1])
    height, width = (min(max(round(side * scale), 1), limit) for side, limit in zip(frame, size, strict=True))
    return height, width


def letterbox(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize a frame (h, w, 3), bilinear and averaged where it shrinks, and pad it to (*size, 3)."""
    from PIL import Image

    height, width = fit(pixels.shape[:2], size)
    padded = np.full((*size, 3), GREY, np.uint8)
    padded[:height, :width] = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return padded


def to_input(boxes: NDArray[np.floating], frame: tuple[int, int], size: tuple[int, int]) -> Floats:
    """Move boxes (n, 4), left, top, right, bottom, from pixels of the frame to pixels of the input."""
    return (boxes * _factors(frame, size)).astype(np.float32)


def to_frame(boxes: NDArray[np.floating], frame: tuple[int, int], size: tuple[int, int]) -> Floats:
    """Move boxes (n, 4) from pixels of the input to pixels of the frame, clipped to the frame."""
    clipped: Floats = np.clip(boxes / _factors(frame, size), 0, [frame[1], frame[0]] * 2).astype(np.float32)
    return clipped


def _factors(frame: tuple[int, int], size: tuple[int, int]) -> Floats:
    """Return input pixels per frame pixel, (4,): of x and y apart, because the resized sides are whole pixels."""
    height, width = fit(frame, size)
    return np.array([width / frame[1], height / frame[0]] * 2, np.float32)
