"""Body pose: people in COCO's json, PCK of the torso and of the head, and precision by object keypoint similarity."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import (
    CocoFile,
    CocoImage,
    Record,
    clip_box,
    entries,
    find_coco,
    index_images,
    noted,
    read_box,
    read_coco,
)
from dpal_edge.tasks.oks import oks_precision, oks_sigmas
from dpal_edge.tasks.sample import Box, Problems, Sample, Split

Joints = NDArray[np.float32]  # (..., K, 2): x, y in pixels of the image, whose first pixel is from 0 to 1
HALF = 0.5  # data sets number the pixel that a joint is in; its middle is that much further on
BOX_AREA = 0.53  # of a person, as a share of the box, where the area is not known or a benchmark does not use it
COCO_KEYPOINTS = "annotations/person_keypoints_{split}[2017].json and the images in {split}[2017]/"
_TORSO = ("left_shoulder", "right_hip")
_MIDDLE = ("pelvis", "thorax")  # MPII leaves them out of the mean
# From and below which crowd index of an image: CrowdPose's measure of how much of other people is in a person's box.
_CROWDS = {"easy": (0.0, 0.1), "medium": (0.1, 0.8), "hard": (0.8, math.inf)}


@dataclass(frozen=True, eq=False)
class Pose:
    """What is known about one person's joints."""

    id: int  # of the annotation
    image_id: int
    joints: Joints  # (K, 2); what stands where nothing is labelled means nothing
    labelled: NDArray[np.bool_]  # (K,), also those that are hidden in the image
    area: float  # of the person in pixels, for the similarity
    crowd_index: float = math.nan  # of the image, 0..1; CrowdPose's
    head_size: float = math.nan  # pixels: 0.6 of the diagonal of the head's box; MPII's


def read_coco_keypoints(folder: Path, split: str) -> Split[Pose]:
    """Read ``split`` (train or val) of a folder with COCO's keypoint annotations; a sample is one person in its box.

    The files are ``annotations/person_keypoints_SPLIT.json`` and the images ``SPLIT/`` (or ``images/SPLIT/``), or both
    with COCO's year as in ``val2017``. The joints are those that the file names. Boxes are clipped to the image. Crowds
    and people without a labelled joint are left out.

    Raises:
        DataError: a file is missing or not of this layout, or too many annotations are bad.
    """
    expected = f"the COCO layout: {COCO_KEYPOINTS.format(split=split)}"
    path, images = find_coco(folder, split, "person_keypoints", expected)
    return read_people(path, expected, images.joinpath)


def read_people(
    path: Path,
    expected: str,
    locate: Callable[[str], Path],
    *,
    names: Sequence[str] = (),
    protocol: str = "coco",
    use_area: bool = True,
) -> Split[Pose]:
    """Read the people in a file of COCO's format; a sample is one person in its box, clipped to the image.

    Crowds and people without a labelled joint are left out.

    Args:
        path: the file.
        expected: the layout, for errors.
        locate: where an image lies, by its ``file_name``.
        names: of the joints; those in the file by default.
        protocol: of the split.
        use_area: whether the area is the annotated one, rather than 0.53 of the box's.

    Raises:
        DataError: missing, not of this format, without people, or too many annotations are bad.
    """
    file = read_coco(path, expected)
    people, named = person_categories(file.categories, named=not names)
    if not people:
        raise DataError(f"{path}: not keypoint annotations, no category names its keypoints; expected {expected}")
    own, names = not names, tuple(names) or named
    problems, samples = Problems(path), dict[int, Sample[Pose]]()
    images = index_images(file, locate, problems)
    wanted = f"id, bbox, {len(names)} times x, y and visibility, and the id of an image"
    for where, record in entries("annotation", file.annotations):
        with noted(problems, where, wanted), np.errstate(over="ignore"):
            if file.category(record) not in people or record.get("iscrowd"):
                continue
            sample = read_person(record, len(names), images, use_area=use_area)
            if sample.target.id in samples:
                raise DataError("another has the same id; expected one per person")
            if sample.target.labelled.any():
                samples[sample.target.id] = sample
    split = finish_people(tuple(samples.values()), names, protocol, problems, expected)
    return replace(split, problems=split.problems + (_left_out(file, people) if own else ()))


