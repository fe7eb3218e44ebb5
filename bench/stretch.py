"""What a stretch of training changed, and where: weights between those before it and after it, and blocks of either.

    python bench/stretch.py --before FILE --after FILE --task reid=DIR --task pose=DIR [--out FILE]

Scores, by ``dpal-edge evaluate``, of models whose weights lie a quarter and half of the way (interpolated as by
Wortsman et al., 2022), and of models that have the first, middle or last third of the blocks from after the stretch and
the rest from before. Heads that the stretch trained are as after it where blocks are mixed, since they were made for
what they see; other heads stay as they were.

Filed is what 160 updates of 64 for the embedding alone changed in a student that shipped (student.yaml with hue 0.05,
muted 0.15, mix 0.1, ema_decay 0.97). Before them its whitened map had been fitted anew, by ridge regression, to its
teacher's embeddings.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpal_edge.files import sha256_of, write_text
from dpal_edge.models.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from dpal_edge.models.human import load_human

RESULTS = Path(__file__).parent / "results" / "stretch.json"
SHARES = (0.25, 0.5)
THIRDS = ("first", "middle", "last")
METRICS = {"pose": "PCK@0.2", "parsing": "mIoU", "attributes": "mA", "reid": "rank-1"}

State = dict[str, torch.Tensor]


def main() -> None:
    """Print the table and file it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True, help="checkpoint or run folder")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    old, (model, metadata) = load_human(options.before)[0].state_dict(), load_human(options.after)
    new = model.state_dict()
    depth = metadata["architecture"]["depth"]

    def mixed(chosen: Callable[[str], float]) -> State:
        """Weights so far from old to new, by name; what the stretch did not have stays."""
        return {n: v.lerp(new[n].to(v), chosen(n)) if n in new and v.is_floating_point() else v for n, v in old.items()}

    def so_far(share: float) -> State:
        return mixed(lambda _: share)

    def of_third(number: int) -> State:
        return mixed(lambda name: float(name.startswith("heads.") or _third(name, depth) == number))

    rows = {"before": old, **{f"{share:g} of the way": so_far(share) for share in SHARES}, "after": so_far(1.0)}
    rows |= {f"{name} third of the blocks from after": of_third(number) for number, name in enumerate(THIRDS)}
    facts = read_checkpoint(options.before).metadata
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in rows.items():
            file = Path(folder) / "model.safetensors"
            write_checkpoint(file, state, facts)
            results[name] = evaluate(file, options.task)
            told = "  ".join(f"{task} {scores[METRICS[task]]:.3f}" for task, scores in results[name].items())
            print(f"{name:35} {told}", flush=True)
    newest = list_checkpoints(options.after)[-1] if options.after.is_dir() else options.after
    document = {"before": sha256_of(options.before), "after": sha256_of(newest), "results": results}
    write_text(options.out, json.dumps(document, indent=2) + "\n")


def _third(name: str, depth: int) -> int:
    """Return the third of a ViT's blocks, 0 to 2, of a weight: the embedding goes with the first, the norm the last."""
    parts = name.split(".")
    if "blocks" in parts:
        return 3 * int(parts[parts.index("blocks") + 1]) // depth
    return 2 if "norm" in parts else 0


def evaluate(model: Path, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of each task."""
    command = [sys.executable, "-m", "dpal_edge", "evaluate", str(model), "--json"]
    command += [part for task in tasks for part in ("--task", task)]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {task: found["metrics"] for task, found in told["tasks"].items()}


if __name__ == "__main__":
    main()
