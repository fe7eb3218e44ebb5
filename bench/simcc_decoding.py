"""How many joints are found by two ways of reading SimCC's axes: the likeliest bin, and the window that holds most.

    python bench/simcc_decoding.py --shared ../shared [--images 1000] [--out bench/results/simcc_decoding.json]

On crops of Leeds Sports Pose Extended, of the training part, which the window's width was chosen on, and of the
validation part. PCK as ``dpal-edge evaluate`` counts it, with standard errors over people.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpal_edge.evaluate.predictor import Choice, open_predictor
from dpal_edge.tasks.decoding import SIMCC_SPLIT, decode_joints, place_in_box
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.table import TASKS

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "dpal_edge" / "assets" / "dpal_vit_tiny.safetensors"
BATCH, SHARE = 32, 0.2


def likeliest(raw: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return the middles of the likeliest bins (n, K, 2), as SimCC does."""
    axes = np.split(raw, [SIMCC_SPLIT * size[1]], axis=-1)
    return np.stack([(axis.argmax(-1) + 0.5) / SIMCC_SPLIT for axis in axes], -1)


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "simcc_decoding.json")
    options = parser.parse_args()
    predictor = open_predictor(str(STUDENT), Choice())
    results: dict[str, Any] = {"model": STUDENT.stem, "threads": torch.get_num_threads(), "PCK@0.2": {}}
    for part in ("train", "val"):
        split = TASKS["pose"].read(options.shared / "data" / "lspet", part)
        samples = split.samples[:: max(len(split.samples) // options.images, 1)][: options.images]
        one, other = split.labels.index("left_shoulder"), split.labels.index("right_hip")
        hits: dict[str, list[NDArray[np.float64]]] = {"likeliest bin": [], "window": []}
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            raw = predictor(np.stack([read_crop(sample, predictor.size) for sample in batch]), "pose")
            boxes = np.array([sample.box for sample in batch], np.float32)
            ways = {"likeliest bin": likeliest(raw, predictor.size),
                    "window": decode_joints(raw, "simcc", predictor.size)[0]}  # fmt: skip
            placed = {way: place_in_box(places, predictor.size, boxes) for way, places in ways.items()}
            for i, sample in enumerate(batch):
                joints, labelled = sample.target.joints, sample.target.labelled
                if not labelled[[one, other]].all():
                    continue
                reach = SHARE * np.linalg.norm(joints[one] - joints[other])
                for way, places in placed.items():
                    distance = np.linalg.norm(places[i] - joints, axis=-1)
                    hits[way].append(np.array([(distance <= reach)[labelled].sum(), labelled.sum()], float))
        results["PCK@0.2"][part] = {"people": len(hits["window"])}
        for way, counts in hits.items():
            found, there = np.array(counts).T
            pck = found.sum() / there.sum()
            error = np.sqrt(((found - pck * there) ** 2).sum()) / there.sum()
            results["PCK@0.2"][part][way] = {"value": round(pck, 4), "error": round(error, 4)}
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