def finish_people(
    samples: tuple[Sample[Pose], ...], names: tuple[str, ...], protocol: str, problems: Problems, expected: str
) -> Split[Pose]:
    """Return the people that were read as a split.

    Raises:
        DataError: too many are bad, or there are none; ``expected`` says which layout was read.
    """
    found = problems.finish(len(samples))
    if not samples:
        raise DataError(f"{problems.source}: no person with a labelled joint; expected {expected}")
    return Split(samples, names, protocol, found)


def pose_metrics(predicted: Joints, scores: NDArray[np.floating], split: Split[Pose]) -> dict[str, float]:
    """Score joints that were found in the annotated boxes, with the metrics of the split's protocol.

    Args:
        predicted: (n, K, 2) pixels, of the n samples of ``split``.
        scores: (n,) confidence of each prediction; only their order matters.

    Returns:
        0..1, the most important first; NaN where nobody is annotated so that it is defined:

        * ``PCKh@0.5`` and ``PCKh@0.1`` for the protocol ``mpii``; NaN where no head's box is known;
        * for others ``OKS_AP``, ``OKS_AP50``, ``OKS_AP75`` and ``OKS_AR`` as oks_ap gives them, unless the data are
          one's own with joints whose deviation is not known; for ``crowdpose`` also ``OKS_AP_easy`` (images with a
          crowd index below 0.1), ``OKS_AP_medium`` and ``OKS_AP_hard`` (from 0.8);
        * ``PCK@0.2`` of the torso where both of its joints exist.

    Raises:
        DataError: the joints are such that none of these is defined.
        BackendUnavailable: the library that computes OKS AP is not installed.
    """
    names, poses = split.labels, [sample.target for sample in split.samples]
    metrics = {}
    if split.protocol == "mpii":
        metrics = {f"PCKh@{ratio}": pckh(predicted, poses, names, ratio) for ratio in (0.5, 0.1)}
    elif split.protocol != "coco" or _have_deviations(names):
        metrics = {f"OKS_{name}": value for name, value in _oks_scores(predicted, scores, split).items()}
    if set(_TORSO) <= set(names):
        metrics["PCK@0.2"] = _pck(predicted, poses, names, 0.2)
    if not metrics:
        raise DataError(
            f"no metric is defined for the joints {', '.join(names)}: OKS AP needs COCO's names for all, PCK needs "
            f"{' and '.join(_TORSO)}; rename them"
        )
    return metrics


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
    share = _pck(predicted, poses, names, ratio)
    if math.isnan(share):
        raise DataError(f"none of {len(poses)} people has both {_TORSO[0]} and {_TORSO[1]} labelled; PCK is undefined")
    return share


def pckh(predicted: Joints, poses: Sequence[Pose], names: Sequence[str], ratio: float = 0.5) -> float:
    """Return the share of joints found within ``ratio`` of the head, 0..1: PCKh@ratio, as MPII's evaluation counts.

    Every labelled joint but pelvis and thorax counts once, of all people whose head size is known; NaN if there are
    none.

    Args:
        predicted: (n, K, 2), of the n ``poses``.
    """
    sizes = np.array([pose.head_size for pose in poses])
    scored = np.array([name not in _MIDDLE for name in names])
    counted = np.stack([pose.labelled for pose in poses]) & scored & np.isfinite(sizes)[:, None]
    return _share_found(predicted, poses, counted, ratio * sizes)


