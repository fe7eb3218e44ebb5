"""MPII Human Pose, in the json that scoring on its validation part made common."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import Record, clip_box, entries, noted, read_json, reason
from dpal_edge.tasks.image import read_size
from dpal_edge.tasks.image_files import ImageFiles
from dpal_edge.tasks.matlab import read_mat
from dpal_edge.tasks.pose import BOX_AREA, HALF, Pose, check_places, finish_people
from dpal_edge.tasks.sample import Problems, Sample, Split, require

MPII_JOINTS = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax", "upper_neck",
    "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist",
)  # fmt: skip
MPII_LAYOUT = (
    "the MPII layout: annotations/mpii_{split}.json (or in annot/, or annot/train.json and annot/valid.json), a list "
    "of image, center, scale, joints and joints_vis; the images in images/; to score, the boxes of heads in "
    "mpii_gt_val.mat (or gt_valid.mat) beside it"
)
_FILES = {
    "train": ("annotations/mpii_train.json", "annot/mpii_train.json", "annot/train.json"),
    "val": ("annotations/mpii_val.json", "annot/mpii_val.json", "annot/valid.json"),
}
_HEADS = ("mpii_gt_val.mat", "gt_valid.mat")
_PIXELS = 200.0  # side of the box of a person of scale 1
_LOWER = 15.0  # pixels at scale 1 that the box's middle is below the annotated centre, so that feet are not cut
_HEAD = 0.6  # of the diagonal of a head's box: the head's size


def read_mpii(folder: Path, split: str) -> Split[Pose]:
    """Read ``split`` (train or val) of MPII; a sample is one person in the square box that centre and scale tell.

    MATLAB's pixels, which count from 1, become pixels from 0; boxes are clipped to the image. People without a
    labelled joint are left out. Head sizes are known for val where the file with the heads' boxes is there, or where a
    person has a ``headbox`` (left, top, right, bottom).

    Raises:
        DataError: a file is missing or not of this layout, or too many annotations are bad.
        BackendUnavailable: SciPy, to read the heads' boxes, or Pillow, to read the images' sizes, is not installed.
    """
    expected = MPII_LAYOUT.format(split=split)
    paths = [folder / name for name in _FILES[split]]
    path = next((path for path in paths if path.exists()), paths[0])
    people = read_json(path, expected)
    if not isinstance(people, list):
        raise DataError(f"{path}: not a list of people; expected {expected}")
    heads = _read_heads(path.parent, len(people)) if split == "val" else np.full(len(people), math.nan)
    images = _Images(require(folder / "images", expected))
    problems, samples = Problems(path), list[Sample[Pose]]()
    wanted = f"image, center, scale, {len(MPII_JOINTS)} joints and joints_vis"
    for number, (where, record) in enumerate(entries("person", people)):
        with noted(problems, where, wanted), np.errstate(over="ignore"):
            sample = _read_person(number, record, images, float(heads[number]))
            if sample.target.labelled.any():
                samples.append(sample)
    return finish_people(tuple(samples), MPII_JOINTS, "mpii", problems, expected)


class _Images:
    """The images by their name: a number for each, and the size, which the annotations do not tell."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ImageFiles()
        self._known: dict[str, tuple[int, Path, tuple[int, int]]] = {}

    def find(self, name: str) -> tuple[int, Path, tuple[int, int]]:
        """Return number, path, and height and width.

        Raises:
            DataError: it is not there, or not an image.
        """
        if name not in self._known:
            path = self._folder / name
            if path not in self._files:
                raise DataError(f"no image {path}")
            self._known[name] = len(self._known), path, read_size(path)
        return self._known[name]


def _read_heads(folder: Path, people: int) -> NDArray[np.float64]:
    """Return the size of each head (people,) in pixels; NaN if no file tells."""
    path = next((folder / name for name in _HEADS if (folder / name).exists()), None)
    if path is None:
        return np.full(people, math.nan)
    expected = f"headboxes_src, 2 x 2 x {people} for the people of the json beside it"
    try:
        boxes = np.asarray(read_mat(path, expected)["headboxes_src"], float).reshape(2, 2, people)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the boxes of heads ({reason(error)}); expected {expected}") from error
    sizes: NDArray[np.float64] = _HEAD * np.linalg.norm(boxes[1] - boxes[0], axis=0)
    return sizes


def _read_person(number: int, record: Record, images: _Images, head: float) -> Sample[Pose]:
    """Turn a person of the list into a sample.

    Raises:
        DataError: a value means nothing. Others: it is not of the format.
    """
    joints = np.array(record["joints"], np.float32).reshape(len(MPII_JOINTS), 2) - 1 + HALF
    labelled = np.array(record["joints_vis"], float).reshape(len(MPII_JOINTS)) > 0
    scale, (x, y) = float(record["scale"]), (float(value) for value in record["center"])
    if "headbox" in record:
        corners = np.array(record["headbox"], float).reshape(2, 2)
        head = _HEAD * float(np.linalg.norm(corners[1] - corners[0]))
    if not np.isfinite(joints).all():
        raise DataError("a joint is not finite; correct it or leave it out")
    if not 0 < scale < math.inf:
        raise DataError(f"its scale is {scale:g}; expected its height over {_PIXELS:g} pixels")
    image_id, path, (height, width) = images.find(str(record["image"]))
    check_places(joints[labelled], (width, height))
    side = _PIXELS * scale
    left, top = x - 1 - side / 2, y - 1 + _LOWER * scale - side / 2
    box = clip_box((left, top, side, side), width, height)
    return Sample(path, Pose(number, image_id, joints, labelled, BOX_AREA * side**2, head_size=head), box)
