"""Object keypoint similarity: deviations of annotators, average precision, and suppression of doubles."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError

Floats = NDArray[np.floating]

# COCO's deviation of human annotators per joint, over the square root of the person's area; the same for both sides.
# COCO has no neck and no top of the head: those two are CrowdPose's, whose others are COCO's.
_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089, "neck": 0.079, "head_top": 0.079,
}  # fmt: skip
# AI Challenger's own, which are far stricter and not quite the same for both sides.
_AIC_SIGMAS = {
    "right_shoulder": 0.01388152, "right_elbow": 0.01515228, "right_wrist": 0.01057665, "left_shoulder": 0.01417709,
    "left_elbow": 0.01497891, "left_wrist": 0.01402144, "right_hip": 0.03909642, "right_knee": 0.03686941,
    "right_ankle": 0.01981803, "left_hip": 0.03843971, "left_knee": 0.03412318, "left_ankle": 0.02415081,
    "head_top": 0.01291456, "neck": 0.01236173,
}  # fmt: skip
_SCORES = ("AP", "AP50", "AP75", "AR")
_SEEN = 0.2  # confidence from which a joint counts towards a person's score


def oks_sigmas(names: Sequence[str], protocol: str = "") -> NDArray[np.float64]:
    """Return the deviation (K,) of each joint for the object keypoint similarity, by its name.

    They are AI Challenger's for the protocol ``aic``; else COCO's where COCO has the joint, and CrowdPose's 0.079 for
    ``neck`` and ``head_top``, which complete the 14 joints of LSP and CrowdPose.

    Raises:
        DataError: a name without a known deviation.
    """
    known = _AIC_SIGMAS if protocol == "aic" else _SIGMAS
    kinds = [name.lower() for name in names]
    if protocol != "aic":
        kinds = [kind.removeprefix("left_").removeprefix("right_") for kind in kinds]
    if unknown := [name for name, kind in zip(names, kinds, strict=True) if kind not in known]:
        raise DataError(f"no OKS deviation is known for the joint {unknown[0]!r}; known: {', '.join(known)}")
    return np.array([known[kind] for kind in kinds])


def oks_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], sigmas: NDArray[np.float64]
) -> dict[str, float]:
    """Score found people with COCO's average precision by object keypoint similarity.

    Args:
        truth: a document in COCO's format; one category.
        results: found people as COCO's results have them: image_id, category_id, keypoints and score.
        sigmas: (K,) deviations of the joints.

    Returns:
        ``AP`` and ``AR``, over similarities .5 to .95, ``AP50`` and ``AP75``, 0..1; NaN where nobody is to be found.

    Raises:
        BackendUnavailable: the library that computes it is not installed.
    """
    try:
        import hotcoco
    except ModuleNotFoundError as error:
        raise BackendUnavailable("OKS AP needs hotcoco: pip install 'dpal-edge[evaluate]'") from error
    reference = hotcoco.COCO(truth)
    evaluation: Any = hotcoco.COCOeval(reference, reference.load_res(results), "keypoints")
    evaluation.params.kpt_oks_sigmas = sigmas.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that these are not COCO's deviations: known and documented
        evaluation.evaluate()
        evaluation.accumulate()
    # The axes are similarities .5, .55, ... .95, recalls, the one category, areas (all first), and detections per
    # image. The library's summary would name the numbers, but it prints them, and standard output is the caller's.
    precision = np.asarray(evaluation.eval["precision"])[:, :, 0, 0, 0]
    recall = np.asarray(evaluation.eval["recall"])[:, 0, 0, 0]
    values = (precision, precision[0], precision[5], recall)
    return {name: _mean(value) for name, value in zip(_SCORES, values, strict=True)}


def oks(one: Floats, others: Floats, areas: Floats, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the similarity (n,), 0..1, of a person's joints (K, 2) to those of n others (n, K, 2).

    Args:
        areas: (n,) square pixels that distances are measured by.
    """
    squared = ((others - one) ** 2).sum(-1)
    similarity: NDArray[np.float64] = np.exp(-squared / (8 * sigmas**2 * areas[:, None])).mean(-1)
    return similarity


def suppress_poses(
    joints: Floats, scores: Floats, areas: Floats, sigmas: NDArray[np.float64], threshold: float = 0.9
) -> NDArray[np.int64]:
    """Return which people of one image are not the same as a better one, best first.

    Args:
        joints: (n, K, 2) pixels.
        scores: (n,).
        areas: (n,) square pixels of the boxes; two people are compared by the mean of theirs.
        threshold: similarity above which two are the same.

    Source: OKS-NMS, Papandreou et al., 2017; as the evaluation of Simple Baselines (Xiao et al., 2018) uses it.
    """
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        similarity = oks(joints[best], joints[order], (areas[best] + areas[order]) / 2, sigmas)
        order = order[similarity <= threshold]
    return np.array(kept, np.int64)


def rescore(boxes: Floats, confidence: Floats) -> NDArray[np.float64]:
    """Return people's scores (n,): the box's (n,) times the mean confidence of the joints (n, K) that are above 0.2.

    Source: Papandreou et al., 2017; 0.2 as in Simple Baselines (Xiao et al., 2018).
    """
    seen = confidence > _SEEN
    mean = (confidence * seen).sum(1) / np.maximum(seen.sum(1), 1)
    scores: NDArray[np.float64] = boxes * mean
    return scores


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean; the library marks what is undefined by -1."""
    return float(values.mean()) if (values > -1).all() else math.nan
