"""Tiny re-identification sets in the layouts of MSMT17 and CUHK03-NP."""

from pathlib import Path

import numpy as np

from tests.tasks.layouts import paint, save_image


def write_msmt(folder: Path, people: int = 6, *, train: str = "train", test: str = "test") -> Path:
    """Person 0 counts; training and test number their people from 0 each; V2 has other names of the two folders."""
    rng = np.random.default_rng(4)
    rows: dict[str, list[str]] = {part: [] for part in ("train", "val", "query", "gallery")}
    for person in range(people):
        colour = rng.integers(0, 255, 3)
        for number, (part, images) in enumerate(
            (("train", train), ("train", train), ("val", train), ("query", test), ("gallery", test))
        ):
            camera = 1 + 14 * (number % 2)
            name = f"{person:04d}/{person:04d}_{number:03d}_{camera:02d}_0303morning_{15 + number:04d}_0.jpg"
            save_image(folder / images / name, paint(colour, rng))
            rows[part].append(f"{name} {person}")
    for part, lines in rows.items():
        (folder / f"list_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_cuhk03_np(folder: Path, people: int = 3) -> Path:
    """Both kinds of boxes, each with two cameras per person."""
    rng = np.random.default_rng(5)
    for kind in ("labeled", "detected"):
        for person in range(1, people + 1):
            for camera, part in ((1, "query"), (2, "bounding_box_test"), (1, "bounding_box_train")):
                name = f"{person:04d}_c{camera}_{1 + 5 * (camera - 1)}.png"
                save_image(folder / kind / part / name, paint(rng.integers(0, 255, 3), rng))
    return folder
