"""How fast pose heads learn on the same frozen features: RTMPose's neck, ours with and without upsampling, heatmaps.

    python bench/pose_heads.py --init CHECKPOINT --data COCO_FOLDER [--people 1500] [--epochs 6]

Plain crops, one order of the people for all heads, AdamW at 1e-3, batches of 32; PCK@0.2 on 300 people of val at every
second epoch. Writes ``bench/results/pose_heads.json``.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from dpal_edge.files import write_text
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.objectives.pose import PoseObjective
from dpal_edge.finetune.setup import crop_size, open_init
from dpal_edge.models.head_config import HeadConfig, Place
from dpal_edge.models.heads import HeatmapHead, SimCCHead, patch_map
from dpal_edge.models.students import resize_student
from dpal_edge.models.vit import Block, normalize
from dpal_edge.tasks.decoding import SIMCC_SPLIT, decode_joints, place_in_box
from dpal_edge.tasks.pose import pck
from dpal_edge.tasks.table import TASKS

RESULT = Path(__file__).parent / "results" / "pose_heads.json"


class NeckAlone(nn.Module):
    """SimCC as RTMPose has it: a 7x7 convolution, then vectors that must learn where each cell lies."""

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        patches, hidden = math.prod(place.grid), 256
        self.grid = place.grid
        self.maps = nn.Conv2d(place.width, len(config.labels), 7, padding=3)
        self.embed = nn.Sequential(nn.LayerNorm(patches), nn.Linear(patches, hidden))
        self.block = Block(hidden, 8, mlp_ratio=2.0, layer_scale=False)
        self.bins = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, SIMCC_SPLIT * sum(place.size)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits of the bins of x and of y."""
        bins: Tensor = self.bins(self.block(self.embed(self.maps(patch_map(tokens, self.grid)).flatten(2))))
        return bins


HEADS = {  # the class, what decodes it, channels of its upsampling
    "neck alone": (NeckAlone, "simcc", 0),
    "ours": (SimCCHead, "simcc", 128),
    "one convolution": (SimCCHead, "simcc", 0),
    "heatmap": (HeatmapHead, "heatmap", 0),
}


@click.command()
@click.option("--init", required=True)
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--people", default=1500, show_default=True)
@click.option("--epochs", default=6, show_default=True)
def main(init: str, data: Path, people: int, epochs: int) -> None:
    """Train each head and write what it reached."""
    start = open_init(build_config({"init": init, "task": [f"pose={data}"]}))
    size = crop_size(build_config({"init": init, "task": [f"pose={data}"]}), start)
    backbone = resize_student(start.backbone, size).eval()
    splits = {name: TASKS["pose"].read(data, name) for name in ("train", "val")}
    parts = {name: replace(split, samples=split.samples[: people if name == "train" else 300])
             for name, split in splits.items()}  # fmt: skip
    data_of = {name: features(backbone, PoseObjective(part, size, Augmentation(), "simcc"), start.facts)
               for name, part in parts.items()}  # fmt: skip
    place = Place(backbone.config.width, backbone.config.grid, size)
    result = {}
    for name, (kind, decoding, channels) in HEADS.items():
        torch.manual_seed(0)
        objective = PoseObjective(parts["train"], size, Augmentation(), decoding, channels)
        head = kind(objective.head, place)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        tokens, targets = data_of["train"]
        begun, curve = time.perf_counter(), []
        for epoch in range(1, epochs + 1):
            head.train()
            for i in torch.randperm(len(tokens)).split(32):
                optimizer.zero_grad()
                objective(head, tokens[i].float(), {key: value[i] for key, value in targets.items()})["loss"].backward()
                optimizer.step()
            head.eval()
            if epoch % 2 == 0:
                with torch.no_grad():
                    raw = torch.cat([head(part.float()) for part in data_of["val"][0].split(50)]).numpy()
                samples = parts["val"].samples
                joints = place_in_box(decode_joints(raw, decoding, size)[0], size, np.array([s.box for s in samples]))
                curve.append({"epoch": epoch, "PCK@0.2": pck(joints, [s.target for s in samples], parts["val"].labels),
                              "seconds": time.perf_counter() - begun})  # fmt: skip
        result[name] = {"parameters": sum(p.numel() for p in head.parameters()), "curve": curve}
        click.echo(f"{name}: {curve}")
    write_text(RESULT, json.dumps({"init": Path(init).name, "people": people, "heads": result}, indent=2) + "\n")


@torch.no_grad()
def features(backbone: nn.Module, objective: PoseObjective, facts: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tokens of all plain crops, in bfloat16, and their targets."""
    tokens, targets = [], []
    for start in range(0, len(objective), 32):
        examples = [objective.example(i, None) for i in range(start, min(start + 32, len(objective)))]
        images = torch.from_numpy(np.stack([e.pop("image") for e in examples])).permute(0, 3, 1, 2)
        tokens.append(backbone(normalize(images, tuple(facts["mean"]), tuple(facts["std"]))).bfloat16())
        targets += examples
    return torch.cat(tokens), {key: torch.from_numpy(np.stack([t[key] for t in targets])) for key in targets[0]}


if __name__ == "__main__":
    main()