def oks_ap(
    predicted: Joints, scores: NDArray[np.floating], poses: Sequence[Pose], names: Sequence[str], protocol: str = ""
) -> dict[str, float]:
    """Score predicted joints with COCO's average precision by object keypoint similarity.

    Crowds and people without labelled joints are not there, unlike in COCO's evaluation of detected boxes.

    Args:
        predicted: (n, K, 2), of the n ``poses``.
        scores: (n,) confidence of each prediction; only their order matters.
        protocol: whose deviations of annotators hold.

    Returns:
        ``AP``, ``AP50``, ``AP75`` and ``AR``, 0..1.

    Raises:
        BackendUnavailable: the library that computes it is not installed.
        DataError: as oks_sigmas.
    """
    sigmas = oks_sigmas(names, protocol)
    people = [(pose, _extent(pose), False) for pose in poses]
    found = [(pose.image_id, *each) for pose, *each in zip(poses, predicted, scores.tolist(), strict=True)]
    return oks_precision(*coco_documents({pose.image_id for pose in poses}, people, found), sigmas)


def coco_documents(
    images: Collection[int], people: Sequence[tuple[Pose, Box, bool]], found: Sequence[tuple[int, Joints, float]]
) -> tuple[dict[str, Any], list[Record]]:
    """Return annotated and found people as documents in COCO's format, for oks_precision.

    Ids are numbered anew: a file's own may be any numbers, and the library takes only some. COCO numbers the pixel that
    a joint is in.

    Args:
        images: ids of those that are scored.
        people: what is annotated on them: the person, the box (left, top, right, bottom), and whether it is a crowd.
        found: image, joints (K, 2) and confidence of each.
    """
    numbers = {image: number for number, image in enumerate(sorted(images), start=1)}
    annotations = [
        {
            "id": number,
            "image_id": numbers[pose.image_id],
            "category_id": 1,
            "iscrowd": int(crowd),
            "area": pose.area,
            "bbox": [left, top, right - left, bottom - top],
            "num_keypoints": int(pose.labelled.sum()),
            "keypoints": _triples(np.where(pose.labelled[:, None], pose.joints - HALF, 0), 2 * pose.labelled),
        }
        for number, (pose, (left, top, right, bottom), crowd) in enumerate(people, start=1)
    ]
    results = [
        {"image_id": numbers[image], "category_id": 1, "keypoints": _triples(joints - HALF, 1), "score": score}
        for image, joints, score in found
    ]
    truth = {
        "images": [{"id": number} for number in numbers.values()],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }
    return truth, results


def _triples(joints: NDArray[np.floating], visibility: Any) -> list[float]:
    """Flatten joints (K, 2) to x, y, visibility as COCO writes them."""
    column = np.broadcast_to(visibility, len(joints))[:, None]
    flat: list[float] = np.concatenate([joints, column], axis=1).ravel().tolist()
    return flat


