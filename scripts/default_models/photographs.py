"""Make frames for a detector out of photographs of one person each, whose mask is known.

    python scripts/default_models/photographs.py --masks LIP_FOLDER [--masks LIP_FOLDER...] \\
        --detector SSD.xml --finder BUNDLE --out DIR

Writes a data set in COCO's layout. Unlike people pasted on backgrounds, these stand where they were photographed; a
mosaic makes crowds of them. Others are in many of the pictures: what a detector of Open Model Zoo or one of
ours finds beside the person, even if it is unsure, is a region to ignore (iscrowd).
"""

import json
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from footage import UNSURE, detect
from numpy.typing import NDArray

from dpal_edge.files import write_text
from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.boxes import Boxes, area, intersection, iou
from dpal_edge.runtime.detector import ModelDetector
from dpal_edge.tasks.image import read_ids
from dpal_edge.tasks.parsing import read_lip

Box = NDArray[np.float64]  # (4,): left, top, right, bottom in pixels
_INSIDE, _SAME = 0.5, 0.3  # share of a box in the person's, and overlap with it, from which it is no other person


def boxes_of_masks(folder: Path) -> dict[Path, Box]:
    """Return the box of the person of each training image with a mask, in LIP's layout."""
    found = {}
    split = read_lip(folder, "train")
    for sample in split.samples:
        mask = read_ids(sample.target)
        rows, columns = np.nonzero((mask > 0) & (mask < len(split.labels)))
        if len(rows):
            found[sample.image] = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
    return found


def others(boxes: Boxes, person: Boxes) -> Boxes:
    """Return which of boxes (n, 4) are neither the person in the box (4,) nor a part of that person."""
    inside = intersection(boxes, person[None])[:, 0] >= _INSIDE * area(boxes)  # an empty box, too
    return boxes[~inside & (iou(boxes, person[None])[:, 0] < _SAME)]


@click.command()
@click.option(
    "--masks", required=True, multiple=True, type=click.Path(exists=True, path_type=Path), help="In LIP's layout."
)
@click.option("--detector", required=True, type=click.Path(exists=True, path_type=Path), help="As footage.py takes it.")
@click.option("--finder", required=True, type=click.Path(exists=True, path_type=Path), help="A detector's bundle.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(masks: tuple[Path, ...], detector: Path, finder: Path, out: Path) -> None:
    """Write links to the images, and annotations."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    peer, ours = open_backend(detector), ModelDetector.open(finder, threshold=UNSURE)
    (out / "train").mkdir(parents=True, exist_ok=True)
    found = {path: box for folder in masks for path, box in boxes_of_masks(folder).items()}
    for i, (path, box) in enumerate(found.items(), 1):
        pixels = cv2.imread(str(path))
        height, width = pixels.shape[:2]
        person, rows = np.clip(box, 0, [width, height] * 2).astype(np.float32), detect(peer, pixels)
        seen = np.concatenate([rows[rows[:, 0] >= UNSURE, 1:].astype(np.float32), ours(pixels).boxes])
        link = out / "train" / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        images.append({"id": i, "file_name": path.name, "height": height, "width": width})
        for n, (left, top, right, bottom) in enumerate([person, *others(seen, person)]):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": int(n > 0),
                                "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
                                "area": float((right - left) * (bottom - top))})  # fmt: skip
    ours.close()
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    write_text(out / "annotations" / "instances_train.json", json.dumps(document))
    click.echo(f"{len(images)} photographs, {len(annotations) - len(images)} regions to ignore in {out}")


if __name__ == "__main__":
    main()
