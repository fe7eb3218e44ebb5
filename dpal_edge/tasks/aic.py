"""AI Challenger's human keypoints, as they were published and as mmpose's conversion to COCO's format has them."""

from pathlib import Path

import numpy as np

from dpal_edge.errors import DataError
from dpal_edge.tasks.coco import CocoImage, Record, entries, noted, read_json
from dpal_edge.tasks.image import read_size
from dpal_edge.tasks.image_files import ImageFiles
from dpal_edge.tasks.pose import Pose, finish_people, read_people, read_person
from dpal_edge.tasks.sample import Problems, Sample, Split

AIC_JOINTS = (
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "right_hip",
    "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "head_top", "neck",
)  # fmt: skip
AIC_LAYOUT = (
    "the AI Challenger layout: ai_challenger_keypoint_*/ with keypoint_*_images_*/ and, beside these, "
    "keypoint_*_annotations_*.json, or else annotations/aic_{split}.json"
)
AIC_MARKERS = ("annotations/aic_*.json", "keypoint_*_annotations_*.json", "*/keypoint_*_annotations_*.json")
_PARTS = {"train": "train", "val": "validation"}
_LABELLED = (1, 2)  # seen, hidden; 3 is outside the image or not to be guessed


def read_aic(folder: Path, split: str) -> Split[Pose]:
    """Read ``split`` (train or val) of AI Challenger; a sample is one person in its box, clipped to the image.

    The area of a person is 0.53 of the box's, whatever a file says. People without a labelled joint are left out.

    Raises:
        DataError: a file is missing or not of this layout, or too many annotations are bad.
        BackendUnavailable: Pillow, to read the sizes of images, is not installed; the conversion tells them.
    """
    expected, part = AIC_LAYOUT.format(split=split), _PARTS[split]
    converted = folder / "annotations" / f"aic_{split}.json"
    original = _find(folder, f"keypoint_{part}_annotations_*.json")
    images = _find(folder, f"keypoint_{part}_images_*/")
    if images is None:
        raise DataError(f"{folder}: no folder keypoint_{part}_images_* in it; expected {expected}")
    if original is None or converted.exists():
        return read_people(converted, expected, images.joinpath, names=AIC_JOINTS, protocol="aic", use_area=False)
    return _read_original(original, images, expected)


def _find(folder: Path, pattern: str) -> Path | None:
    """Return what is called so, in the folder of one part or in that of both; a folder where a slash ends the pattern.

    Archives may lie beside what was unpacked from them.
    """
    found = (path for parent in ("", "*/") for path in sorted(folder.glob(parent + pattern)))
    return next((path for path in found if path.is_dir() == pattern.endswith("/")), None)


def _read_original(path: Path, parent: Path, expected: str) -> Split[Pose]:
    records = read_json(path, expected)
    if not isinstance(records, list):
        raise DataError(f"{path}: not a list of images; expected {expected}")
    problems, samples, files = Problems(path), list[Sample[Pose]](), ImageFiles()
    names = set[str]()
    for number, (where, record) in enumerate(entries("image", records)):
        with noted(problems, where, "image_id, human_annotations and keypoint_annotations"):
            name, people = str(record["image_id"]), dict(record["keypoint_annotations"])
            image = parent / f"{name}.jpg"
            if name in names:
                raise DataError(f"{name} is listed before; expected each image once")
            if image not in files:
                raise DataError(f"no image {image}")
            names.add(name)
            height, width = read_size(image)
            known = CocoImage(image, width, height, there=True, record={})
            for human, joints in people.items():
                with noted(problems, f"image {name}, {human}", f"a box and {len(AIC_JOINTS)} times x, y and a flag"):
                    person = _as_coco(joints, record["human_annotations"][human])
                    sample = read_person(
                        {**person, "id": len(samples), "image_id": number},
                        len(AIC_JOINTS),
                        {number: known},
                        use_area=False,
                    )
                    if sample.target.labelled.any():
                        samples.append(sample)
    return finish_people(tuple(samples), AIC_JOINTS, "aic", problems, expected)


def _as_coco(joints: list[float], edges: list[float]) -> Record:
    """Return joints, of whose flags 1 and 2 are labelled, and a box's left, top, right and bottom as COCO has them."""
    rows = np.array(joints, np.float64).reshape(-1, 3)
    rows[:, 2] = np.isin(rows[:, 2], _LABELLED)
    left, top, right, bottom = edges
    return {"keypoints": rows.ravel(), "bbox": (left, top, right - left, bottom - top)}