def person_categories(categories: list[Any], *, named: bool) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the ids and joints of the categories of people: ``person`` or else the first, and all of the same joints.

    Args:
        named: whether a category has to name its keypoints.
    """
    found = []
    for category in (c for c in categories if isinstance(c, dict) and isinstance(c.get("id"), int)):
        names, person = category.get("keypoints"), category.get("name") == "person"
        if (isinstance(names, list) and names) or (not named and person):
            joints = tuple(str(name) for name in names) if isinstance(names, list) else ()
            found.append((not person, category["id"], joints))
    if not found:
        return frozenset(), ()
    joints = min(found, key=lambda one: one[0])[2]
    return frozenset(number for _, number, names in found if names == joints), joints


def _left_out(file: CocoFile, people: frozenset[int]) -> tuple[str, ...]:
    """Name categories with keypoints of their own that are not read, and how many annotations they have."""
    found = []
    for category in (c for c in file.categories if isinstance(c, dict) and c.get("keypoints") and "id" in c):
        records = [r for r in file.annotations if isinstance(r, dict) and r.get("category_id") == category["id"]]
        if records and category["id"] not in people:
            found.append(
                f"{file.path}: category {category.get('name')!r} has other keypoints than the one that is read; its "
                f"{len(records)} annotations are left out"
            )
    return tuple(found)


def read_person(record: Record, joints: int, images: Mapping[int, CocoImage], *, use_area: bool = True) -> Sample[Pose]:
    """Turn an annotation of so many joints into a sample.

    Raises:
        DataError: a value means nothing. Others, which noted knows: it is not of the format.
    """
    image = images[int(record["image_id"])]
    rows = np.array(record["keypoints"], np.float32).reshape(joints, 3)
    box = read_box(record["bbox"])
    area = float(record.get("area") or 0) if use_area else 0.0
    area = area or BOX_AREA * box[2] * box[3]
    if not (np.isfinite(rows).all() and math.isfinite(area)):
        raise DataError("a keypoint or the area is not finite; correct it or leave it out")
    if area < 0:
        raise DataError(f"its area is {area:g}; expected pixels")
    places, labelled, size = rows[:, :2] + HALF, rows[:, 2] > 0, (image.width, image.height)
    check_places(places[labelled], size)
    clipped = clip_box(box, image.width, image.height)
    if not image.there:
        raise DataError(f"no image {image.path}; expected the images of the file there")
    crowd = float(image.record.get("crowdIndex", math.nan))
    pose = Pose(int(record["id"]), int(record["image_id"]), places, labelled, area, crowd)
    return Sample(image.path, pose, clipped, image.size)


def check_places(joints: Joints, size: tuple[float, float]) -> None:
    """Refuse joints (n, 2) that lie farther outside an image (width, height) than it is large.

    Raises:
        DataError: one does.
    """
    if len(far := joints[((joints < np.negative(size)) | (joints > np.multiply(size, 2))).any(1)]):
        (x, y), (width, height) = far[0].tolist(), size
        raise DataError(f"its joint at {x:g}, {y:g} is far outside an image of {width:g}x{height:g}; correct it")


def _have_deviations(names: Sequence[str]) -> bool:
    try:
        oks_sigmas(names)
    except DataError:
        return False
    return True


def _oks_scores(predicted: Joints, scores: NDArray[np.floating], split: Split[Pose]) -> dict[str, float]:
    """Return oks_ap, and for CrowdPose the precision on images of each crowdedness."""
    poses = [sample.target for sample in split.samples]
    found = oks_ap(predicted, scores, poses, split.labels, split.protocol)
    if split.protocol == "crowdpose":
        index = np.array([pose.crowd_index for pose in poses])
        for name, (low, high) in _CROWDS.items():
            part = np.flatnonzero((low <= index) & (index < high))
            chosen = predicted[part], scores[part], [poses[i] for i in part], split.labels, split.protocol
            found[f"AP_{name}"] = oks_ap(*chosen)["AP"] if len(part) else math.nan
    return found


def _pck(predicted: Joints, poses: Sequence[Pose], names: Sequence[str], ratio: float) -> float:
    """Return what pck does; NaN where it is undefined."""
    truth = np.stack([pose.joints for pose in poses])
    labelled = np.stack([pose.labelled for pose in poses])
    one, other = (list(names).index(name) for name in _TORSO)
    torso = np.linalg.norm(truth[:, one] - truth[:, other], axis=-1)
    return _share_found(predicted, poses, labelled & (labelled[:, one] & labelled[:, other])[:, None], ratio * torso)


def _share_found(
    predicted: Joints, poses: Sequence[Pose], counted: NDArray[np.bool_], reach: NDArray[np.floating]
) -> float:
    """Return the share of ``counted`` joints (n, K) within ``reach`` pixels (n,) of the truth; NaN if none counts."""
    if not counted.any():
        return math.nan
    distance = np.linalg.norm(predicted - np.stack([pose.joints for pose in poses]), axis=-1)
    return float((distance <= reach[:, None])[counted].mean())


def _extent(pose: Pose) -> Box:
    """Return the box of a person's labelled joints."""
    labelled = pose.joints[pose.labelled]
    return *labelled.min(0).tolist(), *labelled.max(0).tolist()
