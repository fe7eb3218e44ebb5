"""Body pose in detected boxes: COCO's usual comparison, whose boxes a published file has, not the annotations."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import clip_box, entries, find_coco, index_images, noted, read_box, read_coco, read_json
from dpal_edge.tasks.oks import oks_precision, oks_sigmas, rescore, suppress_poses
from dpal_edge.tasks.pose import COCO_KEYPOINTS, Joints, Pose, coco_documents, person_categories, read_person
from dpal_edge.tasks.sample import Box, Problems, Sample, Split

_BOXES = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
_PERSON = 1  # category in it
_TRUTH = f"the COCO layout: {COCO_KEYPOINTS.format(split='val')}"


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
            box = clip_box(read_box(record["bbox"]), image.width, image.height)
            if not image.there:
                raise DataError(f"no image {image.path}; expected the images of {truth.name} there")
            if not math.isfinite(score := float(record["score"])):
                raise DataError(f"its score is {score}; expected 0 to 1")
            samples.append(Sample(image.path, Detection(int(record["image_id"]), score), box, image.size))
    found = bad_images.finish(len(images)) + problems.finish(len(samples))
    if not samples:
        raise DataError(f"{path}: no box of a person, category_id {_PERSON}; expected {expected}")
    return Split(tuple(samples), person_categories(file.categories, named=True)[1], "coco", found)


def detected_pose_metrics(
    predicted: Joints,
    confidence: NDArray[np.floating],
    samples: Sequence[Sample[Detection]],
    split: Split[Detection],
    folder: Path,
) -> dict[str, float]:
    """Score joints that were found in detected boxes against all annotated people, crowds and unlabelled ones included.

    A person's score is the box's times the mean confidence of the joints; those whose joints are the same as a better
    one's are left out. An image that could not be read does not count. Nobody can miss a person whom
    read_coco_keypoints leaves out as bad, but who is found there counts as a false alarm.

    Args:
        predicted: (n, K, 2) pixels, of the n ``samples``; joints as in the annotations.
        confidence: (n, K) of each joint, 0..1.
        samples: those of ``split`` whose images could be read.
        split: what read_detected_people returned.
        folder: as read_detected_people was given.

    Returns:
        ``OKS_AP``, ``OKS_AP50``, ``OKS_AP75`` and ``OKS_AR``, 0..1.

    Raises:
        DataError: the annotations are missing or not of this layout.
        BackendUnavailable: the library that computes OKS AP is not installed.
    """
    owners = np.array([sample.target.image_id for sample in samples])
    unread = {sample.target.image_id for sample in split.samples} - set(owners.tolist())
    images, people, names = _read_truth(folder, unread)
    sigmas = oks_sigmas(names)
    scores = rescore(np.array([sample.target.score for sample in samples]), confidence)
    boxes = np.array([sample.box for sample in samples], float).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    found = []
    for image in np.unique(owners).tolist():
        here = np.flatnonzero(owners == image)
        kept = here[suppress_poses(predicted[here], scores[here], areas[here], sigmas)]
        found += [(image, predicted[i], float(scores[i])) for i in kept]
    precision = oks_precision(*coco_documents(images, people, found), sigmas)
    return {f"OKS_{name}": value for name, value in precision.items()}


def _read_truth(
    folder: Path, unread: Collection[int]
) -> tuple[set[int], list[tuple[Pose, Box, bool]], tuple[str, ...]]:
    """Return which images are scored, the people on them, each with the box and whether it is a crowd, and the joints.

    Args:
        unread: images that are not.
    """
    path, parent = find_coco(folder, "val", "person_keypoints", _TRUTH)
    file, problems = read_coco(path, _TRUTH), Problems(path)  # which the reader of annotated boxes has told
    categories, names = person_categories(file.categories, named=True)
    if not categories:
        raise DataError(f"{path}: not keypoint annotations, no category names its keypoints; expected {_TRUTH}")
    images = index_images(file, parent.joinpath, problems)
    images = {number: image for number, image in images.items() if image.there and number not in unread}
    people: dict[int, tuple[Pose, Box, bool]] = {}
    for where, record in entries("annotation", file.annotations):
        with noted(problems, where, ""):
            if file.category(record) in categories and int(record["image_id"]) in images:
                sample = read_person(record, len(names), images)
                assert sample.box is not None
                people.setdefault(sample.target.id, (sample.target, sample.box, bool(record.get("iscrowd"))))
    return set(images), list(people.values()), names
