"""Where the time of one call goes, by each engine's own profile, mapped back to the blocks of the model."""

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable
from dpal_edge.profile.graph import NORMS, OTHER, Graph
from dpal_edge.profile.graph_files import (
    graph_of_openvino,
    random_images,
    read_graph,
    time_ms,
    trace_onnxruntime,
)
from dpal_edge.runtime.backend import open_backend, physical_cores

SEVERAL = "several groups"  # of a kernel that computes parts of more than two blocks
_MOVEMENT = re.compile(
    r"(?i)transpose|permut|reorder|reshape|squeeze|slice|split|concat|gather|expand|broadcast|tile|shape|shuffle|"
    r"reformat|cast|convert$|copy|memcpy|move|pad$"
)
_QUANTIZING = re.compile(r"^(Dynamic)?(Dequantize|Quantize)Linear$|^FakeQuantize$")

_PRODUCT = re.compile(r"(?i)fullyconnected|matmul|gemm|conv(?!ert)|correlation|einsum|attention")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")  # in the notes that TensorRT keeps of a kernel
_TYPES = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8", "i8": "int8",
          "u8": "int8", "half": "f16", "fp16": "f16", "fp32": "f32", "fp8": "f8", "f32": "f32", "f16": "f16",
          "bf16": "bf16"}  # fmt: skip
