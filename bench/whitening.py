"""What an embedding gains by being whitened, by what all people differ in or by what cameras change about one.

    python bench/whitening.py --model FILE --crops DIR --reid DIR [--every N] [--out FILE]

FILE is a student before its embedding was whitened, DIR are crops that it learned on (make.py's student-embedded) and a
re-identification set in the layout of Market-1501. Of every N-th crop there are two views, as
``scripts/default_models/make.py`` takes them. Each direction of the embedding is divided by the square root of its
variance plus a ridge, in mean variances: the variance among all views, or that between the views of one crop.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpal_edge.files import find_images, sha256_of, write_text
from dpal_edge.models.checkpoint import list_checkpoints
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.reid import read_market, retrieval_metrics

RESULTS = Path(__file__).parent / "results" / "whitening.json"
SCRIPTS = Path(__file__).parents[1] / "scripts" / "default_models"
RIDGES = (0.3, 1.0, 3.0)
BATCH = 64

Rows = NDArray[np.float64]


def main() -> None:
    """Print the table and file it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint or run folder")
    parser.add_argument("--crops", required=True)
    parser.add_argument("--reid", type=Path, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sys.path.insert(0, str(SCRIPTS))
    camera_views, rng = runpy.run_path(str(SCRIPTS / "make.py"))["camera_views"], np.random.default_rng(0)
    model, metadata = load_human(options.model)
    model.eval()
    size = model.backbone.config.size
    crops = find_images((options.crops,)).paths[:: options.every]
    views = [view for crop in crops for view in camera_views(crop, size, rng)]
    seen = embed(model, metadata, views)
    parts = {part: read_market(options.reid, part).samples for part in ("query", "gallery")}
    found = {part: embed(model, metadata, [read_crop(one, size) for one in some]) for part, some in parts.items()}
    change = (seen[::2] - seen[1::2]) / np.sqrt(2)
    spreads = {"all views": np.cov(seen.T), "views of one crop": change.T @ change / len(change)}
    maps = {"as trained": np.eye(seen.shape[1])}
    maps |= {f"{name}, ridge {ridge:g}": even(spread, ridge) for name, spread in spreads.items() for ridge in RIDGES}
    people = {part: [one.target for one in some] for part, some in parts.items()}
    results = {}
    for name, way in maps.items():
        centre = 0.0 if name == "as trained" else seen.mean(0)
        query, gallery = ((found[part] - centre) @ way for part in parts)
        results[name] = retrieval_metrics(query, gallery, people["query"], people["gallery"])
        print(f"{name:32} rank-1 {results[name]['rank-1']:.3f}  mAP {results[name]['mAP']:.3f}", flush=True)
    newest = list_checkpoints(options.model)[-1] if options.model.is_dir() else options.model
    document = {"model": sha256_of(newest), "views": len(views), "results": results}
    write_text(options.out, json.dumps(document, indent=2) + "\n")


@torch.no_grad()
def embed(model: HumanModel, metadata: dict, crops: list[NDArray[np.uint8]]) -> Rows:
    """Return the embeddings (N, D) of crops (H, W, 3)."""
    found = []
    for start in range(0, len(crops), BATCH):
        pixels = torch.from_numpy(np.stack(crops[start : start + BATCH])).permute(0, 3, 1, 2)
        found.append(model.heads["reid"](model.backbone(normalize(pixels, metadata["mean"], metadata["std"]))))
    return torch.cat(found).double().numpy()


def even(spread: Rows, ridge: float) -> Rows:
    """Return the symmetric map (D, D) that divides by the square root of a covariance plus a ridge."""
    variances, axes = np.linalg.eigh(spread)
    return axes @ np.diag((variances + ridge * variances.mean()) ** -0.5) @ axes.T


if __name__ == "__main__":
    main()
