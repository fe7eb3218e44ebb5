"""Maps on a grid of patches: resized, and compared with what lies under each patch."""

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating]  # (rows, columns, channels), or with axes before


def resize_map(values: Map, size: tuple[int, int]) -> Map:
    """Resize maps (..., rows, columns, C) bilinearly to (..., size[0], size[1], C).

    Values stand for the middle of their cells; beyond the outermost middles the edge is repeated.
    """
    rows, columns = (interpolation(n, m) for n, m in zip(values.shape[-3:-1], size, strict=True))
    tall = np.einsum("hr,...rwc->...hwc", rows, values, optimize=True)
    resized: Map = np.einsum("wk,...hkc->...hwc", columns, tall, optimize=True)
    return resized


def interpolation(source: int, target: int) -> NDArray[np.float32]:
    """Return the matrix (target, source) that resizes a row of cells linearly."""
    place = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    left = np.minimum(place.astype(int), max(source - 2, 0))
    matrix = np.zeros((target, source), np.float32)
    matrix[np.arange(target), np.minimum(left + 1, source - 1)] = place - left
    matrix[np.arange(target), left] += 1 - (place - left)
    return matrix