_TYPE_WORD = re.compile(r"(?i)\b(bfloat16|bf16|float16|float|fp8|fp16|fp32|half|u?int8)\b")
# What ONNX Runtime puts before the name of a tensor that it casts, and after that of one in its own layout.
_CAST, _BLOCKED = "InsertedPrecisionFreeCast_", "_nchwc"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One thing that an engine ran."""

    name: str  # as the engine calls it
    kind: str  # for example "FullyConnected"
    kernel: str = ""  # which implementation, where the engine tells
    precision: str = ""  # that it computes in: int8, f8, f16, bf16, f32; empty where unknown
    ms: float  # mean of all calls
    group: str = OTHER
    found: str = ""  # how the group was found: by "name", through the engine's "graph", by the "order" of kernels
    multiplies: bool = False  # whether it computes a matrix product or a convolution


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """What one engine told."""

    source: str
    walls_ms: Sequence[float]
    kernels: Sequence[Kernel]
    graph: Graph | None
    fused: int  # attentions that run as one kernel
    missing: tuple[str, ...] = ()


def profile_layers(
    path: Path,
    *,
    engine: str,
    batch: int,
    calls: int = 30,
    graph: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """Return where the time of a call goes, JSON-ready; docs/profile.md describes it as an entry of "layers".

    OpenVINO is one request of ``batch`` images on all threads here; the runtime divides many images among requests.

    Args:
        path: an artifact of a bundle, or an engine that was built of one.
        engine: that runs it.
        batch: images of a call.
        calls: that are averaged; as many before do not count.
        graph: the ONNX file that a TensorRT engine was built of; without, no operations and no bytes are known.
        device: as for ``open_backend``, like the next two.
        threads: likewise.
        precision: likewise.

    Raises:
        BackendUnavailable: the engine, the device or the precision does not exist here.
        ModelFileError: the file is damaged, or the engine cannot run it.
        ValueError: ``batch`` or ``calls`` is below 1.
    """
    if batch < 1 or calls < 1:
        raise ValueError(f"batch is {batch} and calls is {calls}, expected 1 or more")
    backend = open_backend(path, engine=engine, device=device, threads=threads, precision=precision)
    feeds = {name: random_images(shape, batch, np.uint8) for name, shape in backend.inputs.items()}
    for _ in range(3):
        backend.run(feeds)
    plain = [time_ms(lambda: backend.run(feeds)) for _ in range(calls)]
    read = _READERS[engine]
    profile = read(_Asked(path, batch, calls, graph, device, threads or physical_cores(), precision, feeds))
    return {"file": path.name, "engine": backend.name, "source": profile.source, "batch": batch, "calls": calls,
            "plain_ms": statistics.median(plain), **_summarize(profile)}  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    path: Path
    batch: int
    calls: int
    graph: Path | None
    device: str | None
    threads: int
    precision: str | None
    feeds: Mapping[str, NDArray[Any]]


def _summarize(profile: _Profile) -> dict[str, Any]:
    """Return the sums and the groups of a profile."""
    host, total = statistics.fmean(profile.walls_ms), sum(kernel.ms for kernel in profile.kernels)
    graph = profile.graph
    own = list(dict.fromkeys(graph.groups[op.name] for op in graph.ops)) if graph else []
    by_group: dict[str, list[Kernel]] = {name: [] for name in own}
    for kernel in profile.kernels:
        by_group.setdefault(kernel.group, []).append(kernel)
    groups = [_group(name, kernels, graph, total) for name, kernels in by_group.items()]
    return {
        "host_ms": host,
        "sum_ms": total,
        "unaccounted_share": (host - total) / host,
        "groups": [group for group in groups if group["kernels"] or group["operations"]],
        "kernels": [
            {"name": k.name, "kind": k.kind, "kernel": k.kernel, "precision": k.precision, "group": k.group,
             "found": k.found, "ms": round(k.ms, 6)}
            for k in profile.kernels
        ],
        "attention": graph and {"blocks": _attentions(graph), "fused": profile.fused},
        "missing": list(profile.missing),
    }  # fmt: skip


def _group(name: str, kernels: Sequence[Kernel], graph: Graph | None, total: float) -> dict[str, Any]:
    precisions: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        if kernel.precision and kernel.multiplies:
            precisions[kernel.precision] += kernel.ms
    ms = sum(kernel.ms for kernel in kernels)
    work = graph.work(name) if graph else None
    return {
        "group": name,
        "ms": ms,
        "share": ms / total if total else 0.0,
        "kernels": len(kernels),
        "precisions": dict(precisions),
        "movement_ms": sum(kernel.ms for kernel in kernels if _MOVEMENT.search(kernel.kind)),
        "quantize_ms": sum(kernel.ms for kernel in kernels if _QUANTIZING.search(kernel.kind)),
        "operations": work and work.operations,
        "int8_operations": work and work.int8_operations,
        "weight_bytes": work and work.weight_bytes,
        "activation_bytes": work and work.activation_bytes,
        "half_weight_bytes": work and work.half_weight_bytes,
    }


def _attentions(graph: Graph) -> int:
    return sum(op.kind in ("Softmax", "SoftMax", "ScaledDotProductAttention") for op in graph.ops)


def _by_order(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Give kernels whose group is not found that of the kernel before them, or of the first."""
    last = next((kernel.group for kernel in kernels if kernel.found), OTHER)
    placed = []
    for kernel in kernels:
        last = kernel.group if kernel.found else last
        placed.append(kernel if kernel.found else replace(kernel, group=last, found="order"))
    return placed


def _profile_onnxruntime(asked: _Asked) -> _Profile:
    from dpal_edge.runtime._onnxruntime import DEVICE, PROVIDERS, session_options

    device = asked.device or DEVICE
    options = session_options(device, asked.threads)
    trace = trace_onnxruntime(asked.path, options, PROVIDERS[device], asked.batch, calls=asked.calls)
    graph = read_graph(asked.path, asked.batch)
    kernels = []
    for told in trace.kernels:
        name = told["name"]
        group = graph.find([name, name.removeprefix(_CAST), name.removesuffix(_BLOCKED)])
        types = [_TYPES[kind] for one in told["input_type_shape"] for kind in one if kind in _TYPES]
        kernels.append(Kernel(name=name, kind=told["op_name"], kernel=told["provider"], ms=told["ms"],
                              precision=types[0] if types else "", group=group or OTHER,
                              found="name" if group else "",
                              multiplies=bool(_PRODUCT.search(told["op_name"]))))  # fmt: skip
    fused = sum("Attention" in kernel.kind for kernel in kernels)
    return _Profile(source="ONNX Runtime profiling", walls_ms=trace.walls_ms, kernels=_by_order(kernels), graph=graph,
                    fused=fused)  # fmt: skip


