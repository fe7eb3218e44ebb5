"""Tiny data sets in the real folder layouts: coloured people on grey, each in a way that pixels alone can solve."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 16)  # height, width of a person's image
JOINTS = ("head_top", "left_shoulder", "right_shoulder", "left_hip", "right_hip")
CLASSES = ("background", "left-leg", "right-leg")
ATTRIBUTES = ("red", "bright", "never")


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def paint(colour, rng) -> np.ndarray:
    """A person in one colour on noise."""
    image = rng.integers(100, 140, (*SIZE, 3))
    image[4:28, 4:12] = colour
    return image


def write_market(folder: Path, people: int = 6) -> Path:
    """Two cameras and one colour per person; with junk, distractors and what Windows leaves behind."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (people + 1, 3))
    for person in range(1, people + 1):
        for camera, part in ((1, "query"), (2, "bounding_box_test"), (1, "bounding_box_train")):
            name = f"{person:04d}_c{camera}s1_{person:06d}_00.png"
            save_image(folder / part / name, paint(colours[person], rng))
    for name in ("0000_c3s1_000900_00.png", "-1_c3s1_000901_00.png"):
        save_image(folder / "bounding_box_test" / name, paint(colours[0], rng))
    (folder / "bounding_box_test" / "Thumbs.db").write_bytes(b"no image")
    return folder


def write_lip(folder: Path, *, images: int = 10, classes: bool = True) -> Path:
    """Legs of two classes: the left one red, the right one green; a border that nobody labelled."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        ids = [f"{split}_{i}" for i in range(images)]
        for name in ids:
            middle = int(rng.integers(6, 11))
            mask = np.zeros(SIZE, np.uint8)
            mask[8:28, 2:middle], mask[8:28, middle:14] = 1, 2
            image = np.array([[120, 120, 120], [200, 30, 30], [30, 200, 30]])[mask]
            mask[:, 0] = 255
            save_image(folder / f"{split}_images" / f"{name}.png", image)
            save_image(folder / f"{split}_segmentations" / f"{name}.png", mask)
        (folder / f"{split}_id.txt").write_text("\n".join(ids) + "\n")
    if classes:
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def write_coco(folder: Path, *, people: int = 12, year: str = "") -> Path:
    """Two people on each image, a dot of its own colour on each joint; also a crowd and a person without joints."""
    rng = np.random.default_rng(2)
    dots = rng.integers(0, 255, (len(JOINTS), 3))
    for split in ("train", "val"):
        images, annotations = [], []
        for number in range(people // 2):
            image = rng.integers(100, 140, (SIZE[0], 2 * SIZE[1], 3))
            for side in (0, 1):
                joints = np.array([[8, 4], [11, 10], [5, 10], [10, 20], [6, 20]]) + rng.integers(-2, 3, 2)
                joints[:, 0] += side * SIZE[1]
                for (x, y), colour in zip(joints, dots, strict=True):
                    image[y - 1 : y + 2, x - 1 : x + 2] = colour
                seen = np.full(len(JOINTS), 2)
                seen[0] = side  # 0 unlabelled, 1 hidden
                annotations.append(
                    {
                        "id": 10 * number + side,
                        "image_id": number,
                        "category_id": 1,
                        "iscrowd": 0,
                        "bbox": [side * SIZE[1], -1, SIZE[1], SIZE[0] + 1],
                        "area": SIZE[0] * SIZE[1] / 2,
                        "keypoints": np.column_stack([joints, seen]).ravel().tolist(),
                    }
                )
            name = f"{number:012d}.png"
            save_image(folder / f"{split}{year}" / name, image)
            images.append({"id": number, "file_name": name, "width": 2 * SIZE[1], "height": SIZE[0]})
        annotations.append({**annotations[0], "id": 900, "iscrowd": 1, "keypoints": []})
        annotations.append({**annotations[0], "id": 901, "keypoints": [0] * 3 * len(JOINTS)})
        document = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person", "keypoints": list(JOINTS)}],
        }
        path = folder / "annotations" / f"person_keypoints_{split}{year}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


def write_attributes(folder: Path, *, images: int = 16) -> Path:
    """Red or blue people, bright or dark; nobody has the last attribute."""
    rng = np.random.default_rng(3)
    lines = [",".join(("image", "split", *ATTRIBUTES))]
    for i in range(2 * images):
        red, bright = i % 2, i // 2 % 2
        colour = np.array([60, 0, 0] if red else [0, 0, 60]) + 150 * bright
        save_image(folder / "images" / f"{i:03d}.png", paint(colour, rng))
        lines.append(f"images/{i:03d}.png,{'train' if i < images else 'val'},{red},{bright},0")
    (folder / "attributes.csv").write_text("\n".join(lines) + "\n")
    return folder
