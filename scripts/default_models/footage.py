"""Cut people out of videos with a peer's detector, and write its boxes as pseudo-labels in COCO's layout.

    python scripts/default_models/footage.py --detector SSD.xml --out DIR VIDEO[:FIRST[:EVERY]]...

FIRST is the first frame used (from 0), EVERY the distance of frames. Writes ``crops/`` (people, for distillation),
``train/`` (frames) and ``annotations/instances_train.json``: boxes above 0.5 are people, those between 0.2 and 0.5 are
regions to ignore (iscrowd).
"""

import json
from pathlib import Path

import click
import cv2
import numpy as np

from dpal_edge.runtime.backend import Backend, open_backend

_SURE, _UNSURE = 0.5, 0.2
_MARGIN = 0.06  # of a box's sides, added around a crop: the detector's boxes are tight


def detect(backend: Backend, frame: np.ndarray) -> np.ndarray:
    """Return what an SSD of Open Model Zoo finds in a BGR frame: rows of score, left, top, right, bottom in pixels."""
    [(name, (_, _, height, width))] = backend.inputs.items()
    pixels = cv2.resize(frame, (width, height)).transpose(2, 0, 1)[None].astype(np.float32)
    [output] = backend.run({name: pixels}).values()
    rows = output.reshape(-1, 7)
    size = np.array([frame.shape[1], frame.shape[0]] * 2)
    return np.concatenate([rows[:, 2:3], np.clip(rows[:, 3:7], 0, 1) * size], axis=1)


@click.command()
@click.option("--detector", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.argument("videos", nargs=-1, required=True)
def main(detector: Path, out: Path, videos: tuple[str, ...]) -> None:
    """Write crops and pseudo-labels of VIDEOS."""
    backend = open_backend(detector)
    images, annotations = [], []
    for folder in ("crops", "train", "annotations"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for text in videos:
        path, first, every = [*text.split(":"), "0", "1"][:3]
        capture = cv2.VideoCapture(path)
        number = -1
        while (read := capture.read())[0]:
            number, frame = number + 1, read[1]
            if number < int(first) or (number - int(first)) % int(every):
                continue
            name = f"{Path(path).stem}_{number:05d}"
            cv2.imwrite(str(out / "train" / f"{name}.jpg"), frame, [cv2.IMWRITE_JPEG_QUALITY, 95])
            image = len(images) + 1
            images.append({"id": image, "file_name": f"{name}.jpg", "height": frame.shape[0], "width": frame.shape[1]})
            for i, (score, left, top, right, bottom) in enumerate(detect(backend, frame).tolist()):
                if score < _UNSURE or right - left < 2 or bottom - top < 2:
                    continue
                sure = score >= _SURE
                box = [left, top, right - left, bottom - top]
                annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box,
                                    "area": box[2] * box[3], "iscrowd": int(not sure), "score": score})  # fmt: skip
                if sure and bottom - top >= 48:
                    dx, dy = _MARGIN * box[2], _MARGIN * box[3]
                    x, y = max(round(left - dx), 0), max(round(top - dy), 0)
                    crop = frame[y : round(bottom + dy), x : round(right + dx)]
                    cv2.imwrite(str(out / "crops" / f"{name}_{i:02d}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 95])
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    (out / "annotations" / "instances_train.json").write_text(json.dumps(document))
    click.echo(f"{len(images)} frames, {len(annotations)} boxes in {out}")


if __name__ == "__main__":
    main()
