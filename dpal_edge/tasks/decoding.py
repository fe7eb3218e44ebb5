"""From the raw outputs of a model's heads to what a person can read: joints, classes, probabilities, boxes. numpy only.

A head's ``kind`` tells how its output is to be read; label names come from the checkpoint or the manifest.
"""

import numpy as np
from numpy.typing import NDArray

SIMCC_SPLIT = 2  # bins per pixel of the input
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
    """Take the likeliest bin of each axis; the confidence is the smaller of the two axes' peaks around it."""
    bins = SIMCC_SPLIT * size[1]
    places, peaks = [], []
    for logits in (raw[..., :bins], raw[..., bins:]):
        best = logits.argmax(-1)
        heat = np.exp(logits - np.take_along_axis(logits, best[..., None], -1))
        places.append((best + 0.5) / SIMCC_SPLIT)
        # The label is a Gaussian over many bins, so one bin's share is small however sure the model is.
        near = abs(np.arange(heat.shape[-1]) - best[..., None]) <= _reach(heat.shape[-1])
        peaks.append((heat * near).sum(-1) / heat.sum(-1))
    return np.stack(places, axis=-1).astype(np.float32), np.minimum(*peaks).astype(np.float32)


def _reach(bins: int) -> int:
    return max(bins // 16, 1)


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
