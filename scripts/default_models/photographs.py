"""Make frames for a detector out of photographs of one person each, whose mask is known.

    python scripts/default_models/photographs.py --masks LIP_FOLDER [--masks LIP_FOLDER...] --out DIR

Writes a data set in COCO's layout. Unlike people pasted on backgrounds, these stand where they were photographed; a
mosaic makes crowds of them.
"""

import json
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.files import write_text
from dpal_edge.tasks.image import read_ids
from dpal_edge.tasks.parsing import read_lip

Box = NDArray[np.float64]  # left, top, right, bottom in pixels


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


@click.command()
@click.option(
    "--masks", required=True, multiple=True, type=click.Path(exists=True, path_type=Path), help="In LIP's layout."
)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(masks: tuple[Path, ...], out: Path) -> None:
    """Write links to the images, and annotations."""
    images, annotations = [], []
    (out / "train").mkdir(parents=True, exist_ok=True)
    found = {path: box for folder in masks for path, box in boxes_of_masks(folder).items()}
    for i, (path, box) in enumerate(found.items(), 1):
        width, height = Image.open(path).size
        left, top, right, bottom = np.clip(box, 0, [width, height] * 2).tolist()
        link = out / "train" / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        images.append({"id": i, "file_name": path.name, "height": height, "width": width})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "iscrowd": 0,
                            "bbox": [left, top, right - left, bottom - top],
                            "area": (right - left) * (bottom - top)})  # fmt: skip
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    write_text(out / "annotations" / "instances_train.json", json.dumps(document))
    click.echo(f"{len(images)} photographs in {out}")


if __name__ == "__main__":
    main()
