"""What ways of running several images with OpenVINO on a CPU take in time and in memory.

    python bench/openvino_requests.py BUNDLE [--out bench/results/openvino_requests.json]

BUNDLE has ``openvino-int8``. Each way is measured in a process of its own, in f32 and, where the CPU computes that
fast, in bf16; processes take turns, so that a busy moment meets all ways. Memory is what stays resident beyond the
imports, in MB of 1e6 bytes, before and after glibc gives back what compiling freed. The ways:

* ``lone``: one request on all threads, an image after the other;
* ``ones``: requests side by side, an image each, as the runtime has it once several images came;
* ``fours``: requests side by side, four images each, which the runtime had before.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from dpal_edge.manifest import Manifest
from dpal_edge.runtime._openvino import fix_batch, settings
from dpal_edge.runtime.backend import physical_cores
from dpal_edge.runtime.device import cpu_features

ROOT = Path(__file__).parents[1]
WAYS = {"lone": (1, 1), "ones": (physical_cores(), 1), "fours": (physical_cores(), 4)}  # requests, images of each
COUNTS = (1, 2, 4, 8, 16)
ROUNDS, CALLS = 3, 15


def resident_mb() -> float:
    """Return the resident memory of this process."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def child(path: Path, way: str, precision: str) -> dict[str, Any]:
    """Return the memory of a way, and the milliseconds of calls with each number of images that it can divide."""
    streams, size = WAYS[way]
    before = resident_mb()
    core = ov.Core()
    model = core.read_model(path)
    shape = list(model.input(0).partial_shape)[1:]
    fix_batch(model, size)
    compiled = core.compile_model(model, "CPU", settings("cpu", physical_cores(), precision, streams))
    requests = [compiled.create_infer_request() for _ in range(streams)]
    times: dict[str, float] = {}
    for count in (count for count in COUNTS if count % size == 0):
        images = np.random.default_rng(0).integers(0, 256, (count, *(s.get_length() for s in shape)), np.uint8)
        found = []
        for _ in range(CALLS + 2):
            start = time.perf_counter()
            for i in range(count // size + streams):  # each request takes its next part when its last is done
                request = requests[i % streams]
                if i >= streams:
                    request.wait()
                if i < count // size:
                    request.start_async({0: images[i * size : (i + 1) * size]})
            found.append(1e3 * (time.perf_counter() - start))
        times[str(count)] = statistics.median(found[2:])
    kept = resident_mb() - before
    ctypes.CDLL(None).malloc_trim(0)
    return {"mb": kept, "mb_after_trim": resident_mb() - before, "ms": times}


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "openvino_requests.json")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    manifest = Manifest.read(options.bundle)
    artifact = next(one for one in manifest.artifacts if one.target == "openvino-int8")
    if options.child:
        print(json.dumps(child(manifest.open_artifact(options.bundle, artifact), *options.child)))
        return
    precisions = ("f32", "bf16") if cpu_features().fast_bf16 else ("f32",)
    found: dict[str, list[dict[str, Any]]] = {f"{way} {precision}": [] for precision in precisions for way in WAYS}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            command = [sys.executable, __file__, str(options.bundle), "--child", *name.split()]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    results = {"model": manifest.model, "device": cpu_features().model, "threads": physical_cores(),
               "openvino": ov.__version__}  # fmt: skip
    for name, runs in found.items():
        results[name] = {
            "mb": round(statistics.median(run["mb"] for run in runs), 1),
            "mb_after_trim": round(statistics.median(run["mb_after_trim"] for run in runs), 1),
            "ms": {n: round(statistics.median(run["ms"][n] for run in runs), 2) for n in runs[0]["ms"]},
        }
        print(name, results[name])
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
