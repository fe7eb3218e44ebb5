"""What the person detector finds and how long it takes at several input sizes, in one run.

    python bench/detector_size.py --data ../shared/data/coco_person [--model FILE] [--size 256x336 ...] [--out FILE]

Each size is exported with the same weights and scored as a bundle. Times are of whole calls on one frame, with
letterbox and decoding, sizes taking turns: medians, and their ratio to the first size's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dpal_edge.files import sha256_of, write_text
from dpal_edge.runtime.detector import ModelDetector
from dpal_edge.runtime.device import cpu_features
from dpal_edge.tasks.detection_layouts import read_detection
from dpal_edge.tasks.image import open_sample

RESULTS = Path(__file__).parent / "results" / "detector_size.json"
ASSETS = Path(__file__).parents[1] / "dpal_edge" / "assets"
SIZES = ("192x256", "256x336", "320x416", "384x512")
ROUNDS = 30


def main() -> None:
    """Print the table and file it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ASSETS / "person_detector.safetensors")
    parser.add_argument("--size", action="append", metavar="HxW")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    samples = read_detection(options.data, "val").samples
    frames = [np.ascontiguousarray(np.asarray(open_sample(sample))[..., ::-1]) for sample in samples[:ROUNDS]]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        detectors = {}
        for size in options.size or SIZES:
            bundle = Path(folder) / size
            dpal_edge("export", options.model, "--target", "onnx", "--size", *size.split("x"), "--out", bundle,
                      "--calibration", samples[0].image.parent)  # fmt: skip
            engine = ("--engine", options.engine)
            told = dpal_edge("evaluate", bundle, "--task", f"detection={options.data}", *engine, "--json")
            results[size] = {"metrics": json.loads(told)["tasks"]["detection"]["metrics"]}
            detectors[size] = ModelDetector.open(bundle, engine=options.engine)
            stack.callback(detectors[size].close)
        times: dict[str, list[float]] = {size: [] for size in results}
        for frame in frames:
            for size, detector in detectors.items():
                start = time.perf_counter()
                detector(frame)
                times[size].append(1000 * (time.perf_counter() - start))
    first = next(iter(times))
    for size, result in results.items():
        result["ms"] = statistics.median(times[size])
        result["times_first"] = statistics.median(a / b for a, b in zip(times[size], times[first], strict=True))
        found = "  ".join(f"{name} {result['metrics'][name]:.3f}" for name in ("AP50", "AP", "recall50"))
        print(f"{size:9} {found}  {result['ms']:6.1f} ms  {result['times_first']:.2f} times {first}")
    facts = {"device": cpu_features().model, "flags": list(cpu_features().flags), "engine": options.engine}
    document = {"model": options.model.name, "sha256": sha256_of(options.model), "data": options.data.name, **facts}
    write_text(options.out, json.dumps({**document, "results": results}, indent=2) + "\n")


def dpal_edge(*arguments: object) -> bytes:
    """Run a command and return what it printed."""
    command = [sys.executable, "-m", "dpal_edge", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
