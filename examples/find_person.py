"""Find the pictures of a folder that show the person of one picture.

    python examples/find_person.py BUNDLE QUERY.jpg FOLDER [--best 5]

Pictures are crops of one person, as a re-identification data set has them; with --detect they are whole frames, in
which people are looked for first.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from dpal_edge.files import IMAGE_SUFFIXES
from dpal_edge.runtime import Pipeline
from dpal_edge.runtime.preprocess import crop_people


def embeddings(pipeline: Pipeline, path: Path, *, detect: bool) -> np.ndarray:
    """Return an embedding of length 1 for each person of a picture, (n, D)."""
    image = cv2.imread(str(path))
    if image is None:
        raise SystemExit(f"{path}: no image that OpenCV can decode")
    if detect:
        people = pipeline.look({"": image}, tasks=("embedding",))[""]
        return np.stack([person.embedding for person in people]) if people else np.empty((0, 0), np.float32)
    whole = np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)
    return pipeline.embed(crop_people(image, whole, pipeline.manifest.input.size))


def main() -> None:
    """Print the best matches, the most alike first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("query", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--best", type=int, default=5)
    parser.add_argument("--detect", action="store_true")
    options = parser.parse_args()
    if not options.folder.is_dir():
        raise SystemExit(f"{options.folder}: no such folder")
    paths = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    with Pipeline.open(options.bundle, tracker=None) as pipeline:
        wanted = embeddings(pipeline, options.query, detect=options.detect)
        if not len(wanted):
            raise SystemExit(f"{options.query}: nobody was found in it")
        alike = {}
        for path in paths:
            found = embeddings(pipeline, path, detect=options.detect)
            alike[path] = float((found @ wanted[0]).max(initial=-1.0)) if len(found) else -1.0
    for path in sorted(paths, key=lambda path: -alike[path])[: options.best]:
        print(f"{alike[path]:.4f}  {path}")


if __name__ == "__main__":
    main()
