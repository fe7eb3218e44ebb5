"""Reading graphs from model files with nothing but the engine that runs them.

OpenVINO tells all of a file. ONNX Runtime tells the shapes of what flows when it runs a file, but not what reads what:
that is read from the file itself, by the few fields of protobuf that matter here.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.profile.graph import Graph, Op, Tensor

# Types of a TensorProto; others are not of a model.
_ONNX_TYPES = {1: "float", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "double",
               16: "bfloat16"}  # fmt: skip
# Numbers of fields in onnx.proto: of a model, a graph, a node, an attribute, a tensor and a value.
_GRAPH = 7
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_KIND, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT, _ATTRIBUTE_TENSOR = 1, 3, 4, 5
_TENSOR_SIDES, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
_VALUE_NAME = 1


# Operators that ONNX Runtime computes by simpler ones where it has no kernel for a type; they keep their input's shape.
_TAKEN_APART = frozenset({"Softmax", "Gelu", "LayerNormalization"})
_KERNEL = "_kernel_time"  # how events of kernels end
_ORT_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Trace:
    """What ONNX Runtime tells of calls."""

    walls_ms: tuple[float, ...]  # by call
    kernels: Sequence[Mapping[str, Any]]  # its events, in order: "name", "ms" (mean of all calls), and its "args"
    feeds: Mapping[str, NDArray[Any]]


def read_graph(path: Path, batch: int) -> Graph:
    """Read a model file for calls of ``batch`` images.

    Raises:
        BackendUnavailable: no engine here can tell the shapes: OpenVINO, or ONNX Runtime for .onnx.
        ModelFileError: the file is damaged.
    """
    if path.suffix == ".onnx" and find_spec("onnxruntime"):
        return _read_onnx(path, batch)
    if path.suffix in (".onnx", ".xml") and find_spec("openvino"):
        return _read_openvino(path, batch)
    raise BackendUnavailable(
        f"{path}: operations and bytes of {path.suffix} files need onnxruntime or openvino to tell shapes; "
        f"pip install 'dpal-edge[onnxruntime]'"
    )


def random_images(shape: Sequence[int | None], batch: int, dtype: Any) -> NDArray[Any]:
    """Return reproducible values of 0..255 in this shape, with ``batch`` where a side is free."""
    sides = [batch if side is None else side for side in shape]
    return np.random.default_rng(0).integers(0, 256, sides).astype(dtype)


def trace_onnxruntime(path: Path, options: Any, provider: str, batch: int, *, calls: int) -> Trace:
    """Run an ONNX file with ONNX Runtime's own profiling, whose file is removed; as many calls first do not count.

    Args:
        options: of the session; changed.
        provider: that runs it.
        batch: images of a call, where the file leaves that free.
        calls: that count.

    Raises:
        ModelFileError: the engine cannot load or run the file.
    """
    import onnxruntime as ort

    from dpal_edge.runtime._onnxruntime import FAILURES

    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "trace")
        options.log_severity_level = 3  # errors
        try:
            session = ort.InferenceSession(path, options, providers=[provider])
            feeds = {i.name: random_images([s if isinstance(s, int) else None for s in i.shape], batch,
                                           _ORT_TYPES[i.type]) for i in session.get_inputs()}  # fmt: skip
            walls = [time_ms(lambda: session.run(None, feeds)) for _ in range(2 * calls)]
        except (KeyError, *FAILURES) as error:  # KeyError: an input of a type that no model here has
            raise ModelFileError(f"{path}: onnxruntime cannot profile it ({' '.join(str(error).split())})") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    totals: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and event["ts"] >= runs[-calls]:
            entry = totals.setdefault(event["args"]["node_index"], {**event["args"], "ms": 0.0})
            entry["name"] = event["name"].removesuffix(_KERNEL)
            entry["ms"] += event["dur"] / 1e3 / calls
    return Trace(tuple(walls[calls:]), list(totals.values()), feeds)


def time_ms(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _read_openvino(path: Path, batch: int) -> Graph:
    import openvino as ov

    from dpal_edge.runtime._openvino import fix_batch

    model = ov.Core().read_model(str(path))
    fix_batch(model, batch)
    return graph_of_openvino(model)


def graph_of_openvino(
    model: Any, kinds: Mapping[str, str] | None = None, known: Mapping[str, str] | None = None
) -> Graph:
    """Return what an OpenVINO model computes; ``kinds`` by node are better known of one that is compiled."""
    ops: list[Op] = []
    tensors: dict[str, Tensor] = {}
    constants: set[str] = set()
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        kind = (kinds or {}).get(name, kind)
        outputs = tuple(_port(port) for port in node.outputs())
        for output, port in zip(outputs, node.outputs(), strict=True):
            if port.partial_shape.is_static:
                tensors[output] = Tensor(tuple(port.shape), port.element_type.get_type_name())
        if kind in ("Constant", "Const"):
            constants.update(outputs)
        elif kind not in ("Parameter", "Input", "Result", "Output"):
            inputs = tuple(_port(port.get_source_output()) for port in node.inputs())
            settings = {} if kinds else node.get_attributes()
            ops.append(Op(name, kind, inputs, outputs, settings))
    results = {
        min(port.names, default=_port(port)): _port(port.get_node().input(0).get_source_output())
        for port in model.outputs
    }
    return Graph(ops, tensors, frozenset(constants), results, known or {})


def _port(port: Any) -> str:
    return f"{port.get_node().get_friendly_name()}:{port.get_index()}"


def _read_onnx(path: Path, batch: int) -> Graph:
    """Read an ONNX file; ONNX Runtime says the shapes when it runs it once as it stands, with nothing optimized."""
    try:
        [graph] = [part for number, part in _fields(path.read_bytes()) if number == _GRAPH]
        parts = list(_fields(graph))
        stored = dict(_stored(part) for number, part in parts if number == _INITIALIZER)
        nodes = [_node(part, i) for i, part in enumerate(part for number, part in parts if number == _NODE)]
        outputs = [_text(part, _VALUE_NAME) for number, part in parts if number == _OUTPUT]
        stored |= {
            op.outputs[0]: op.settings["value"] for op in nodes if op.kind == "Constant" and "value" in op.settings
        }
        ops = [op for op in nodes if op.outputs[0] not in stored]
    except (IndexError, TypeError, ValueError, OSError) as error:
        raise ModelFileError(f"{path}: not an ONNX file, or a damaged one; export the model again") from error
    entered, made = _run_once(path, batch)
    tensors = stored | entered
    for op in ops:
        told = made.get(op.name, ())
        if not told and op.kind in _TAKEN_APART and op.inputs[0] in tensors:
            told = [tensors[op.inputs[0]]]
        tensors.update(zip(op.outputs, told, strict=False))
    return Graph(ops, tensors, frozenset(stored), {name: name for name in outputs})


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message: an int, or the bytes of what has a length.

    Source: https://protobuf.dev/programming-guides/encoding
    """
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
        elif kind in (1, 2, 5):
            size, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + size > len(view):
                raise ValueError("a field ends beyond the message")
            yield key >> 3, view[at : at + size]
            at += size
        else:
            raise ValueError(f"no field is of kind {kind}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _text(message: memoryview, wanted: int) -> str:
    """Return the first text with this number, or nothing."""
    return next((_decode(value) for number, value in _fields(message) if number == wanted), "")


def _decode(value: Any) -> str:
    if isinstance(value, int):
        raise ValueError("a number stands where a text should")
    return bytes(value).decode()


def _stored(message: memoryview) -> tuple[str, Tensor]:
    """Return name, shape and type of a TensorProto."""
    sides: list[int] = []
    kind = 0
    for number, value in _fields(message):
        if number == _TENSOR_SIDES:  # one by one, or packed
            at = 0
            while not isinstance(value, int) and at < len(value):
                side, at = _varint(value, at)
                sides.append(side)
            sides += [value] if isinstance(value, int) else []
        elif number == _TENSOR_TYPE:
            kind = value
    return _text(message, _TENSOR_NAME), Tensor(tuple(sides), _ONNX_TYPES.get(kind, ""))


def _node(message: memoryview, i: int) -> Op:
    """Return a NodeProto, called as ONNX Runtime calls it where it has no name."""
    fields = list(_fields(message))
    texts = {n: [_decode(v) for number, v in fields if number == n] for n in range(1, _NODE_ATTRIBUTE)}
    kind = texts[_NODE_KIND][0]
    name = next(filter(None, texts[_NODE_NAME]), f"{kind}_{i}")
    settings = dict(_attribute(value) for number, value in fields if number == _NODE_ATTRIBUTE)
    return Op(name, kind, tuple(texts[_NODE_INPUT]), tuple(texts[_NODE_OUTPUT]), settings)


def _attribute(message: memoryview) -> tuple[str, Any]:
    """Return an AttributeProto that is an integer, a text or a tensor; others are None."""
    value: Any = None
    for number, found in _fields(message):
        if number == _ATTRIBUTE_INTEGER:
            value = found
        elif number == _ATTRIBUTE_TEXT:
            value = _decode(found)
        elif number == _ATTRIBUTE_TENSOR:
            value = _stored(found)[1]
    return _text(message, _ATTRIBUTE_NAME), value


def _run_once(path: Path, batch: int) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Return by name the tensors that enter an ONNX file, and by operator those that it makes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    trace = trace_onnxruntime(path, options, "CPUExecutionProvider", batch, calls=1)
    entered = {name: Tensor(array.shape, str(array.dtype)) for name, array in trace.feeds.items()}
    made = {
        kernel["name"]: [
            Tensor(tuple(shape), kind) for one in kernel["output_type_shape"] for kind, shape in one.items()
        ]
        for kernel in trace.kernels
    }
    return entered, made
