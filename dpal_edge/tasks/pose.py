"""Body pose: COCO's keypoint annotations, PCK of the torso, and average precision by object keypoint similarity."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.sample import Sample, Split, read_text, require

Joints = NDArray[np.float32]  # (..., K, 2): x, y in pixels of the image
_TORSO = ("left_shoulder", "right_hip")

# COCO's deviation of human annotators per joint, over the square root of the person's area; the same for both sides.
# COCO has no neck and no top of the head: those two are CrowdPose's.
_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089, "neck": 0.079, "head_top": 0.079,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pose:
    """What is known about one person's joints."""

    id: int  # of the annotation
    image_id: int
    joints: Joints  # (K, 2); what stands where nothing is labelled means nothing
    labelled: NDArray[np.bool_]  # (K,), also those that are hidden in the image
    area: float  # of the person in pixels, for the similarity


def read_coco_keypoints(folder: Path, split: str) -> Split[Pose]:
    """Read ``split`` (train or val) of a folder with COCO's keypoint annotations; a sample is one person in its box.

    The files are ``annotations/person_keypoints_SPLIT.json`` and the images ``SPLIT/``, or both with COCO's year as in
    ``val2017``. Boxes are clipped to the image. Crowds and people without a labelled joint are left out.

    Raises:
        DataError: a file or image is missing, or an annotation is not of this layout.
    """
    layout = f"the COCO layout: annotations/person_keypoints_{split}[2017].json and the images in {split}[2017]/"
    year = "2017" if (folder / "annotations" / f"person_keypoints_{split}2017.json").exists() else ""
    path = folder / "annotations" / f"person_keypoints_{split}{year}.json"
    text = read_text(path, layout)
    images = require(folder / f"{split}{year}", layout)
    try:
        data = json.loads(text)
        category = next(c for c in data["categories"] if c.get("keypoints"))
        names = tuple(str(name) for name in category["keypoints"])
        files = {int(i["id"]): (str(i["file_name"]), float(i["width"]), float(i["height"])) for i in data["images"]}
        annotations = [a for a in data["annotations"] if not a.get("iscrowd") and a["category_id"] == category["id"]]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise DataError(f"{path}: not keypoint annotations ({_reason(error)}); expected {layout}") from error
    samples: dict[int, Sample[Pose]] = {}
    for annotation in annotations:
        sample = _parse(annotation, len(names), files, images, path)
        if sample.target.id in samples:
            raise DataError(f"{path}: annotation {sample.target.id}: another has the same id; expected one per person")
        if sample.target.labelled.any():
            samples[sample.target.id] = sample
    if not samples:
        raise DataError(f"{path}: no person with a labelled joint; expected {layout}")
    return Split(tuple(samples.values()), names)


def pck(predicted: Joints, poses: Sequence[Pose], names: Sequence[str], ratio: float = 0.2) -> float:
    """Return the share of joints found within ``ratio`` of the torso, 0..1: PCK@ratio.

    The torso is the distance of the left shoulder and the right hip. Every labelled joint counts once, of all people
    of whom both are labelled.

    Args:
        predicted: (n, K, 2), of the n ``poses``.

    Raises:
        DataError: the joints have no such names, or nobody has both labelled.
    """
    if missing := [name for name in _TORSO if name not in names]:
        raise DataError(f"PCK needs the joints {' and '.join(_TORSO)}, no {missing[0]} among {', '.join(names)}")
    shoulder, hip = (list(names).index(name) for name in _TORSO)
    truth = np.stack([pose.joints for pose in poses])
    labelled = np.stack([pose.labelled for pose in poses])
    counted = labelled & (labelled[:, shoulder] & labelled[:, hip])[:, None]
    if not counted.any():
        raise DataError(f"none of {len(poses)} people has both {_TORSO[0]} and {_TORSO[1]} labelled; PCK is undefined")
    torso = np.linalg.norm(truth[:, shoulder] - truth[:, hip], axis=-1, keepdims=True)
    found = np.linalg.norm(predicted - truth, axis=-1) <= ratio * torso
    return float(found[counted].mean())


