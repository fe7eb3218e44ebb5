"""The metrics of each task, from the outputs of its head to numbers and their standard errors."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.evaluate.bench import Bench
from dpal_edge.evaluate.uncertainty import Indices, Metrics, draw_groups, standard_errors
from dpal_edge.tasks.attributes import Flags, attribute_metrics
from dpal_edge.tasks.decoding import decode_classes, decode_joints, place_in_box, probabilities
from dpal_edge.tasks.detected_pose import detected_pose_metrics
from dpal_edge.tasks.detection import People, detection_metrics
from dpal_edge.tasks.detection_decoding import SAME_PERSON_IOU, decode_people
from dpal_edge.tasks.image import Pixels, open_sample, read_crop
from dpal_edge.tasks.letterbox import letterbox, to_frame
from dpal_edge.tasks.parsing import confusion_matrix, parsing_metrics, read_mask
from dpal_edge.tasks.pose import Joints, Pose, pose_metrics
from dpal_edge.tasks.reid import Identity, matched_queries, retrieval_metrics
from dpal_edge.tasks.sample import Sample, Split

_LEAST_SCORE = 0.01  # of a box: metrics that rank boxes need the uncertain ones as well
_TRUE_ABOVE = 0.5  # probability from which an attribute is said to be there


@dataclass(frozen=True)
class Scores:
    """What a scorer found."""

    metrics: Metrics  # the most important first
    errors: Metrics  # standard errors of metrics; none where they are not wanted or cannot be told
    images: dict[str, int]  # scored, by split


def score_pose(splits: Mapping[str, Split[Pose]], bench: Bench) -> Scores:
    """Find each person's joints in the annotated box; a person's score is the mean confidence of the joints.

    Standard errors are over images, since people in one are alike. With a split ``detected`` joints are also found in
    boxes that a detector found; these metrics have no standard errors.
    """
    found, confidence, samples = _find_joints(splits["val"], bench)
    ranks = confidence.mean(1)

    def score(kept: Indices) -> Metrics:
        return pose_metrics(found[kept], ranks[kept], _part(splits["val"], samples, kept))

    scores = _scores(score, [sample.target.image_id for sample in samples], bench)
    if "detected" not in splits:
        return scores
    detected: Split[Any] = splits["detected"]
    found, confidence, samples = _find_joints(detected, bench)
    metrics = detected_pose_metrics(found, confidence, samples, detected, bench.folder)
    metrics = scores.metrics | {f"{name}_detected": value for name, value in metrics.items()}
    return replace(scores, metrics=metrics, images={**scores.images, "detected": len(samples)})


def _find_joints(split: Split[Any], bench: Bench) -> tuple[Joints, NDArray[np.float32], list[Sample[Any]]]:
    """Return joints (n, K, 2) in pixels of their images and confidences (n, K) of the samples that can be read."""
    places, confidences, samples = [], [], []
    for sample, raw, _ in bench.outputs(split):
        joints, confidence = decode_joints(raw[None], bench.head.kind, bench.predictor.size)
        places.append(place_in_box(joints, bench.predictor.size, np.array([sample.box], np.float32))[0])
        confidences.append(confidence[0])
        samples.append(sample)
    return np.stack(places), np.stack(confidences), samples


def score_parsing(splits: Mapping[str, Split[Path]], bench: Bench) -> Scores:
    """Take the likeliest class of each pixel at the resolution of the masks, one image in memory at a time."""
    classes, protocol = splits["val"].labels, splits["val"].protocol
    confusions = [
        confusion_matrix(decode_classes(raw, mask.shape), mask, len(classes))
        for _, raw, mask in bench.outputs(splits["val"], partial(_read_masked, classes=classes))
    ]
    table = np.stack(confusions)
    return _scores(lambda kept: parsing_metrics(table[kept].sum(0), protocol), range(len(table)), bench)


def score_attributes(splits: Mapping[str, Split[Flags]], bench: Bench) -> Scores:
    """Say that an attribute is there where its probability is above a half."""
    outputs = [(probabilities(raw) > _TRUE_ABOVE, sample.target) for sample, raw, _ in bench.outputs(splits["val"])]
    predicted, truth = (np.stack(column) for column in zip(*outputs, strict=True))
    return _scores(lambda kept: attribute_metrics(predicted[kept], truth[kept]), range(len(truth)), bench)


def score_reid(splits: Mapping[str, Split[Identity]], bench: Bench) -> Scores:
    """Rank the gallery by cosine to each query that has a match in it.

    Standard errors are over the queries' people; the gallery counts as given. All metrics are means over queries, so
    the ranking is done once, one group of people after the other.
    """
    (queries, asked), (gallery, known) = (_embed(splits[name], bench) for name in ("query", "gallery"))
    matched = matched_queries(asked, known)
    groups = [matched[group] for group in draw_groups([asked[i].person for i in matched])]
    parts = [retrieval_metrics(queries[group], gallery, [asked[i] for i in group], known) for group in groups]
    table, sizes = np.array([list(part.values()) for part in parts]), np.array([len(group) for group in groups])

    def score(kept: Indices) -> Metrics:
        means = np.average(table[kept], axis=0, weights=sizes[kept])
        return dict(zip(parts[0], means.tolist(), strict=True))

    return _scores(score, range(len(parts)), bench, {"query": len(asked), "gallery": len(known)})


def _embed(split: Split[Identity], bench: Bench) -> tuple[NDArray[np.float32], list[Identity]]:
    outputs = [(raw, sample.target) for sample, raw, _ in bench.outputs(split)]
    return np.stack([raw for raw, _ in outputs]), [identity for _, identity in outputs]


def score_detection(splits: Mapping[str, Split[People]], bench: Bench) -> Scores:
    """Find people in whole frames, uncertain ones included.

    Standard errors are over frames.
    """
    found, samples = [], []
    size = bench.predictor.size
    for sample, raw, frame in bench.outputs(splits["val"], _read_frame):
        boxes, scores = decode_people(raw, threshold=_LEAST_SCORE, iou=SAME_PERSON_IOU)
        found.append((to_frame(boxes, frame, size), scores))
        samples.append(sample)

    def score(kept: Indices) -> Metrics:
        return detection_metrics([found[i] for i in kept], _part(splits["val"], samples, kept))

    return _scores(score, range(len(samples)), bench)


SCORERS: dict[str, Callable[[Mapping[str, Split[Any]], Bench], Scores]] = {
    "pose": score_pose,
    "parsing": score_parsing,
    "attributes": score_attributes,
    "reid": score_reid,
    "detection": score_detection,
}


def _scores(
    score: Callable[[Indices], Metrics], units: Sequence[Hashable], bench: Bench, images: dict[str, int] | None = None
) -> Scores:
    """Score all samples, and parts of them for the errors; ``units`` are as for ``draw_groups``, one per sample."""
    errors = standard_errors(score, units) if bench.errors else {}
    return Scores(score(np.arange(len(units))), errors, images or {"val": len(units)})


def _part(split: Split[Any], samples: Sequence[Sample[Any]], kept: Indices) -> Split[Any]:
    return replace(split, samples=tuple(samples[i] for i in kept))


def _read_masked(sample: Sample[Path], size: tuple[int, int], classes: Sequence[str]) -> tuple[Pixels, Pixels]:
    return read_crop(sample, size), read_mask(sample, classes)


def _read_frame(sample: Sample[People], size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    pixels = np.asarray(open_sample(sample))
    height, width = pixels.shape[:2]
    return letterbox(pixels, size), (height, width)
