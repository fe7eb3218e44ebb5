"""Whether the profiler tells what others tell, and what it costs itself.

    python bench/profile_agreement.py BUNDLE [--rounds 9] [--out bench/results/profile_agreement.json]

BUNDLE has ``onnx`` and ``openvino-int8``. Every round takes the same call by all ways, one after the other, each round
with another first; what is compared is the median over rounds of the ratio within a round. A round in which other
programs took more than a tenth of the CPU compares nothing: it is counted and taken again. The ways:

* the profiler: ``dpal-edge profile``'s own session with telemetry running, by the host's clock and by the engine's; of
  OpenVINO one request on all threads, as the others have it, while ``profile`` itself lets several images come first;
* a loop written by hand around ``backend.run``, as anybody would;
* OpenVINO's ``benchmark_app``, in a process of its own, one request at a time on as many threads: the engine's clock;
* for ONNX Runtime what ``onnxruntime_perf_test`` does: bound inputs and outputs, a run after the other, warm.

The profiler's cost is that of a call of an engine that does nothing: what is inside of the timed part adds to each
timing, what is outside only to the time that a profile takes. Both must be below 20 microseconds or 1 %.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
from numpy.typing import NDArray

from dpal_edge.manifest import Manifest
from dpal_edge.profile.forms import Form, find_forms
from dpal_edge.profile.report import describe_measurements
from dpal_edge.profile.sampler import Effort, Series
from dpal_edge.profile.session import Labels, Session
from dpal_edge.profile.telemetry import Telemetry
from dpal_edge.runtime.backend import DeviceClock, physical_cores
from dpal_edge.runtime.device import cpu_features
from dpal_edge.runtime.model import read_goldens

ROOT = Path(__file__).parents[1]
SECONDS, LEAST = 1.0, 20  # of each way in each round
EFFORT = Effort(least_calls=LEAST, least_s=SECONDS, usual_s=SECONDS, most_s=4 * SECONDS)
WARM = 10  # calls that the loops leave out, as benchmark_app leaves out its first
OTHERS, TRIES = 0.1, 6  # share of the CPU that others may take in a round, and rounds for each that counts
NOTHING = 20_000  # calls of the engine that does nothing


class Nothing:
    """An engine that does nothing."""

    name, inputs = "nothing", {"images": (None, 1, 1, 3)}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Return nothing."""
        return {}


def by_profiler(form: Form, feeds: Mapping[str, NDArray[np.uint8]]) -> dict[str, float]:
    """Return the profiler's medians by clock, of an engine that has run nothing else."""
    with Telemetry.open() as telemetry:
        session, backend = Session(telemetry, 1e3), form.open()
        clocks = ("device", "host") if isinstance(backend, DeviceClock) else ("host",)
        labels = Labels(what="call", form=form, runner=backend.name, batch=1, people=1)
        session.measure(labels, session._call(backend, feeds), clocks=clocks, decides="host", effort=EFFORT)
    return {m["clock"]: m["ms"]["p50"] for m in describe_measurements(session)}


def in_a_loop(call: Callable[[], object]) -> float:
    """Return the median of calls as a loop by hand finds it."""
    for _ in range(WARM):
        call()
    times, began = [], time.perf_counter()
    while len(times) < LEAST or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def by_benchmark_app(path: Path, size: tuple[int, int]) -> float:
    """Return the median latency that OpenVINO's benchmark_app tells."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("benchmark_app")), "-m", str(path), "-d", "CPU", "-api", "sync",
            "-hint", "none", "-nstreams", "1", "-nireq", "1", "-nthreads", str(physical_cores()),
            "-infer_precision", "f32", "-shape", f"[1,{size[0]},{size[1]},3]", "-t", str(int(SECONDS)),
            "-report_type", "no_counters", "-json_stats", "-report_folder", folder,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        told = json.loads(Path(folder, "benchmark_report.json").read_text(encoding="utf-8"))
    return float(told["execution_results"]["latency (ms)"])


def perf_test(path: Path, image: NDArray[np.uint8]) -> Callable[[], object]:
    """Return a call as onnxruntime_perf_test makes it, with the settings of our backend."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    bound = session.io_binding()
    bound.bind_cpu_input(session.get_inputs()[0].name, image)
    for output in session.get_outputs():
        bound.bind_output(output.name)
    return lambda: session.run_with_iobinding(bound)


