"""What TensorRT and OpenVINO demand of a graph with QuantizeLinear and DequantizeLinear, checked without either.

Some mistakes end in an error of the compiler, others in a model that is slower or wrong without a word: weights with a
scale per input instead of per output, or weights that are stored in INT8, without the pair that marks them.

Source: TensorRT's guide to explicit quantization, and what its compiler made of graphs with each fault.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, numpy_helper

from dpal_edge.errors import ModelFileError
from dpal_edge.export.linears import DEQUANTIZE, LINEAR, MOVES, QUANTIZE, Graph, Linear, attribute, name_of

OPSETS = range(19, 21)  # FP16 scales came with 19; 20 is the last that TensorRT 10 reads
_ERROR, _WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """A fault, where it is, and how to mend it."""

    rule: str
    severity: str  # error or warning
    where: str  # the node, or the first of several
    message: str


@dataclass(frozen=True)
class LintReport:
    """What was found in a graph."""

    findings: tuple[Finding, ...]
    linear: int  # layers with constant weights
    quantized: int  # of these, those with a pair on both inputs

    @property
    def errors(self) -> int:
        """The number of findings that make the graph unfit."""
        return sum(finding.severity == _ERROR for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON-ready values."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a line for each finding, and one that sums them up."""
        lines = [f"{f.severity:<8}{f.rule}: {f.where}: {f.message}" for f in self.findings]
        return "\n".join([*lines, f"{self.quantized} of {self.linear} linear layers are quantized; "
                          f"{self.errors} errors, {len(self.findings) - self.errors} warnings"])  # fmt: skip