def oks_sigmas(names: Sequence[str]) -> NDArray[np.float64]:
    """Return the deviation of each joint for the object keypoint similarity, by its name.

    COCO's where COCO has the joint; CrowdPose's 0.079 for ``neck`` and ``head_top``, which complete LSP's 14 joints.

    Raises:
        DataError: a name without a known deviation.
    """
    kinds = [name.lower().removeprefix("left_").removeprefix("right_") for name in names]
    if unknown := [name for name, kind in zip(names, kinds, strict=True) if kind not in _SIGMAS]:
        raise DataError(f"no OKS deviation is known for the joint {unknown[0]!r}; known: {', '.join(_SIGMAS)}")
    return np.array([_SIGMAS[kind] for kind in kinds])


def oks_ap(
    predicted: Joints, scores: NDArray[np.floating], poses: Sequence[Pose], names: Sequence[str]
) -> dict[str, float]:
    """Score predicted joints with COCO's average precision by object keypoint similarity.

    Args:
        predicted: (n, K, 2), of the n ``poses``.
        scores: (n,) confidence of each prediction; only their order matters.

    Returns:
        ``AP``, ``AP50``, ``AP75`` and ``AR``, 0..1.

    Raises:
        BackendUnavailable: the library that computes it is not installed.
        DataError: as oks_sigmas.
    """
    try:
        import hotcoco
    except ModuleNotFoundError as error:
        raise BackendUnavailable("OKS AP needs hotcoco: pip install 'dpal-edge[evaluate]'") from error
    sigmas = oks_sigmas(names)
    images = [{"id": i} for i in sorted({pose.image_id for pose in poses})]
    truth = {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": [_coco(p) for p in poses]}
    results = [
        {"image_id": pose.image_id, "category_id": 1, "keypoints": _triples(joints, 1), "score": float(score)}
        for pose, joints, score in zip(poses, predicted, scores, strict=True)
    ]
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
    return {name: float(np.mean(v)) for name, v in zip(("AP", "AP50", "AP75", "AR"), values, strict=True)}


def _parse(
    annotation: dict[str, Any], joints: int, files: dict[int, tuple[str, float, float]], images: Path, path: Path
) -> Sample[Pose]:
    """Turn an annotation of ``path`` into a sample; ``files`` tells name, width and height of each image by its id."""
    where = f"{path}: annotation {annotation.get('id')}"
    try:
        name, width, height = files[int(annotation["image_id"])]
        rows = np.array(annotation["keypoints"], np.float32).reshape(joints, 3)
        left, top, box_width, box_height = (float(value) for value in annotation["bbox"])
        area = float(annotation.get("area", box_width * box_height))
        pose = Pose(int(annotation["id"]), int(annotation["image_id"]), rows[:, :2], rows[:, 2] > 0, area)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: {_reason(error)}; expected id, bbox, {joints} times x, y and visibility, and the id of an image"
        ) from error
    if not (np.isfinite(rows).all() and math.isfinite(area)):
        raise DataError(f"{where}: a keypoint or the area is not finite; correct it or leave it out")
    box = max(left, 0.0), max(top, 0.0), min(left + box_width, width), min(top + box_height, height)
    if not (box[0] < box[2] and box[1] < box[3]):  # also where an edge is NaN
        raise DataError(f"{where}: its box {annotation['bbox']} covers nothing of an image of {width:g}x{height:g}")
    if not (images / name).is_file():
        raise DataError(f"{where}: no image {images / name}; expected the images of {path.name} there")
    return Sample(images / name, pose, box)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _coco(pose: Pose) -> dict[str, Any]:
    """Return a pose as COCO's annotation."""
    left, top = pose.joints[pose.labelled].min(0).tolist()
    right, bottom = pose.joints[pose.labelled].max(0).tolist()
    return {
        "id": pose.id,
        "image_id": pose.image_id,
        "category_id": 1,
        "iscrowd": 0,
        "area": pose.area,
        "bbox": [left, top, right - left, bottom - top],
        "num_keypoints": int(pose.labelled.sum()),
        "keypoints": _triples(np.where(pose.labelled[:, None], pose.joints, 0), 2 * pose.labelled),
    }


def _triples(joints: Joints, visibility: Any) -> list[float]:
    """Flatten joints (K, 2) to x, y, visibility as COCO writes them."""
    column = np.broadcast_to(visibility, len(joints))[:, None]
    flat: list[float] = np.concatenate([joints, column], axis=1).ravel().tolist()
    return flat
