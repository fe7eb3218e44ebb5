"""How much AdamW and Muon learn from the same images: held-out loss after one short budget, each at several rates.

    python bench/optimizers.py --pose COCO_FOLDER --parsing LIP_FOLDER --teacher SPEC --images DIR --work DIR
        [--finetune 120] [--distil 80]

Two beginnings, each from random weights at 128x64: pose and parsing learned from labels (``finetune``, 64 images an
update), and a teacher's patterns (``train``, DPAL, 32 an update). A learning rate that suits one optimizer may not suit
the other, so each is tried at three and its best one counts. What Muon costs does not depend on the batch: 15 products
per matrix, 24 GFLOP for all of a ViT-Ti, against 68 of an update of 64 crops of 128x64, 230 of 96 of 192x96 and 1,070
of 256 of 256x128. Writes ``bench/results/optimizers.json``.
"""

import itertools
import json
import platform
from pathlib import Path

import click
import torch

from dpal_edge.files import write_text
from dpal_edge.finetune.config import build_config as finetune_config
from dpal_edge.finetune.run import run_finetuning
from dpal_edge.train.config import build_config as train_config
from dpal_edge.train.run import run_training

RESULT = Path(__file__).parent / "results" / "optimizers.json"
OPTIMIZERS = ("adamw", "muon")
FACTORS = (0.5, 1.0, 2.0)  # of the usual learning rate
COMMON = {"log_every": 10, "save_every": 10_000, "trackers": []}


@click.command()
@click.option("--pose", required=True)
@click.option("--parsing", required=True)
@click.option("--teacher", required=True)
@click.option("--images", required=True)
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--finetune", default=120, show_default=True, help="updates")
@click.option("--distil", default=80, show_default=True, help="updates")
def main(pose: str, parsing: str, teacher: str, images: str, work: Path, finetune: int, distil: int) -> None:
    """Run every optimizer at every rate; print and write the losses."""
    labelled = {
        "init": "random:vit_tiny", "task": [f"pose={pose}", f"parsing={parsing}"], "share": ["pose=3", "parsing=1"],
        "size": [128, 64], "batch": 64, "steps": finetune, "layer_decay": 1.0, "ema_decay": 0.9,
    }  # fmt: skip
    taught = {
        "teacher": teacher, "data": [images], "size": [128, 64], "local_size": [48, 32], "crowd_size": [96, 96],
        "batch": 32, "steps": distil, "warmup": 0.2, "ema_decay": 0.9,
    }  # fmt: skip
    found = []
    for optimizer, factor in itertools.product(OPTIMIZERS, FACTORS):
        fields = {**COMMON, "optimizer": optimizer}
        name = f"{optimizer}-{factor:g}"
        config = finetune_config({**fields, **labelled, "lr": 1e-3 * factor})
        one = run_finetuning(config, work / f"finetune-{name}")
        two = run_training(train_config({**fields, **taught, "base_lr": 8e-3 * factor}), work / f"train-{name}")
        for run, learned, rate in (("finetune", one, config.lr), ("train", two, 1e-3 * factor)):
            loss, speed = min(learned.validation.values()), learned.images_per_s
            found.append({"run": run, "optimizer": optimizer, "lr": rate, "loss": loss, "images_per_s": speed})
            click.echo(f"{run:8} {optimizer:6} {rate:.4g}: held-out loss {loss:.3f}, {speed:.1f} images/s")
    result = {
        "updates": {"finetune": finetune, "train": distil},
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__,
                    "threads": torch.get_num_threads()},
        "runs": found,
    }  # fmt: skip
    write_text(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
