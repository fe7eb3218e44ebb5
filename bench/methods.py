"""Every method at one budget: train, probe the frozen student, and print the table.

    python bench/methods.py --teacher SPEC --data DIR... --task NAME=DIR... --work DIR [--seeds 3] [--images 6000]
        [--variants dpade static ...] [--size 128 64] [--jobs 2] [--out bench/results/methods.json]

Equal budget means the same images, the same updates, batch, learning rate, student (one number of heads in all blocks,
so that TinyMIM can pair its maps with the teacher's) and teacher layer. Views are drawn once for each image and shared
by all runs (``data_seed``, ``view_variants=1``), and so is what the teacher says of them (``teacher_cache``): seeds
differ in the initial weights and nothing else. The backbone as trained is probed, not its running mean, which a run
this short does not help. ``random`` is the untrained student. A run that is done is kept in the folder --work, so the
script may be interrupted and started again. TinyMIM is probed after block 11: its loss never reaches most of block 12.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpal_edge.runtime.device import cpu_features

VARIANTS: dict[str, list[str]] = {
    "random": [],
    "dpade": ["method=dpal"],
    "static": ["method=dpal", "decoder=static"],
    "shared": ["method=dpal", "decoder=shared"],
    "proteus": ["method=proteus"],
    "tinymim": ["method=tinymim"],
}

# TinyMIM's loss never reaches most of its last block, which stays random.
PROBED = {"tinymim": ["--layer", "11"]}


def main() -> None:
    """Run what is not done yet, ``--jobs`` at a time, and print means and deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", nargs="+", action="extend", required=True)
    parser.add_argument("--task", nargs="+", action="extend", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--heads", default="6")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64))
    parser.add_argument("--limit", type=int, default=1000, help="images of each split that a probe looks at")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    wanted = [(variant, seed) for seed in range(options.seeds) for variant in options.variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        scores = list(pool.map(lambda one: scores_of(*one, options), wanted))
    results: dict[str, list[dict[str, float]]] = {}
    for (variant, _), found in zip(wanted, scores, strict=True):
        results.setdefault(variant, []).append(found)
    report(results, options)


def scores_of(variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and probe one variant with one seed, or read what an earlier start of this script found."""
    path = options.work / f"{variant}-{seed}.json"
    if not path.exists():
        run = options.work / f"{variant}-{seed}"
        model, drawn = "random:vit_tiny", seed  # an untrained student takes its seed from the probe
        if variant != "random":
            call("train", *training(variant, seed, options), "--out", str(run), "--resume")
            model, drawn = str(run), 0
        tasks = [text for task in options.task for text in ("--task", task)]
        compared = ["--teacher", options.teacher, "--data", held_out(options)]
        size = ["--size", *map(str, options.size), "--limit", str(options.limit), "--seed", str(drawn)]
        found = json.loads(call("probe", model, *tasks, *compared, *size, *PROBED.get(variant, []), "--json"))
        path.write_text(json.dumps({"scores": flatten(found), "speed": speed(run)}) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def training(variant: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Options of one training."""
    height, width = options.size
    settings = {
        "size": [height, width],
        "local_size": [height // 2, width * 3 // 4],
        "crowd_size": [height, height],
        "batch": options.batch,
        "base_lr": options.lr * 256 / options.batch,
        "warmup": 0.1,
        "steps": options.images // options.batch,
        "heads": options.heads,
        "seed": seed,
        "data_seed": 0,
        "view_variants": 1,
        "teacher_cache": str(options.work / "cache"),
        "validation_images": 0,
        "save_every": 100,
        "log_every": 10,
        "keep": 1,
        "trackers": [],
    }
    given = [text for key, value in settings.items() for text in ("--set", f"{key}={json.dumps(value)}")]
    own = [text for setting in VARIANTS[variant] for text in ("--set", setting)]
    data = [text for folder in options.data for text in ("--data", folder)]
    return ["--teacher", options.teacher, *data, *given, *own]


def held_out(options: argparse.Namespace) -> str:
    """Folder of crops on which teacher and student are compared: the gallery of the re-identification task."""
    folder = next(task.partition("=")[2] for task in options.task if task.startswith("reid="))
    return str(Path(folder, "bounding_box_test"))


def call(*arguments: str) -> str:
    """Run ``dpal-edge`` on one thread; return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpal_edge", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def flatten(found: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of ``probe --json`` as task/metric."""
    scores = {f"{task}/{key}": value for task, part in found["tasks"].items() for key, value in part["metrics"].items()}
    if found.get("similarity"):
        scores |= {f"teacher/{key}": value for key, value in found["similarity"]["metrics"].items()}
    return scores


def speed(run: Path) -> float | None:
    """Median images/s of a run; those that fill the teacher cache are slower."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    return statistics.median(json.loads(line)["images_per_s"] for line in path.read_text(encoding="utf-8").splitlines())


def report(results: dict[str, list[dict]], options: argparse.Namespace) -> None:
    """Print mean and standard deviation over seeds; write them as JSON where asked."""
    metrics = list(next(iter(results.values()))[0]["scores"])
    table = {}
    for variant, runs in results.items():
        columns = {metric: [run["scores"][metric] for run in runs] for metric in metrics}
        table[variant] = {
            metric: {"mean": round(statistics.mean(values), 4), "sd": round(statistics.pstdev(values), 4)}
            for metric, values in columns.items()
        }
    for metric in metrics:
        cells = (f"{variant} {row[metric]['mean']:.3f}±{row[metric]['sd']:.3f}" for variant, row in table.items())
        print(f"{metric:28}", "  ".join(cells))
    if options.out:
        facts = {
            "what": "frozen features after training at one budget; mean and deviation over seeds",
            "budget": {"images": options.images, "batch": options.batch, "updates": options.images // options.batch},
            "size": list(options.size),
            "lr": options.lr,
            "seeds": options.seeds,
            "probe_images_per_split": options.limit,
            "device": cpu_features().model,
            "results": table,
        }
        options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
