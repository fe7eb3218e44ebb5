"""Tiny pose data in the published layouts, and random people with joints found near theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from dpal_edge.tasks.pose import Pose
from dpal_edge.tasks.pose_layouts import COCO_JOINTS
from dpal_edge.tasks.sample import Sample, Split
from tests.tasks.layouts import save_image

FRAME = (48, 64)  # height, width
BOX = [6, 4, 20, 40]  # of everybody: left, top, width, height
PEOPLE = 4  # in each file, one per image
AIC_FOLDERS = {
    "train": "ai_challenger_keypoint_train_20170902/keypoint_train_images_20170902",
    "val": "ai_challenger_keypoint_validation_20170911/keypoint_validation_images_20170911",
}
DETECTED = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"


def joints_of(number: int, count: int) -> np.ndarray:
    """The pixels (K, 2) of a person's joints: down a line, each person a pixel further to the right."""
    return np.column_stack([np.full(count, 8 + number), 5 + np.arange(count)]).astype(float)


def write_aic(folder: Path, split: str = "val") -> Path:
    names = [f"{number:040x}.jpg" for number in range(PEOPLE)]
    document = _document(folder / AIC_FOLDERS[split], names, 14)
    for annotation in document["annotations"]:
        annotation["area"] = 1.0  # which its evaluation does not use
    return _write(folder, f"annotations/aic_{split}.json", document)


def write_aic_original(folder: Path, split: str = "val") -> Path:
    """As it was published: a folder for each part, corners of boxes, and flags 1 visible, 2 hidden, 3 not labelled."""
    images = Path(AIC_FOLDERS[split])
    records = []
    for number in range(PEOPLE):
        name = f"{number:040x}"
        save_image(folder / images / f"{name}.jpg", np.full((*FRAME, 3), 90))
        rows = np.column_stack([joints_of(number, 14), [{1: 2, 2: 3}.get(number, 1), *[1] * 13]])
        box = [BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]]
        record = {"image_id": name, "url": "", "human_annotations": {"human1": box}}
        records.append({**record, "keypoint_annotations": {"human1": rows.astype(int).ravel().tolist()}})
    name, date = {"train": ("train", 20170909), "val": ("validation", 20170911)}[split]
    return _write(folder, f"{images.parent}/keypoint_{name}_annotations_{date}.json", records)


def write_crowdpose(folder: Path, part: str = "test", pattern: str = "crowdpose_{}.json") -> Path:
    """Crowd indices 0, 0.1, 0.5 and 0.8; no areas."""
    document = _document(folder / "images", [f"{part}{number}.jpg" for number in range(PEOPLE)], 14)
    for image, index in zip(document["images"], (0.0, 0.1, 0.5, 0.8), strict=True):
        image["crowdIndex"] = index
    for annotation in document["annotations"]:
        del annotation["area"]
    return _write(folder, pattern.format(part), document)


def write_ochuman(folder: Path, part: str = "test") -> Path:
    document = _document(folder / "images", [f"{part}{number:06d}.jpg" for number in range(PEOPLE)], 17)
    return _write(folder, f"ochuman_coco_format_{part}_range_0.00_1.00.json", document)


def write_humanart(folder: Path, split: str = "val", *, with_coco: bool = False) -> Path:
    """Files are named from the folder above, which is also where COCO lies; categories name no joints."""
    document = _document(folder.parent, [f"HumanArt/images/cartoon/{split}{n}.jpg" for n in range(PEOPLE)], 17)
    document["categories"] = [{"id": 1, "name": "person"}]
    part = {"train": "training", "val": "validation"}[split]
    if with_coco:
        more = _document(folder.parent, [f"coco/train2017/{n}.jpg" for n in range(PEOPLE)], 17, first=100)
        for name in ("images", "annotations"):
            document[name] += more[name]
    return _write(folder, f"annotations/{part}_humanart{'_coco' if with_coco else ''}.json", document)


def write_mpii(folder: Path, split: str = "val", *, name: str = "annotations/mpii_{}.json", heads: bool = True) -> Path:
    """Pixels from 1; boxes of 40 pixels; heads of 6 x 8 pixels; of the last person, no joint is visible."""
    people = []
    for number in range(PEOPLE):
        save_image(folder / "images" / f"{number // 2:09d}.jpg", np.full((*FRAME, 3), 90))
        visible = [int(number < PEOPLE - 1)] * 16
        joints = (joints_of(number, 16) + 1).tolist()
        person = {"image": f"{number // 2:09d}.jpg", "center": [17.0, 22.0], "scale": 0.2, "joints": joints}
        people.append({**person, "joints_vis": visible})
    _write(folder, name.format(split), people)
    if heads:
        boxes = np.zeros((2, 2, PEOPLE))
        boxes[0, :, :], boxes[1, 0, :], boxes[1, 1, :] = 10, 16, 18
        savemat((folder / name).parent / "mpii_gt_val.mat", {"headboxes_src": boxes})
    return folder


