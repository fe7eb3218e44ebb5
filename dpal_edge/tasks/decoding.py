"""From the raw outputs of a model's heads to what a person can read: joints, classes, probabilities, boxes. numpy only.

A head's ``kind`` tells how its output is to be read; label names come from the checkpoint or the manifest.
"""

from functools import reduce

import numpy as np
from numpy.typing import NDArray

SIMCC_SPLIT = 2  # bins per pixel of the input
_CELL = 4  # bins that are searched as one: every side is of so many, and it is a quarter of the work
_WINDOW = 20  # a joint's window reaches this part of the axis to both sides
_DARK_EPSILON = 1e-10

Floats = NDArray[np.float32]


def decode_joints(raw: Floats, kind: str, size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Find joints in the output of a pose head.

    Args:
        raw: ``simcc``: logits (n, K, 2 * width + 2 * height), bins of x before bins of y. ``heatmap``: (n, K, h, w).
        size: height, width of the model's input in pixels.

    Returns:
        Places (n, K, 2), x and y in pixels of the input, and confidences (n, K) in 0..1.
    """
    return _decode_simcc(raw, size) if kind == "simcc" else _decode_heat(raw, size)


def _decode_simcc(raw: Floats, size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Take of each axis the mean inside the window that holds the most probability; confidence is the smaller share.

    Where a model is unsure, the likeliest bin is a matter of chance, and a joint counts as found within a distance:
    of what is right, a window holds more than a bin.

    Source: the decision of least expected loss, when an error counts from a distance on. Differs from SimCC (Li et al.,
    2022), which takes the likeliest bin; bench/simcc_decoding.py compares both.
    """
    bins = SIMCC_SPLIT * size[1]
    places, shares = [], []
    for logits in (raw[..., :bins], raw[..., bins:]):
        heat = np.exp(logits - logits.max(-1, keepdims=True))
        parts = [heat[..., i::_CELL] for i in range(_CELL)]
        count = heat.shape[-1] // _CELL
        cells = reduce(np.add, parts)
        mass = _running_sum(cells)
        within = reduce(np.add, [(i + 0.5) * part for i, part in enumerate(parts)])  # bins from the cell's beginning
        moment = _running_sum(within + cells * np.arange(0, _CELL * count, _CELL, dtype=np.float32))
        width = 2 * round(count / _WINDOW) + 1
        inside = mass[..., width:] - mass[..., :-width]
        start = inside.argmax(-1)[..., None]
        held = np.take_along_axis(inside, start, -1)
        reached = np.take_along_axis(moment, start + width, -1) - np.take_along_axis(moment, start, -1)
        places.append((reached / held)[..., 0] / SIMCC_SPLIT)
        shares.append((held / mass[..., -1:])[..., 0])
    return np.stack(places, axis=-1).astype(np.float32), np.minimum(*shares).astype(np.float32)


def _running_sum(values: Floats) -> NDArray[np.float64]:
    """Return the sums of the first 0 to n of (..., n) values, exact enough that their differences are."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def _decode_heat(raw: Floats, size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Take the hottest cell, moved by the slope and curvature of the log heat around it (DARK, Zhang et al., 2020)."""
    count, joints, rows, columns = raw.shape
    flat = raw.reshape(count, joints, -1)
    best = flat.argmax(-1)
    y, x = np.unravel_index(best, (rows, columns))
    padded = np.log(np.maximum(np.pad(raw, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge"), _DARK_EPSILON))
    i, j = np.ogrid[:count, :joints]

    def at(down: int, right: int) -> Floats:
        values: Floats = padded[i, j, y + 1 + down, x + 1 + right]
        return values

    shifts = []
    for low, high, inside in (
        (at(0, -1), at(0, 1), (x > 0) & (x < columns - 1)),
        (at(-1, 0), at(1, 0), (y > 0) & (y < rows - 1)),
    ):
        curvature = high - 2 * at(0, 0) + low
        shift = np.divide((low - high) / 2, curvature, out=np.zeros_like(low), where=inside & (curvature < -1e-6))
        shifts.append(np.clip(shift, -0.5, 0.5))
    scale = np.array([size[1] / columns, size[0] / rows], np.float32)
    places = (np.stack([x + shifts[0], y + shifts[1]], axis=-1) + 0.5) * scale
    confidence = np.clip(np.take_along_axis(flat, best[..., None], -1)[..., 0], 0, 1)
    return places.astype(np.float32), confidence.astype(np.float32)


def place_in_box(places: Floats, size: tuple[int, int], boxes: NDArray[np.floating]) -> Floats:
    """Move places (n, K, 2) from pixels of the model's input to pixels of the image.

    Args:
        size: height, width of the input.
        boxes: (n, 4) left, top, right, bottom in the image that each input was cut from.
    """
    corner, extent = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    moved: Floats = (places / np.array(size[::-1], np.float32) * extent + corner).astype(np.float32)
    return moved


def resize_scores(scores: Floats, size: tuple[int, int]) -> Floats:
    """Resize scores (C, h, w) bilinearly to (C, *size); pixel centres map to pixel centres, edges are repeated."""
    resized = scores
    for axis, wanted in ((1, size[0]), (2, size[1])):
        have = scores.shape[axis]
        place = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, have - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, have - 1)
        shape = [1, 1, 1]
        shape[axis] = wanted
        share = (place - low).astype(np.float32).reshape(shape)
        resized = np.take(resized, low, axis) * (1 - share) + np.take(resized, high, axis) * share
    return resized


def decode_classes(raw: Floats, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the class (height, width) of each pixel of a crop from the logits (C, h, w) of a parsing head."""
    best, classes = resize_scores(raw[:1], size)[0], np.zeros(size, np.uint8)
    for number in range(1, len(raw)):  # one class at a time, because all of them at full size are large
        scores = resize_scores(raw[number : number + 1], size)[0]
        higher = scores > best
        best[higher], classes[higher] = scores[higher], number
    return classes


def probabilities(raw: Floats) -> Floats:
    """Return the logistic function of logits, 0..1, without overflow."""
    shares: Floats = (0.5 * (1 + np.tanh(0.5 * raw))).astype(np.float32)
    return shares
