"""Where the student's embedding falls short of its teacher's on CUHK01: its head, its features, or the cameras.

    python bench/embedding_gap.py --data ../shared/data/cuhk01 --teacher FILE[?color=bgr] [--model FILE] [--out FILE]

Rank-1 and mAP between query and gallery, of teacher and student as they are and with one thing changed at a time:

- ``refitted``: the student's linear map fitted anew to the teacher's embeddings of the training people (ridge). What a
  head made for these very cameras would give.
- ``centred``: each camera's mean taken off. How much is one shift that all people share, of view, light and background.
- ``evened``: directions in which training people differ from themselves are shortened (within-class covariance
  normalisation, Hatch et al., 2006). What the features know, measured as these cameras would have it.

All three know CUHK01, so none may ship: they tell what to train for.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpal_edge.files import sha256_of, write_text
from dpal_edge.finetune.embedding_teacher import EmbeddingTeacher
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.image import read_crop
from dpal_edge.tasks.reid import read_market, retrieval_metrics

RESULTS = Path(__file__).parent / "results" / "embedding_gap.json"
ASSET = Path(__file__).parents[1] / "dpal_edge" / "assets" / "dpal_vit_tiny.safetensors"
BATCH = 32
RIDGE = 0.1  # of the mean variance

Rows = NDArray[np.float64]


def main() -> None:
    """Print the table and file it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--model", type=Path, default=ASSET)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, metadata = load_human(options.model)
    teacher = EmbeddingTeacher.open(options.teacher, precision="f32")
    splits = {name: read_market(options.data, name) for name in ("train", "query", "gallery")}
    who = {name: [sample.target for sample in split.samples] for name, split in splits.items()}
    taught, own, known = {}, {}, {}
    for name, split in splits.items():
        crops = np.stack([read_crop(sample, model.backbone.config.size) for sample in split.samples])
        taught[name] = unit(teacher(crops).embeddings.astype(np.float64))
        own[name], known[name] = embed(model, metadata, crops)

    fit = ridge(known["train"], taught["train"])
    cameras = {name: np.array([identity.camera for identity in who[name]]) for name in who}
    rows = {
        "teacher": taught,
        "teacher, centred": {name: centred(taught[name], cameras[name]) for name in taught},
        "teacher, evened": even(taught, [identity.person for identity in who["train"]]),
        "student": own,
        "student, refitted": {name: fit(known[name]) for name in known},
        "student, centred": {name: centred(own[name], cameras[name]) for name in own},
        "student, evened": even(own, [identity.person for identity in who["train"]]),
    }
    results = {}
    for name, found in rows.items():
        scores = retrieval_metrics(found["query"], found["gallery"], who["query"], who["gallery"])
        results[name] = scores
        print(f"{name:20} rank-1 {scores['rank-1']:.3f}  mAP {scores['mAP']:.3f}")
    for name in ("student", "student, refitted"):
        results[name]["cosine"] = float((unit(rows[name]["query"]) * taught["query"]).sum(1).mean())
        print(f"{name:20} cosine to the teacher {results[name]['cosine']:.3f}")
    document = {"data": options.data.name, "model": options.model.name, "sha256": sha256_of(options.model)}
    write_text(options.out, json.dumps({**document, "results": results}, indent=2) + "\n")


@torch.no_grad()
def embed(model: HumanModel, metadata: dict[str, Any], crops: NDArray[np.uint8]) -> tuple[Rows, Rows]:
    """Return, of crops (B, H, W, 3), embeddings of length 1 (B, D) and what the head's linear map took in (B, F)."""
    seen: list[torch.Tensor] = []
    head = model.heads["reid"]
    hook = head.get_submodule("project").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = []
    for start in range(0, len(crops), BATCH):
        pixels = torch.from_numpy(crops[start : start + BATCH]).permute(0, 3, 1, 2)
        found.append(head(model.backbone(normalize(pixels, metadata["mean"], metadata["std"]))))
    hook.remove()
    return unit(torch.cat(found).double().numpy()), torch.cat(seen).double().numpy()


def ridge(known: Rows, wanted: Rows) -> Callable[[Rows], Rows]:
    """Return the linear map with offset that tells ``wanted`` (n, D) from ``known`` (n, F), by ridge regression."""
    mean, spread, offset = known.mean(0), known.std(0) + 1e-9, wanted.mean(0)
    scaled = (known - mean) / spread
    moment = scaled.T @ scaled / len(scaled) + RIDGE * np.eye(scaled.shape[1])
    weight = np.linalg.solve(moment, scaled.T @ (wanted - offset) / len(scaled))
    return lambda rows: (rows - mean) / spread @ weight + offset


def centred(rows: Rows, cameras: NDArray[np.int64]) -> Rows:
    """Return rows without the mean of their camera."""
    return rows - np.stack([rows[cameras == camera].mean(0) for camera in cameras])


def even(rows: dict[str, Rows], people: list[int]) -> dict[str, Rows]:
    """Return rows whose directions are divided by how much people of "train" differ from themselves in them."""
    person, train = np.array(people), rows["train"]
    apart = train - np.stack([train[person == one].mean(0) for one in person])
    variances, axes = np.linalg.eigh(np.cov(apart.T))
    scale = axes / np.sqrt(variances.clip(0) + RIDGE * variances.mean())
    return {name: (part - train.mean(0)) @ scale for name, part in rows.items()}


def unit(rows: Rows) -> Rows:
    """Return rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
