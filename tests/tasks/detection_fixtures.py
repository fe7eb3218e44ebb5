"""Tiny detection data in the published layouts, and random crowds with boxes that find some of them."""

import json
from pathlib import Path

import numpy as np

from dpal_edge.tasks.detection import People
from dpal_edge.tasks.sample import Sample, Split
from tests.tasks.layouts import save_image

FRAME = (48, 64)  # height, width


def write_coco_boxes(folder: Path, split: str = "val", *, frames: int = 4, year: str = "2017") -> Path:
    """Two people in each frame but the last; the second reaches beyond it. A crowd in the first, and a dog."""
    images, annotations = [], []
    for number in range(frames):
        name = f"{number:012d}.png"
        save_image(folder / f"{split}{year}" / name, np.full((*FRAME, 3), 90))
        images.append({"id": 100 + number, "file_name": name, "width": FRAME[1], "height": FRAME[0]})
        for place, box in enumerate(([4, 4, 10, 30], [50, 10, 20, 30])[: 2 * (number < frames - 1)]):
            annotations.append(_coco_box(10 * number + place, 100 + number, box))
    annotations.append({**_coco_box(900, 100, [20, 0, 20, 20]), "iscrowd": 1})
    annotations.append({**_coco_box(901, 100, [1, 1, 5, 5]), "category_id": 18})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    }
    return _write_json(folder, folder / "annotations" / f"instances_{split}{year}.json", document)


def write_crowdhuman(folder: Path, split: str = "val", *, frames: int = 4) -> Path:
    """A person half outside, one who is half hidden, one to ignore and a mask in each frame but the last."""
    lines = []
    for number in range(frames):
        name = f"{number},{split}"
        save_image(folder / "Images" / f"{name}.jpg", np.full((*FRAME, 3), 90))
        people = [
            _crowdhuman_box([-5, 8, 20, 30], [0, 8, 15, 30]),
            _crowdhuman_box([30, 5, 10, 40], [30, 5, 10, 20]),
            {**_crowdhuman_box([45, 5, 10, 20], [45, 5, 10, 20]), "extra": {"box_id": 2, "occ": 0, "ignore": 1}},
            {**_crowdhuman_box([50, 30, 30, 30], [50, 30, 14, 18]), "tag": "mask"},
        ]
        lines.append(json.dumps({"ID": name, "gtboxes": people if number < frames - 1 else []}))
    (folder / f"annotation_{split}.odgt").write_text("\n".join(lines) + "\n")
    return folder


def write_citypersons(folder: Path, split: str = "val", *, frames: int = 4) -> Path:
    """A pedestrian who leaves the frame, a hidden one, a rider and a group in each frame but the last; two cities."""
    for number in range(frames):
        city = ("aachen", "bochum")[number % 2]
        name = f"{city}_{number:06d}_000019"
        save_image(folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", np.full((*FRAME, 3), 90))
        people = [
            {"instanceId": 24000, "bbox": [-4, 8, 16, 39], "bboxVis": [0, 8, 12, 39], "label": "pedestrian"},
            {"instanceId": 24001, "bbox": [20, 8, 10, 24], "bboxVis": [0, 0, 0, 0], "label": "pedestrian"},
            {"instanceId": 25000, "bbox": [40, 8, 10, 24], "bboxVis": [40, 8, 10, 24], "label": "rider"},
            {"instanceId": 24, "bbox": [50, 8, 10, 10], "bboxVis": [0, 0, 0, 0], "label": "person group"},
        ]
        document = {"imgHeight": FRAME[0], "imgWidth": FRAME[1], "objects": people if number < frames - 1 else []}
        _write_json(folder, folder / "gtBboxCityPersons" / split / city / f"{name}_gtBboxCityPersons.json", document)
    return folder


def random_crowds(
    frames: int = 60, seed: int = 3
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Boxes with scores, all different; people with what to ignore; and the shares of people that can be seen."""
    rng = np.random.default_rng(seed)
    predictions, truths, visible = [], [], []
    for _ in range(frames):
        count = rng.integers(0, 9)
        corners = rng.uniform(30, 150, (count, 2))
        heights = rng.uniform(30, 120, count)
        people = np.column_stack([corners, corners + np.column_stack([0.41 * heights, heights])])
        ignore = rng.random(count) < 0.25
        near = people[rng.random(count) < 0.8]
        near = np.concatenate([near, near[: len(near) // 2]]) + rng.normal(0, 5, (len(near) + len(near) // 2, 4))
        alarms = rng.uniform(0, 150, (rng.integers(0, 4), 2))
        alarms = np.column_stack([alarms, alarms + rng.uniform(20, 60, alarms.shape)])
        boxes = np.concatenate([near, alarms]).astype(np.float32)
        scores = np.concatenate([rng.uniform(0.2, 1, len(near)), rng.uniform(0, 0.7, len(alarms))])
        predictions.append((boxes, scores.astype(np.float32)))
        truths.append((people.astype(np.float32), ignore))
        visible.append(rng.uniform(0, 1, count))
    return predictions, truths, visible


def crowd_split(protocol: str, truths: list[tuple[np.ndarray, np.ndarray]], visible: list[np.ndarray]) -> Split[People]:
    """The people as a split; what is hidden of them is their lower part."""
    samples = []
    for number, ((boxes, ignore), share) in enumerate(zip(truths, visible, strict=True)):
        seen = boxes.copy()
        seen[:, 3] = boxes[:, 1] + share * (boxes[:, 3] - boxes[:, 1])
        samples.append(Sample(Path(f"{number}.jpg"), People(boxes, ignore, seen)))
    return Split(tuple(samples), ("person",), protocol)


def _coco_box(number: int, image: int, box: list[float]) -> dict[str, object]:
    return {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "area": box[2] * box[3], "bbox": box}


def _crowdhuman_box(whole: list[int], seen: list[int]) -> dict[str, object]:
    head = [whole[0] + 2, whole[1], 4, 5]
    extra = {"box_id": 0, "occ": 0}
    return {"fbox": whole, "vbox": seen, "hbox": head, "tag": "person", "head_attr": {"occ": 0}, "extra": extra}


def _write_json(folder: Path, path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return folder
