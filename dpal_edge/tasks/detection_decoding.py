"""From the raw output of a detector's head to the people in a frame. numpy only."""

import numpy as np
from numpy.typing import NDArray

from dpal_edge.tasks.decoding import probabilities

# Overlap above which two boxes are the same person: on frames that the package's detector was trained on no other value
# tried is better by more than .002 mean F1 at the default threshold ("operating_points" in
# bench/results/default_models.json). What is scored is what is used.
SAME_PERSON_IOU = 0.45
_MOST = 1000  # boxes that are compared with one another, the highest scores: more people than a frame of any set has

Floats = NDArray[np.float32]


def decode_people(raw: Floats, *, threshold: float, iou: float) -> tuple[Floats, Floats]:
    """Keep each person's best box.

    Args:
        raw: (N, 5) left, top, right, bottom in pixels of the input, and a logit, of every location.
        threshold: least score, 0..1.
        iou: boxes that overlap a better one by more, 0..1, are the same person.

    Returns:
        Boxes (n, 4) in pixels of the input, not clipped to it, and scores (n,) in 0..1, highest first; n may be 0.
    """
    scores = probabilities(raw[:, 4])
    sure = np.flatnonzero(scores >= threshold)
    order = sure[np.argsort(-scores[sure], kind="stable")][:_MOST]
    boxes, scores = raw[order, :4].astype(np.float32), scores[order]
    kept = suppress(boxes, iou)
    return boxes[kept], scores[kept]


def suppress(boxes: Floats, iou: float) -> NDArray[np.int64]:
    """Return which boxes (n, 4), sorted best first, overlap no better one that is kept by more than ``iou``."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(2)
    area = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1)
    same = shared > iou * (area[:, None] + area - shared)  # (n, n)
    left = np.ones(len(boxes), bool)
    kept = []
    for i in range(len(boxes)):
        if left[i]:
            kept.append(i)
            left &= ~same[i]
    return np.array(kept, np.int64)