def edit_json(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def random_people(joints: int, count: int = 200, seed: int = 5) -> tuple[np.ndarray, np.ndarray, list[Pose]]:
    """Joints found near those of people, their scores (the higher the nearer), and the people, four in an image."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 200, (count, joints, 2))
    areas = rng.uniform(500, 20_000, count)
    spread = np.sqrt(areas) * rng.uniform(0, 0.25, count)
    found = truth + rng.normal(0, 1, truth.shape) * spread[:, None, None]
    scores = 1 / (1 + spread) + rng.uniform(0, 0.05, count)
    labelled = rng.random((count, joints)) < 0.7
    labelled[:, 0] = True
    crowds = rng.uniform(0, 1, count // 4)
    people = [
        Pose(i + 1, i // 4 + 1, truth[i].astype(np.float32), labelled[i], float(areas[i]), float(crowds[i // 4]))
        for i in range(count)
    ]
    return found.astype(np.float32), scores, people


def pose_split(people: list[Pose], names: tuple[str, ...], protocol: str) -> Split[Pose]:
    return Split(tuple(Sample(Path(f"{pose.image_id}.jpg"), pose, (0, 0, 9, 9)) for pose in people), names, protocol)


def _document(parent: Path, names: list[str], joints: int, first: int = 0) -> dict[str, Any]:
    """One person in each image; the second is hidden at the first joint, which the third does not have."""
    images, annotations = [], []
    for number, name in enumerate(names):
        save_image(parent / name, np.full((*FRAME, 3), 90))
        images.append({"id": first + number, "file_name": name, "width": FRAME[1], "height": FRAME[0]})
        seen = [{1: 1, 2: 0}.get(number, 2), *[2] * (joints - 1)]
        rows = np.column_stack([joints_of(number, joints), seen])
        person = {"id": first + 10 + number, "image_id": first + number, "category_id": 1, "iscrowd": 0}
        measures = {"bbox": BOX, "area": 300.0, "num_keypoints": int(np.count_nonzero(seen))}
        annotations.append({**person, **measures, "keypoints": rows.ravel().tolist()})
    return {"images": images, "annotations": annotations, "categories": [_person_category(joints)]}


def _write(folder: Path, name: str, document: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return folder


def write_detected_people(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """COCO's val with random people, a crowd, and one without joints in each image; boxes of a detector around them.

    Returns:
        Joints found in each box, and their confidence.
    """
    found, scores, people = random_people(17, count=80)
    boxes, annotations = [], []
    for pose, joints, score in zip(people, found, scores, strict=True):
        left, top = joints.min(0)
        right, bottom = joints.max(0)
        box = [float(value) for value in (left, top, right - left, bottom - top)]
        boxes.append({"image_id": pose.image_id, "category_id": 1, "bbox": box, "score": float(score)})
        rows = np.column_stack([pose.joints * pose.labelled[:, None], 2 * pose.labelled])
        person = {"id": pose.id, "image_id": pose.image_id, "category_id": 1, "iscrowd": 0, "area": pose.area}
        count = int(pose.labelled.sum())
        annotations.append({**person, "bbox": box, "num_keypoints": count, "keypoints": rows.ravel().tolist()})
    images = sorted({pose.image_id for pose in people})
    for image in images:
        nobody = {"image_id": image, "category_id": 1, "area": 900.0, "num_keypoints": 0, "keypoints": [0] * 51}
        annotations.append({**nobody, "id": 1000 + image, "iscrowd": 0, "bbox": [300, 300, 30, 30]})
        annotations.append({**nobody, "id": 2000 + image, "iscrowd": 1, "bbox": [400, 300, 60, 30]})
        save_image(folder / "val2017" / f"{image:012d}.png", np.zeros((4, 4, 3)))
    records = [{"id": i, "file_name": f"{i:012d}.png", "width": 500, "height": 400} for i in images]
    document = {"images": records, "annotations": annotations, "categories": [_person_category(17)]}
    _write(folder, "annotations/person_keypoints_val2017.json", document)
    rng = np.random.default_rng(1)
    kinds = rng.integers(0, 3, len(boxes))  # of a second box in each image: the same person, nobody, or in the crowd
    again = found + np.array([[0, 0], [150, 100], [350, 250]])[kinds][:, None]
    _write(folder, DETECTED, boxes + [{**box, "score": 0.9 * box["score"]} for box in boxes])
    confidence = np.concatenate([np.full((len(found), 17), 0.8), rng.uniform(0.1, 1, (len(found), 17))])
    return np.concatenate([found, again]).astype(np.float32), confidence


def _person_category(joints: int) -> dict[str, Any]:
    names = COCO_JOINTS if joints == 17 else [f"joint {i}" for i in range(joints)]
    return {"id": 1, "name": "person", "keypoints": list(names)}
