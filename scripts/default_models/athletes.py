"""Cut people out by the parsing of a teacher: athletes whose joints are known, or crops of anybody.

    python scripts/default_models/athletes.py --teacher FILE --joints COCO_FOLDER --out DIR
    python scripts/default_models/athletes.py --teacher FILE --crops DIR --out DIR

Writes the images that pass, and their masks, in the layout of LIP: pseudo-labels. Where joints are known, what does not
touch one is somebody else, and a mask is kept if it covers them and reaches no farther than a body can. Of a crop the
largest part is the person.
"""

import json
from pathlib import Path

import click
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.files import find_images, write_text
from dpal_edge.models.human import load_human
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.sample import Sample

_LEAST_JOINTS = 12  # of 14: with fewer nobody knows how far the person reaches
_NEAR = 0.03  # of the image's longer side: how far a joint may lie outside the mask
_COVERED = 0.9  # share of the joints that the mask has to cover
_AROUND_JOINTS = 0.15  # of the longer side of the joints' box: hands, feet, and flesh around the outermost joints
_LEAST_AREA = 0.15  # of a crop without joints that a person fills
_BATCH = 16

Mask = NDArray[np.uint8]


def confirm(mask: Mask, joints: NDArray[np.float64]) -> Mask | None:
    """Return what of a mask (H, W) of classes is the person with these joints; None if the two do not fit.

    Args:
        mask: 0 is nobody.
        joints: (n, 2), x and y in pixels of the mask.
    """
    near = 2 * round(_NEAR * max(mask.shape)) + 1
    points = np.clip(np.rint(joints).astype(int), 0, np.array(mask.shape[::-1]) - 1)
    _, parts = cv2.connectedComponents((mask > 0).astype(np.uint8))
    widened = cv2.dilate(parts.astype(np.uint16), np.ones((near, near), np.uint8))
    touched = widened[points[:, 1], points[:, 0]]
    low, high = joints.min(0), joints.max(0)
    margin = _AROUND_JOINTS * (high - low).max()
    kept = np.where(np.isin(parts, touched[touched > 0]), mask, 0).astype(np.uint8)
    rows, columns = np.nonzero(kept)
    if (touched > 0).mean() < _COVERED or not len(rows):
        return None
    reach = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    fits = (reach[:2] >= low - margin).all() and (reach[2:] <= high + margin).all()
    return kept if fits else None


def largest(mask: Mask) -> Mask | None:
    """Return the largest connected part of a mask (H, W) of classes; None if it is no more than a scrap."""
    _, parts, facts, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8))
    areas = facts[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < _LEAST_AREA * mask.size:
        return None
    return np.where(parts == 1 + areas.argmax(), mask, 0).astype(np.uint8)


def read_joints(folder: Path) -> dict[Path, NDArray[np.float64]]:
    """Return the seen joints (n, 2) of each training image in COCO's keypoint layout that has enough of them."""
    document = json.loads((folder / "annotations" / "person_keypoints_train.json").read_text(encoding="utf-8"))
    files = {image["id"]: folder / "train" / image["file_name"] for image in document["images"]}
    found = {}
    for annotation in document["annotations"]:
        joints = np.array(annotation["keypoints"], float).reshape(-1, 3)
        seen = joints[joints[:, 2] > 0, :2]
        if len(seen) >= _LEAST_JOINTS:
            found[files[annotation["image_id"]]] = seen
    return found


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path), help="With a head for parsing.")
@click.option("--joints", type=click.Path(exists=True, path_type=Path), help="In COCO's layout.")
@click.option("--crops", type=click.Path(exists=True, path_type=Path), help="Instead: images of a person each.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@torch.no_grad()
def main(teacher: Path, joints: Path | None, crops: Path | None, out: Path) -> None:
    """Write images, masks and the list of them."""
    if (joints is None) == (crops is None):
        raise click.UsageError("give --joints or --crops")
    model, metadata = load_human(teacher)
    for folder in ("train_images", "train_segmentations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    known = read_joints(joints) if joints else dict.fromkeys(find_images((str(crops),)).paths)
    found, names = list(known.items()), []
    for start in range(0, len(found), _BATCH):
        part = found[start : start + _BATCH]
        views = np.stack([read_crop(Sample(path, None), model.backbone.config.size) for path, _ in part])
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2)
        seen = model(normalize(pixels, metadata["mean"], metadata["std"]), ("parsing",))["parsing"].softmax(1)
        for (path, points), shares in zip(part, seen, strict=True):
            width, height = Image.open(path).size
            sized = F.interpolate(shares[None], (height, width), mode="bilinear")[0]
            ids = torch.where(sized[0] > 0.5, 0, 1 + sized[1:].argmax(0))
            whole = ids.numpy().astype(np.uint8)
            mask = largest(whole) if points is None else confirm(whole, points)
            if mask is not None:
                names.append(path.stem)
                link = out / "train_images" / path.name
                link.unlink(missing_ok=True)
                link.symlink_to(path.resolve())
                Image.fromarray(mask).save(out / "train_segmentations" / f"{path.stem}.png")
    write_text(out / "classes.txt", "\n".join(model.configs["parsing"].labels) + "\n")
    write_text(out / "train_id.txt", "\n".join(names) + "\n")
    click.echo(f"{len(names)} of {len(found)} people in {out}")


if __name__ == "__main__":
    main()