def lint(model: onnx.ModelProto | Path) -> LintReport:
    """Check a graph against all rules; one without Q/DQ nodes passes those that are about them.

    Raises:
        ModelFileError: the file is no ONNX model, or its weights are in another file that is missing or damaged.
    """
    if isinstance(model, Path):
        model = _load(model)
    graph = Graph(model)
    linears = list(graph.linears())
    quantized = sum(layer.quantized for layer in linears)
    findings: list[Finding] = []
    for rule in _RULES:
        findings += rule(model, graph, linears)
    findings.sort(key=lambda finding: finding.severity)
    return LintReport(tuple(findings), len(linears), quantized)


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        if not model.graph.node:  # to protobuf an empty file is an empty message
            raise ModelFileError(f"{path}: not an ONNX model (it has no nodes)")
        return model
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DecodeError as error:
        raise ModelFileError(f"{path}: not an ONNX model ({_line(error)})") from error
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelFileError(
            f"{path}: its weights are in another file, which cannot be read ({_line(error)}); copy both together"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


Rule = Callable[[onnx.ModelProto, Graph, list[Linear]], Iterator[Finding]]


def _opset(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if _quantized(graph) and version not in OPSETS:
        yield Finding(
            "opset", _ERROR, "the graph", f"opset {version}, expected {OPSETS[0]} or {OPSETS[-1]}: earlier ones have "
            f"no FP16 scales, later ones TensorRT 10 does not read"
        )  # fmt: skip


def _zero_points(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for node in _quantized(graph):
        zero = _constant(graph, node, 2)
        if zero is not None and np.any(zero != 0):
            yield Finding("zero-point", _ERROR, name_of(node), "not 0: TensorRT knows only symmetric quantization")


def _types(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for node in _quantized(graph):
        found = _stored_type(graph, node)
        if found == TensorProto.UINT8:
            yield Finding("uint8", _ERROR, name_of(node), "UINT8: TensorRT reads it as INT8, wrong above 127; use INT8")
        elif found == TensorProto.INT32:
            yield Finding(
                "int32-bias", _ERROR, name_of(node), "a bias in INT32: TensorRT refuses it; leave biases in float"
            )  # fmt: skip


def _activation_scales(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    weights = {layer.weight.source for layer in linears}
    for node in graph.nodes:
        if node.op_type != QUANTIZE or node.input[0] in weights or graph.pair(node.input[0]).source in graph.shapes:
            continue
        scale = _constant(graph, node, 1)
        if scale is not None and scale.size > 1:
            yield Finding(
                "activation-scale", _ERROR, name_of(node), f"{scale.size} scales for an activation: TensorRT takes one"
            )


def _scales(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for node in _quantized(graph):
        scale = _constant(graph, node, 1)
        if scale is None:
            yield Finding("scale", _ERROR, name_of(node), "its scale is computed, expected a constant")
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            yield Finding("scale", _ERROR, name_of(node), "a scale that is 0, negative or not finite; calibrate again")


def _pairs(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type != QUANTIZE:
            continue
        readers = graph.consumers[node.output[0]]
        if any(reader.op_type != DEQUANTIZE for reader in readers) or not readers:
            yield Finding("pair", _ERROR, name_of(node), "no DequantizeLinear follows it; both mark a layer's input")
        for reader in readers:
            if reader.op_type == DEQUANTIZE and not _same(graph, node, reader):
                yield Finding("pair", _ERROR, name_of(node), f"{name_of(reader)} undoes it with another scale or axis")


def _weight_axes(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for layer in linears:
        for node in (layer.weight.quantize, layer.weight.dequantize):
            if node is None:
                continue
            scale = _constant(graph, node, 1)
            if scale is None or scale.size == 1:
                continue
            rank = len(graph.shapes[layer.weight.source])
            axis = attribute(node, "axis", 1) % rank
            if axis != layer.axis or scale.size != layer.channels:
                wanted = f" along axis {layer.axis}" if layer.axis >= 0 else ""
                yield Finding(
                    "weight-axis", _ERROR, layer.name, f"{scale.size} scales along axis {axis} of the weight, expected "
                    f"{layer.channels}{wanted}, one per output: compilers quantize nothing else, and do not say so"
                )  # fmt: skip
                break


def _whole_weights(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    whole = [s for s in linears if s.weight.dequantize is not None and s.channels > 1
             and (scale := _constant(graph, s.weight.dequantize, 1)) is not None and scale.size == 1]  # fmt: skip
    if whole:
        yield Finding(
            "weight-scale", _WARNING, whole[0].name, f"one scale for the whole weight, here and in {len(whole) - 1} "
            f"more layers: one per output costs nothing and keeps small channels"
        )  # fmt: skip


def _weight_pairs(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for layer in linears:
        if layer.weight.dequantize is not None and layer.weight.quantize is None:
            yield Finding(
                "weight-dq-only", _ERROR, layer.name, "its weight is stored quantized, with DequantizeLinear alone: "
                "compilers take some of these layers for float; store float and add the pair"
            )  # fmt: skip


def _halves(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for layer in linears:
        sides = {"input": layer.activation, "weight": layer.weight}
        bare = [name for name, side in sides.items() if side.dequantize is None]
        if len(bare) == 1:
            yield Finding(
                "half-quantized", _ERROR, layer.name, f"its {bare[0]} is not quantized, the other is: it runs in float "
                f"and pays for the conversion"
            )  # fmt: skip


def _left_out(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    bare = [s for s in linears if not s.grouped and s.activation.dequantize is None and s.weight.dequantize is None]
    if bare and _quantized(graph):
        yield Finding(
            "unquantized", _WARNING, bare[0].name, f"this and {len(bare) - 1} more linear layers stay in float"
        )


def _places(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type != DEQUANTIZE or graph.pair(node.output[0]).source in graph.shapes:
            continue
        for reader in _readers(graph, node.output[0]):
            if reader.op_type not in (*LINEAR, "ConvTranspose"):
                yield Finding(
                    "misplaced", _ERROR, name_of(node), f"feeds {reader.op_type} {name_of(reader)}: residuals, norms "
                    f"and others lose accuracy by it and fuse less; quantize inputs of linear layers alone"
                )  # fmt: skip


def _body(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    wide = [node for node in _quantized(graph) if _type_of(graph, node.input[1]) == TensorProto.FLOAT]
    if wide:
        yield Finding(
            "float32-body", _ERROR, name_of(wide[0]), f"this and {len(wide) - 1} more scales are FP32, so the rest "
            f"computes in FP32, in which TensorRT fuses no attention; convert the body to FP16"
        )  # fmt: skip


def _decomposed(model: onnx.ModelProto, graph: Graph, linears: list[Linear]) -> Iterator[Finding]:
    count = Counter(node.op_type for node in graph.nodes)
    first = {node.op_type: name_of(node) for node in reversed(graph.nodes)}
    if count["Erf"]:
        yield Finding("decomposed", _WARNING, first["Erf"], "GELU in parts: export with opset 20, where it is one")
    if count["ReduceMean"] >= 2 and count["Sqrt"] and count["Sub"]:
        yield Finding(
            "decomposed", _WARNING, first["Sqrt"], "LayerNormalization in parts, which overflows in FP16: export with "
            "opset 17 or later, where it is one"
        )  # fmt: skip


_RULES: tuple[Rule, ...] = (
    _opset, _zero_points, _types, _activation_scales, _scales, _pairs, _weight_axes, _whole_weights, _weight_pairs,
    _halves, _left_out, _places, _body, _decomposed,
)  # fmt: skip


def _quantized(graph: Graph) -> list[NodeProto]:
    return [node for node in graph.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]


def _constant(graph: Graph, node: NodeProto, index: int) -> Any:
    """Return an input's value as an array; None where there is no such input, or it is computed."""
    if len(node.input) <= index or node.input[index] not in graph.constants:
        return None
    return numpy_helper.to_array(graph.constants[node.input[index]])


def _type_of(graph: Graph, name: str) -> int | None:
    return graph.constants[name].data_type if name in graph.constants else None


def _stored_type(graph: Graph, node: NodeProto) -> int | None:
    """Return the integer type that a node writes or reads: of its zero point, UINT8 where none is given."""
    if len(node.input) > 2 and node.input[2]:
        return _type_of(graph, node.input[2])
    if node.op_type == DEQUANTIZE:
        return _type_of(graph, node.input[0])
    return attribute(node, "output_dtype", TensorProto.UINT8)


def _same(graph: Graph, quantize: NodeProto, dequantize: NodeProto) -> bool:
    first, second = _constant(graph, quantize, 1), _constant(graph, dequantize, 1)
    if first is None or second is None or first.size == 1:
        return first is None or second is None or np.array_equal(first, second)
    return np.array_equal(first, second) and attribute(quantize, "axis", 1) == attribute(dequantize, "axis", 1)


def _readers(graph: Graph, name: str) -> Iterator[NodeProto]:
    """Yield who reads a tensor, also after it has only been moved."""
    for node in graph.consumers[name]:
        if node.op_type in MOVES:
            yield from _readers(graph, node.output[0])
        else:
            yield node
