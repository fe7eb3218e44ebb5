"""Where a model's time goes in OpenVINO on a CPU: batches and single images, float32, bfloat16 and INT8, and the floor.

    python bench/openvino_speed.py BUNDLE [--out bench/results/openvino_speed.json]

BUNDLE has ``onnx`` and ``openvino-int8``. All forms take turns: a free batch, a fixed one, and requests side by side as
the runtime has them (``backend``). The floor is the multiply-accumulates over the rate that a product of the model's
most common shape reaches here, in each type: no kernel can be faster.
"""

import argparse
import collections
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
from openvino import opset13 as ops

from dpal_edge.manifest import Manifest
from dpal_edge.runtime.backend import open_backend, physical_cores
from dpal_edge.runtime.device import cpu_features

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 4, 8)
CALLS = 25
ROWS, INSIDE, OUTSIDE = 1032, 192, 768  # of a ViT-Ti's widest product at batch 8


def compile_model(core: ov.Core, model: ov.Model, precision: str, *, count: bool = False) -> ov.CompiledModel:
    """Compile for one request on the physical cores."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
                                "INFERENCE_NUM_THREADS": physical_cores(), "PERF_COUNT": count}  # fmt: skip
    return core.compile_model(model, "CPU", settings)


def in_turns(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def kernels(core: ov.Core, path: Path, precision: str, images: np.ndarray) -> dict[str, float]:
    """Return the milliseconds of each kind of kernel, by OpenVINO's own counters, the longest first."""
    model = core.read_model(path)
    model.reshape({model.input(0): list(images.shape)})
    request = compile_model(core, model, precision, count=True).create_infer_request()
    totals: collections.Counter[str] = collections.Counter()
    for i in range(CALLS + 2):
        request.infer({0: images})
        for part in request.profiling_info if i >= 2 else ():
            if part.status == part.status.EXECUTED:
                totals[f"{part.node_type} {part.exec_type}"] += 1e3 * part.real_time.total_seconds() / CALLS
    return {name: round(value, 3) for name, value in totals.most_common(12)}


def multiplications(path: Path) -> int:
    """Return the multiply-accumulates of one image: products with weights, convolutions, and attention's two."""
    model = onnx.load(path)
    [first] = model.graph.input
    first.type.tensor_type.shape.dim[0].dim_value = 1
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # where the batch is free
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            first, second = (shapes[name] for name in node.input[:2])
            total += int(np.prod(shapes[node.output[0]])) * (
                int(np.prod(second[1:])) if node.op_type == "Conv" else first[-1]
            )
    return total


def product(core: ov.Core, precision: str) -> Any:
    """Return a call that multiplies ROWS x INSIDE by INSIDE x OUTSIDE, twenty times one after the other and back."""
    rng = np.random.default_rng(0)
    value = start = ops.parameter([ROWS, INSIDE], np.float32)
    for _ in range(20):
        for inside, outside in ((INSIDE, OUTSIDE), (OUTSIDE, INSIDE)):
            weight = ops.constant(rng.normal(0, inside**-0.5, (inside, outside)).astype(np.float32))
            bounds = [ops.constant(np.float32(bound)) for bound in (-4.0, 4.0)]
            if precision == "int8":
                value = ops.fake_quantize(value, *bounds, *bounds, 255)
                weight = ops.fake_quantize(weight, *bounds, *bounds, 255)
            value = ops.matmul(value, weight, transpose_a=False, transpose_b=False)
    model = ov.Model([value], [start])
    request = compile_model(core, model, "f32" if precision == "int8" else precision).create_infer_request()
    data = rng.normal(size=(ROWS, INSIDE)).astype(np.float32)
    return lambda: request.infer({0: data})


def main() -> None:
    """Measure, and file what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "openvino_speed.json")
    options = parser.parse_args()
    core, manifest = ov.Core(), Manifest.read(options.bundle)
    files = {a.target: manifest.open_artifact(options.bundle, a) for a in manifest.artifacts}
    forms = [("onnx", "f32"), ("onnx", "bf16"), ("openvino-int8", "f32"), ("openvino-int8", "bf16")]
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {"model": manifest.model, "device": cpu_features().model,
                               "flags": list(cpu_features().flags), "openvino": ov.__version__}  # fmt: skip
    for batch in BATCHES:
        images = rng.integers(0, 256, (batch, *manifest.input.size, 3), np.uint8)
        calls = {}
        for target, precision in forms:
            for shape in ("free", "fixed"):
                model = core.read_model(files[target])
                if shape == "fixed":
                    model.reshape({model.input(0): list(images.shape)})
                request = compile_model(core, model, precision).create_infer_request()
                calls[f"{target} {precision} {shape}"] = partial(request.infer, {0: images})
            backend = open_backend(files[target], engine="openvino", precision=precision)
            calls[f"{target} {precision} backend"] = partial(backend.run, {manifest.input.name: images})
        found = in_turns(calls)
        results[f"ms_per_image_batch_{batch}"] = {name: round(value / batch, 3) for name, value in found.items()}
    macs = 20 * 2 * ROWS * INSIDE * OUTSIDE
    rates = {
        name: macs / 1e6 / ms for name, ms in in_turns({n: product(core, n) for n in ("f32", "bf16", "int8")}).items()
    }
    own = multiplications(files["onnx"])
    results |= {"gmacs_per_s": {n: round(rate, 1) for n, rate in rates.items()}, "gmacs_per_image": round(own / 1e9, 3),
                "floor_ms_per_image": {n: round(own / 1e6 / rate, 2) for n, rate in rates.items()},
                "kernels_ms_batch_8": {f"{t} {p}": kernels(core, files[t], p, images) for t, p in forms}}  # fmt: skip
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