def _profile_openvino(asked: _Asked) -> _Profile:
    from dpal_edge.runtime._openvino import DEVICE, DEVICES, core, fix_batch, settings

    device = asked.device or DEVICE
    model = core().read_model(str(asked.path))
    fix_batch(model, asked.batch)
    graph = graph_of_openvino(model)
    how = settings(device, asked.threads, asked.precision or "f32", 1) | {"PERF_COUNT": True}
    compiled = core().compile_model(model, DEVICES[device], how)
    request = compiled.create_infer_request()
    walls: list[float] = []
    totals: dict[str, Kernel] = {}
    for i in range(2 * asked.calls):
        wall = time_ms(lambda: request.infer(dict(asked.feeds)))
        if i >= asked.calls:
            walls.append(wall)
            _add(totals, request.profiling_info, asked.calls)
    kernels = _place(list(totals.values()), compiled.get_runtime_model(), graph)
    separate = sum(kernel.kind.lower() == "softmax" for kernel in kernels)
    return _Profile(source="OpenVINO counters", walls_ms=walls, kernels=kernels, graph=graph,
                    fused=_attentions(graph) - separate)  # fmt: skip


def _add(totals: dict[str, Kernel], told: Any, calls: int) -> None:
    """Add what OpenVINO counted of one call."""
    for part in told:
        if part.status != part.status.EXECUTED:
            continue
        ms = 1e3 * part.real_time.total_seconds() / calls
        kernel, _, kind = part.exec_type.rpartition("_")
        new = Kernel(
            name=part.node_name, kind=part.node_type, kernel=kernel, precision=_TYPES.get(kind.lower(), ""), ms=0
        )
        before = totals.get(part.node_name, new)
        totals[part.node_name] = replace(before, ms=before.ms + ms)


def _place(kernels: Sequence[Kernel], compiled: Any, graph: Graph) -> list[Kernel]:
    """Find the groups of kernels by what OpenVINO made them of, or by their neighbours in the graph that it runs."""
    products = {op.name for op in graph.ops if graph.operations(op)}
    kinds: dict[str, str] = {}
    known: dict[str, str] = {}
    multiplying = set()
    for node in compiled.get_ordered_ops():
        name, told = node.get_friendly_name(), node.get_rt_info()
        kinds[name] = str(told["layerType"].astype(str))
        names = [name, *told["originalLayersNames"].astype(str).split(",")]
        if (group := graph.find(names)) is not None:
            known[name] = group
        if _PRODUCT.search(kinds[name]) or not products.isdisjoint(names):
            multiplying.add(name)
    executed = graph_of_openvino(compiled, kinds, known)
    return [
        replace(kernel, group=known.get(kernel.name) or executed.groups.get(kernel.name, OTHER),
                found="name" if kernel.name in known else "graph", multiplies=kernel.name in multiplying)
        for kernel in kernels
    ]  # fmt: skip


def _profile_tensorrt(asked: _Asked) -> _Profile:
    from dpal_edge.runtime.tensorrt import import_tensorrt

    return _profile_engine(asked, import_tensorrt(), "tensorrt")


def _profile_tensorrt_rtx(asked: _Asked) -> _Profile:
    from dpal_edge.runtime.rtx import load_bindings

    return _profile_engine(asked, load_bindings(), "tensorrt-rtx")


