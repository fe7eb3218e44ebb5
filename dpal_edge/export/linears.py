"""The layers of an ONNX graph that multiply by weights, seen through whatever quantization surrounds them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto, helper

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LINEAR = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Pair:
    """What stands between a tensor and the layer that reads it."""

    source: str  # the tensor that is quantized, or read as it is
    quantize: NodeProto | None  # None where the tensor is stored quantized, or is not quantized at all
    dequantize: NodeProto | None  # None where it is not quantized


@dataclass(frozen=True)
class Linear:
    """A MatMul, Gemm or Conv with constant weights."""

    node: NodeProto
    activation: Pair
    weight: Pair
    axis: int  # of the weight: its output channels
    channels: int  # of the output
    grouped: bool  # a convolution of each channel for itself, or of groups of them

    @property
    def name(self) -> str:
        """The node's name."""
        return name_of(self.node)


class Graph:
    """Look-ups in an ONNX graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.output:
                self.producers[name] = node
            for name in node.input:
                self.consumers[name].append(node)
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    self.constants[node.output[0]] = value
            if node.op_type == "Transpose" and (stored := self.constants.get(self._uncast(node.input[0]))) is not None:
                # A graph that reads its weights from a checkpoint finds them as torch keeps them.
                axes = next((a.ints for a in node.attribute if a.name == "perm"), range(len(stored.dims))[::-1])
                dims = [stored.dims[axis] for axis in axes]
                self.constants[node.output[0]] = TensorProto(data_type=stored.data_type, dims=dims)

    def pair(self, name: str) -> Pair:
        """Look through dequantization and quantization at what ``name`` is made of; casts are passed over."""
        dequantize = self.producers.get(self._uncast(name))
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            return Pair(self._uncast(name), None, None)
        inner = self._uncast(dequantize.input[0])
        quantize = self.producers.get(inner)
        if quantize is None or quantize.op_type != QUANTIZE:
            return Pair(inner, None, dequantize)
        return Pair(self._uncast(quantize.input[0]), quantize, dequantize)

    def linears(self) -> Iterator[Linear]:
        """Yield the layers with constant weights on their right; products of two activations are none."""
        for node in self.nodes:
            if node.op_type not in LINEAR:
                continue
            weight = self.pair(node.input[1])
            tensor = self.constants.get(weight.source)
            if tensor is None or len(tensor.dims) < 2 or (node.op_type == "MatMul" and len(tensor.dims) > 2):
                continue
            axis = _output_axis(node)
            grouped = attribute(node, "group", 1) > 1
            yield Linear(node, self.pair(node.input[0]), weight, axis, tensor.dims[axis], grouped)

    def _uncast(self, name: str) -> str:
        while (node := self.producers.get(name)) is not None and node.op_type == "Cast":
            name = node.input[0]
        return name


def name_of(node: NodeProto) -> str:
    """Return a node's name, or its output's where it has none."""
    return str(node.name or node.output[0])


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == name), default)


def _output_axis(node: NodeProto) -> int:
    """Return which axis of the weight counts output channels: of MatMul [K, N] the last, of Gemm(transB) the first."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
