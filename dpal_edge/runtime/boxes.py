"""Boxes as arrays (n, 4): left, top, right, bottom in pixels."""

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]


def area(boxes: Boxes) -> NDArray[np.float32]:
    """Return (n,) square pixels."""
    product: NDArray[np.float32] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return product


def intersection(a: Boxes, b: Boxes) -> NDArray[np.float32]:
    """Return (n, m) square pixels shared by each pair."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared: NDArray[np.float32] = np.maximum(high - low, 0).prod(axis=2)
    return shared


def iou(a: Boxes, b: Boxes) -> NDArray[np.float32]:
    """Return (n, m) intersection over union in 0..1; 0 for a pair without any area."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - shared
    ratio: NDArray[np.float32] = shared / np.maximum(union, np.finfo(np.float32).tiny)
    return ratio