def _profile_engine(asked: _Asked, trt: Any, name: str) -> _Profile:
    """Run an engine with TensorRT's profiler, which does without CUDA graphs, and ask the inspector what it ran."""
    from dpal_edge.runtime._tensorrt import DEVICE, open_engine

    backend = open_engine(asked.path, asked.device or DEVICE, trt, name, recorded=False)
    for _ in range(asked.calls):
        backend.run(asked.feeds)
    context = backend.context(asked.batch)
    totals: dict[str, float] = {}

    class Times(trt.IProfiler):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # super() does not reach the constructor of a bound class

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            totals[layer_name] = totals.get(layer_name, 0.0) + ms / asked.calls

    profiler = Times()  # which the context does not keep alive in all versions
    context.profiler = profiler
    walls = [time_ms(lambda: backend.run(asked.feeds)) for _ in range(asked.calls)]
    inspector = backend.engine.create_engine_inspector()
    inspector.execution_context = context
    told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    graph, missing = _graph_of_engine(asked)
    kernels = place_engine_layers(totals, told.get("Layers", ()), graph)
    fused = sum("mha" in kernel.name.lower() for kernel in kernels)
    return _Profile(source="TensorRT IProfiler", walls_ms=walls, kernels=kernels, graph=graph, fused=fused,
                    missing=missing)  # fmt: skip


def _graph_of_engine(asked: _Asked) -> tuple[Graph | None, tuple[str, ...]]:
    """Return the graph that an engine was built of, or a sentence on why it is not known."""
    if asked.graph is None:
        return None, (f"operations and bytes: {asked.path.name} does not tell the graph that it was built of",)
    try:
        return read_graph(asked.graph, asked.batch), ()
    except BackendUnavailable as error:
        return None, (str(error),)


def place_engine_layers(times: Mapping[str, float], layers: Sequence[Any], graph: Graph | None) -> list[Kernel]:
    """Find the groups of TensorRT's kernels.

    Args:
        times: milliseconds by the name of a layer, as its profiler told them.
        layers: of EngineInspector; an engine that was not built with details has names alone.
        graph: that the engine was built of; without, only names of modules tell a group.
    """
    by_name = {layer["Name"]: layer for layer in layers if isinstance(layer, dict)}
    graph = graph or Graph((), {}, frozenset(), {})
    ops = {op.name: op for op in graph.ops}
    kernels = []
    for name, ms in times.items():
        layer = by_name.get(name, {})
        made_of = _ONNX_LAYER.findall(layer.get("Metadata", ""))
        group = _most_work(name, made_of, graph)
        kernels.append(Kernel(name=name, kind=layer.get("LayerType", ""), kernel=layer.get("TacticName", ""), ms=ms,
                              precision=_type_of(layer), group=group or OTHER, found="name" if group else "",
                              multiplies=any(graph.operations(ops[n]) for n in made_of if n in ops)))  # fmt: skip
    return _by_order(kernels)


def _most_work(name: str, made_of: Sequence[str], graph: Graph) -> str | None:
    """Return the group that a kernel works for: where its operators are of several, that of the largest product."""
    if (own := graph.find([name])) is not None:
        return own
    ops = {op.name: op for op in graph.ops}
    groups = Counter[str]()
    found = {one: group for one in made_of if (group := graph.find([one]))}
    for one, group in found.items():
        groups[group] += graph.operations(ops[one]) if one in ops else 0
        groups[group] += group == NORMS  # outweighs what is no product either
    if not groups:
        return None
    return SEVERAL if len(groups) > _MOST_GROUPS else groups.most_common(1)[0][0]


def _type_of(layer: Mapping[str, Any]) -> str:
    """Return what a layer of TensorRT computes in: the type of its first input that has one of a model's."""
    for tensor in layer.get("Inputs", ()):
        if match := _TYPE_WORD.search(f"{tensor.get('Format/Datatype', '')} {tensor.get('Datatype', '')}"):
            return _TYPES[match[1].lower()]
    return ""


_MOST_GROUPS = 3  # that one kernel may touch and still count for the one it works most for
_READERS: Mapping[str, Callable[[_Asked], _Profile]] = {
    "onnxruntime": _profile_onnxruntime,
    "openvino": _profile_openvino,
    "tensorrt": _profile_tensorrt,
    "tensorrt_rtx": _profile_tensorrt_rtx,
}