def own_cost() -> dict[str, float]:
    """Return what the profiler adds, in microseconds of a call, and how long it takes to read the sensors."""
    with Telemetry.open(interval_s=3600) as telemetry:
        session = Session(telemetry, 1e3)
        step = session._call(Nothing(), {"images": np.zeros((1, 1, 1, 3), np.uint8)})
        series, effort = Series(), Effort(least_calls=NOTHING, least_s=0, usual_s=0, most_s=60)
        series.collect(step, effort, decides="host", check=session._check_heat)  # warm
        series = Series()
        start = time.perf_counter()
        series.collect(step, effort, decides="host", check=session._check_heat)
        whole_us = 1e6 * (time.perf_counter() - start) / NOTHING
        inside_us = 1e3 * statistics.median(series.timings_ms["host"])
        samples = []
        for _ in range(20):
            start = time.perf_counter()
            telemetry.sample()
            samples.append(1e3 * (time.perf_counter() - start))
    return {
        "inside_timings_us": round(inside_us, 3),
        "between_calls_us": round(whole_us - inside_us, 3),
        "reading_sensors_ms": round(statistics.median(samples), 3),
    }


def others_s() -> float:
    """Return the seconds of CPU that others than this process and its children took since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ticks = [int(field) for field in fields]
    own = os.times()
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


def compare(rounds: Sequence[Mapping[str, float]], busy: int) -> dict[str, Any]:
    """Return the medians over rounds, and how far the profiler's are from the others' by the same clock."""
    medians = {way: round(statistics.median(found[way] for found in rounds), 4) for way in rounds[0]}
    gaps = {}
    for other, own in (("loop", "profiler host"), ("perf_test", "profiler host"), ("benchmark_app", "profiler device")):
        if other in medians:
            ratio = statistics.median(found[own] / found[other] for found in rounds)
            gaps[f"{own} against {other}"] = round(100 * (ratio - 1), 2)
    kept = [{way: round(ms, 4) for way, ms in found.items()} for found in rounds]
    return {"percent": gaps, "p50_ms": medians, "busy_rounds": busy, "rounds": kept}


def measure(bundle: Path, form: Form, manifest: Manifest, rounds: int) -> dict[str, Any]:
    """Return what all ways tell of a form, one image at a time."""
    images, _ = read_goldens(bundle, manifest)
    image = np.ascontiguousarray(images[:1])
    backend = form.open()
    ways: list[Callable[[], dict[str, float]]] = [
        lambda: {f"profiler {clock}": ms for clock, ms in by_profiler(form, {manifest.input.name: image}).items()},
        lambda: {"loop": in_a_loop(lambda: backend.run({manifest.input.name: image}))},
    ]
    if form.engine == "onnxruntime":
        bound = perf_test(form.path, image)
        ways.append(lambda: {"perf_test": in_a_loop(bound)})
    else:
        ways.append(lambda: {"benchmark_app": by_benchmark_app(form.path, manifest.input.size)})
    quiet, busy = [], []
    while len(quiet) < rounds and len(quiet) + len(busy) < TRIES * rounds:
        before, start = others_s(), time.perf_counter()
        found: dict[str, float] = {}
        first = (len(quiet) + len(busy)) % len(ways)
        for way in (*ways[first:], *ways[:first]):
            found |= way()
        share = (others_s() - before) / (time.perf_counter() - start) / cpu_features().cores
        (quiet if share < OTHERS else busy).append(found)
    return compare(quiet or busy, len(busy))


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "profile_agreement.json")
    options = parser.parse_args()
    manifest = Manifest.read(options.bundle)
    forms, _ = find_forms(options.bundle, manifest, ())
    wanted = {("onnx", "onnxruntime"), ("onnx", "openvino"), ("openvino-int8", "openvino")}
    results: dict[str, Any] = {
        "model": manifest.model,
        "device": cpu_features().model,
        "threads": physical_cores(),
        "onnxruntime": ort.__version__,
        "openvino": ov.__version__,
        "profiler": own_cost(),
    }
    for form in forms:
        if (form.target, form.engine) in wanted and form.computes is None:
            results[form.label] = measure(options.bundle, form, manifest, options.rounds)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for name, part in results.items():
        print(name, part if not isinstance(part, dict) else {k: v for k, v in part.items() if k != "rounds"})


if __name__ == "__main__":
    main()
