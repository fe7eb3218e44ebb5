"""Images per second of the data path, with colours and blur changed by the workers or on the device.

    python bench/augment.py [--device cuda] [--batch 256] [--workers 8] [--data DIR] [--out bench/results/augment.json]

For both settings of ``augment``, in turns: what one worker makes alone, what the device finishes alone (moving,
augmenting, normalising), and what comes out of the loader and the device together, which is the most that any training
loop could take in. All at the views of DPAL at 256x128. Without ``--data`` the images are synthetic JPEGs of 384x160.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dpal_edge.runtime.device import cpu_features
from dpal_edge.train.augment import to_views
from dpal_edge.train.config import build_config
from dpal_edge.train.data import Batch, PersonBatches
from dpal_edge.train.sources import ImageSource, open_source

VIEWS = ("base", "local", "crowd")
MODES = ("workers", "device")


def main() -> None:
    """Time both, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=8, help="that come out of the loader in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", help="folder of person crops")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = open_source((options.data or draw_images(Path(folder)),))
        rates = measure(source, options)
    report(rates, options)


def measure(source: ImageSource, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return images per second by mode and part of the path, one number for each repeat."""
    device = torch.device(options.device)
    rates: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    for repeat in range(options.repeats + 1):  # the first round warms up
        for mode in MODES:
            config = build_config({"batch": options.batch, "augment": mode})
            dataset = PersonBatches(source, config, VIEWS)
            batch = dataset[repeat]
            ready = batch.pin_memory() if device.type == "cuda" else batch
            parts: dict[str, Callable[[], int]] = {
                "one worker": lambda data=dataset, i=repeat: len(data[i].keys),
                "device": lambda ready=ready: finish(ready, device),
                "together": lambda data=dataset: stream(data, device, options),
            }
            for part, run in parts.items():
                start = time.perf_counter()
                images = run()
                rate = images / (time.perf_counter() - start)
                if repeat:
                    rates[mode].setdefault(part, []).append(rate)
    return rates


def finish(batch: Batch, device: torch.device) -> int:
    """Finish one batch on the device and wait for it."""
    views = to_views(batch, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(views.base)


def stream(dataset: PersonBatches, device: torch.device, options: argparse.Namespace) -> int:
    """Take batches from a loader and finish each, waiting for the device at the end."""
    pinned = device.type == "cuda"
    sampler = range(options.batches)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=options.workers, pin_memory=pinned)
    images = sum(len(to_views(batch, device).base) for batch in loader)
    if pinned:
        torch.cuda.synchronize()
    return images


def draw_images(folder: Path, count: int = 64) -> str:
    """Write smooth shapes with a little noise, which compress about as photos do."""
    rng = np.random.default_rng(0)
    for i in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (24, 10, 3)).astype(np.uint8)).resize((160, 384))
        noisy = np.asarray(shapes) * 0.92 + rng.integers(0, 20, (384, 160, 3))
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)
    return str(folder)


def report(rates: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """Print a table; write it as JSON where asked."""
    rows = {
        mode: {part: round(statistics.median(values), 1) for part, values in parts.items()}
        for mode, parts in rates.items()
    }
    result = {
        "what": "images/s of the data path, 1 global, 2 local and 1 crowd view of each image, 256x128",
        "images": options.data or "synthetic JPEGs of 384x160",
        "batch": options.batch,
        "workers": options.workers,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu_features().model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": rows,
    }
    print(f"{'augment':10}" + "".join(f"{part:>14}" for part in rows["workers"]) + "   images/s")
    for mode, row in rows.items():
        print(f"{mode:10}" + "".join(f"{rate:14.1f}" for rate in row.values()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
