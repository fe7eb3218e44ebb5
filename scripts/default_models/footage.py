"""Cut people out of videos with a peer's detector, and write its boxes as pseudo-labels in COCO's layout.

    python scripts/default_models/footage.py --detector SSD.xml --out DIR VIDEO[:FIRST[:EVERY]]...

FIRST is the first frame used (from 0), EVERY the distance of frames. Writes ``crops/`` (people, for distillation),
``train/`` (frames) and ``annotations/instances_train.json``: boxes above 0.5 are people, those between 0.2 and 0.5 are
regions to ignore (iscrowd). Boxes that look as the clip's median frame does hold furniture, and are left out.
"""

import json
import math
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from dpal_edge.runtime.backend import Backend, open_backend

Image = NDArray[np.uint8]
Boxes = NDArray[np.float64]

_SURE, UNSURE = 0.5, 0.2
_CHANGED, _MOVED = 30, 0.15  # grey levels by which a pixel differs from the median; share of them in a person's box
_MARGIN = 0.06  # of a box's sides, added around a crop: the detector's boxes are tight


def detect(backend: Backend, frame: Image) -> Boxes:
    """Return what an SSD of Open Model Zoo finds in a BGR frame: rows of score, left, top, right, bottom in pixels."""
    [(name, (_, _, height, width))] = backend.inputs.items()
    pixels = cv2.resize(frame, (width, height)).transpose(2, 0, 1)[None].astype(np.float32)
    [output] = backend.run({name: pixels}).values()
    rows = output.reshape(-1, 7)
    size = np.array([frame.shape[1], frame.shape[0]] * 2)
    return np.concatenate([rows[:, 2:3], np.clip(rows[:, 3:7], 0, 1) * size], axis=1)


def read(backend: Backend, path: str, first: int, every: int) -> tuple[dict[int, Image], dict[int, Boxes]]:
    """Return by number the frames of a clip, every so many from the first on, and what is found above 0.2 in each."""
    capture = cv2.VideoCapture(path)
    frames: dict[int, Image] = {}
    found: dict[int, Boxes] = {}
    number = -1
    while (taken := capture.read())[0]:
        number += 1
        if number >= first and (number - first) % every == 0:
            frames[number] = taken[1]
            rows = detect(backend, taken[1])
            found[number] = rows[rows[:, 0] >= UNSURE]
    return frames, found


@click.command()
@click.option("--detector", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.argument("videos", nargs=-1, required=True)
def main(detector: Path, out: Path, videos: tuple[str, ...]) -> None:
    """Write crops and pseudo-labels of VIDEOS."""
    backend = open_backend(detector)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in ("crops", "train", "annotations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for text in videos:
        path, first, every = [*text.split(":"), "0", "1"][:3]
        frames, found = read(backend, path, int(first), int(every))
        empty = np.median(list(frames.values())[:: len(frames) // 60 + 1], axis=0)  # the cameras stand still
        for i, frame in frames.items():
            name = f"{Path(path).stem}_{i:05d}"
            cv2.imwrite(str(out / "train" / f"{name}.jpg"), frame, [cv2.IMWRITE_JPEG_QUALITY, 95])
            image = len(images) + 1
            images.append({"id": image, "file_name": f"{name}.jpg", "height": frame.shape[0], "width": frame.shape[1]})
            for j, row in enumerate(found[i]):
                score, left, top, right, bottom = row.tolist()
                if right - left < 2 or bottom - top < 2:
                    continue
                part = np.s_[int(top) : math.ceil(bottom), int(left) : math.ceil(right)]
                if (np.abs(frame[part] - empty[part]).max(-1) > _CHANGED).mean() < _MOVED:
                    continue
                box = [left, top, right - left, bottom - top]
                annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box,
                                    "area": box[2] * box[3], "iscrowd": int(score < _SURE),
                                    "score": score})  # fmt: skip
                if score >= _SURE and bottom - top >= 48:
                    dx, dy = _MARGIN * box[2], _MARGIN * box[3]
                    x, y = max(round(left - dx), 0), max(round(top - dy), 0)
                    crop = frame[y : round(bottom + dy), x : round(right + dx)]
                    cv2.imwrite(str(out / "crops" / f"{name}_{j:02d}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 95])
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (out / "annotations" / "instances_train.json").write_text(json.dumps(document))
    click.echo(f"{len(images)} frames, {len(annotations)} boxes in {out}")


if __name__ == "__main__":
    main()
