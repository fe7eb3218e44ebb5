"""Tiny human parsing sets in the layouts of CIHP and ATR."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.tasks.layouts import SIZE, save_image

_PARTS = {"train": "Training", "val": "Validation"}


def _legs(rng: np.random.Generator, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """A red left leg and a green right one on grey, and the mask of their classes."""
    mask = np.zeros(SIZE, np.uint8)
    middle = int(rng.integers(6, 11))
    mask[8:28, 2:middle], mask[8:28, middle:14] = left, right
    image = np.full((*SIZE, 3), 120)
    image[mask == left], image[mask == right] = (200, 30, 30), (30, 200, 30)
    return image, mask


def write_cihp(folder: Path, images: int = 10) -> Path:
    """The archive's content: images of two people, masks of classes, of people, and of both."""
    rng = np.random.default_rng(6)
    for split, part in _PARTS.items():
        root = folder / "instance-level_human_parsing" / part
        ids = [f"{6 * i + 6:07d}" for i in range(images)]
        for name in ids:
            people = [_legs(rng, 16, 17) for _ in range(2)]
            mask = np.hstack([mask for _, mask in people])
            person = np.hstack([(mask > 0) * number for number, (_, mask) in enumerate(people, start=1)])
            save_image(root / "Images" / f"{name}.jpg", np.hstack([image for image, _ in people]))
            save_image(root / "Category_ids" / f"{name}.png", mask)
            save_image(root / "Human_ids" / f"{name}.png", person)
            save_image(root / "Instance_ids" / f"{name}.png", 20 * person + mask)
        (root / f"{split}_id.txt").write_text("\n".join(ids) + "\n")
    return folder


def write_atr(folder: Path, images: int = 10, *, lists: str = "") -> Path:
    """Images and masks of all parts side by side; masks with a palette."""
    rng = np.random.default_rng(7)
    for number, split in enumerate(("train", "val", "test")):
        ids = [f"2500_{number * images + i}" for i in range(images)]
        for name in ids:
            image, mask = _legs(rng, 12, 13)
            save_image(folder / "JPEGImages" / f"{name}.jpg", image)
            path = folder / "SegmentationClassAug" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coloured = Image.fromarray(mask)
            coloured.putpalette(rng.integers(0, 255, 3 * 18).tolist())
            coloured.save(path)
        path = folder / lists / f"{split}_id.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(ids) + "\n")
    return folder
