"""Body pose in detected boxes: COCO's usual comparison, whose boxes a published file has, not the annotations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import CocoFile, clip_box, entries, find_coco, index_images, noted, read_coco, read_json
from dpal_edge.tasks.oks import oks_precision, oks_sigmas, rescore, suppress_poses
from dpal_edge.tasks.pose import COCO_KEYPOINTS, HALF, Joints, person_categories, triples
from dpal_edge.tasks.sample import Problems, Sample, Split

_BOXES = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
_PERSON = 1  # category in it
_TRUTH = f"the COCO layout: {COCO_KEYPOINTS.format(split='val')}"
_FIELDS = ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "num_keypoints", "keypoints")  # that scores need


@dataclass(frozen=True)
class Detection:
    """A person that a detector found."""

    image_id: int
    score: float  # 0..1


def read_detected_people(folder: Path) -> Split[Detection]:
    """Read the boxes that a detector of 56 AP found in COCO's val, as Simple Baselines published them.

    The file is ``person_detection_results/COCO_val2017_detections_AP_H_56_person.json``, a list of image_id,
    category_id, bbox and score, in a folder with COCO's keypoint annotations. Boxes are clipped to the image.

    Raises:
        DataError: a file is missing or not of this layout, or too many boxes are bad.
    """
    expected = f"{_BOXES}, a list of image_id, category_id, bbox and score"
    path = folder / _BOXES
    records = read_json(path, expected)
    if not isinstance(records, list):
        raise DataError(f"{path}: not a list; expected {expected}")
    truth, parent = find_coco(folder, "val", "person_keypoints", _TRUTH)
    bad_images, problems = Problems(truth), Problems(path)
    file = read_coco(truth, _TRUTH)
    images = index_images(file, parent.joinpath, bad_images)
    samples = []
    for where, record in entries("box", records):
        with noted(problems, where, "image_id, category_id, bbox and score"):
            if record["category_id"] != _PERSON:
                continue
            image = images[int(record["image_id"])]
            box = clip_box([float(value) for value in record["bbox"]], image.width, image.height)
            if not image.there:
                raise DataError(f"no image {image.path}; expected the images of {truth.name} there")
            samples.append(
                Sample(image.path, Detection(int(record["image_id"]), float(record["score"])), box, image.size)
            )
    found = bad_images.finish(len(images)) + problems.finish(len(samples))
    return Split(tuple(samples), person_categories(file.categories, named=True)[1], "coco", found)


def detected_pose_metrics(
    predicted: Joints, confidence: NDArray[np.floating], split: Split[Detection], folder: Path
) -> dict[str, float]:
    """Score joints that were found in detected boxes against all annotated people, crowds and unlabelled ones included.

    A person's score is the box's times the mean confidence of the joints; those whose joints are the same as a better
    one's are left out.

    Args:
        predicted: (n, K, 2) pixels, of the n samples of ``split``; joints as in the annotations.
        confidence: (n, K) of each joint, 0..1.
        folder: as read_detected_people was given.

    Returns:
        ``OKS_AP``, ``OKS_AP50``, ``OKS_AP75`` and ``OKS_AR``, 0..1.

    Raises:
        DataError: the annotations are missing or not of this layout.
        BackendUnavailable: the library that computes OKS AP is not installed.
    """
    file = read_coco(find_coco(folder, "val", "person_keypoints", _TRUTH)[0], _TRUTH)
    people, names = person_categories(file.categories, named=True)
    if not people:
        raise DataError(f"{file.path}: not keypoint annotations, no category names its keypoints; expected {_TRUTH}")
    sigmas = oks_sigmas(names)
    scores = rescore(np.array([sample.target.score for sample in split.samples]), confidence)
    boxes = np.array([sample.box for sample in split.samples], float).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    owners = np.array([sample.target.image_id for sample in split.samples])
    results = []
    for image in np.unique(owners):
        here = np.flatnonzero(owners == image)
        kept = here[suppress_poses(predicted[here], scores[here], areas[here], sigmas)]
        results += [
            {
                "image_id": int(image),
                "category_id": 1,
                "keypoints": triples(predicted[i] - HALF, 1),
                "score": float(scores[i]),
            }
            for i in kept
        ]
    found = oks_precision(_document(file, people), results, sigmas)
    return {f"OKS_{name}": value for name, value in found.items()}


def _document(file: CocoFile, people: frozenset[int]) -> dict[str, Any]:
    """Return what scoring needs of a file in COCO's format, its people of one category, 1."""
    return {
        "images": [{"id": record["id"]} for record in file.images],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {name: record[name] for name in _FIELDS if name in record} | {"category_id": 1}
            for record in file.annotations
            if record["category_id"] in people
        ],
    }
