"""The layers of an ONNX graph that multiply by weights, seen through whatever quantization surrounds them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
Move = Callable[[NDArray[Any], list[int]], NDArray[Any]]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LINEAR = ("MatMul", "Gemm", "Conv")
# What only moves numbers: from an array, and the axes or the shape that the node names.
MOVES: dict[str, Move] = {
    "Cast": lambda array, _: array,
    "Identity": lambda array, _: array,
    "Transpose": lambda array, axes: array.transpose(axes or None),
    "Reshape": lambda array, shape: array.reshape([n or array.shape[i] for i, n in enumerate(shape)]),
    "Flatten": lambda array, axes: array.reshape(math.prod(array.shape[: axes[0] if axes else 1]), -1),
    "Squeeze": lambda array, axes: array.squeeze(tuple(axes) or None),
    "Unsqueeze": lambda array, axes: np.expand_dims(array, tuple(axes)),
}


@dataclass(frozen=True)
class Pair:
    """What stands between a tensor and the layer that reads it."""

    source: str  # the tensor that is quantized, or read as it is
    quantize: NodeProto | None  # None where the tensor is stored quantized, or is not quantized at all
    dequantize: NodeProto | None  # None where it is not quantized
    moves: tuple[NodeProto, ...] = ()  # from ``dequantize`` to the layer


@dataclass(frozen=True)
class Linear:
    """A MatMul, Gemm or Conv with constant weights."""

    node: NodeProto
    activation: Pair
    weight: Pair
    axis: int  # of the weight before its moves: its output channels; -1 where no axis of it is these
    channels: int  # of the output
    grouped: bool  # a convolution of each channel for itself, or of groups of them

    @property
    def name(self) -> str:
        """The node's name."""
        return name_of(self.node)

    @property
    def quantized(self) -> bool:
        """Whether both inputs are."""
        return self.activation.dequantize is not None and self.weight.dequantize is not None


class Graph:
    """Look-ups in an ONNX graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        # Also of constants that were moved: a graph that reads its weights from a checkpoint has them as torch does.
        self.shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in self.constants.items()}
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
                    self.shapes[node.output[0]] = tuple(value.dims)
            if node.op_type in MOVES and node.input[0] in self.shapes:
                moved = self._shapes(node.input[0], (node,))
                if moved:
                    self.shapes[node.output[0]] = moved[-1]

    def pair(self, name: str) -> Pair:
        """Look through moves, dequantization and quantization at what ``name`` is made of."""
        moves: list[NodeProto] = []
        inner = name
        while (dequantize := self.producers.get(inner)) is not None and dequantize.op_type in MOVES:
            moves.insert(0, dequantize)
            inner = dequantize.input[0]
        if dequantize is None or dequantize.op_type != DEQUANTIZE:
            return Pair(self._uncast(name), None, None)
        inner = self._uncast(dequantize.input[0])
        quantize = self.producers.get(inner)
        if quantize is None or quantize.op_type != QUANTIZE:
            return Pair(inner, None, dequantize, tuple(moves))
        return Pair(self._uncast(quantize.input[0]), quantize, dequantize, tuple(moves))

    def linears(self) -> Iterator[Linear]:
        """Yield the layers with constant weights on their right; products of two activations are none."""
        for node in self.nodes:
            if node.op_type not in LINEAR:
                continue
            weight = self.pair(node.input[1])
            shapes = self._shapes(weight.source, weight.moves)
            if not shapes or len(shapes[-1]) < 2 or (node.op_type == "MatMul" and len(shapes[-1]) > 2):
                continue
            axis = _output_axis(node)
            channels = shapes[-1][axis]
            for move in reversed(weight.moves):
                axis = self._axis_before(move, axis, shapes.pop(), shapes[-1])
            grouped = attribute(node, "group", 1) > 1
            yield Linear(node, self.pair(node.input[0]), weight, axis, channels, grouped)

    def _shapes(self, name: str, moves: tuple[NodeProto, ...]) -> list[Shape]:
        """Return the shape of a constant before all moves and after each; empty where one is not known."""
        if name not in self.shapes:
            return []
        shapes = [self.shapes[name]]
        for move in moves:
            values = np.broadcast_to(np.int8(0), shapes[-1])  # of any size without its memory
            try:
                shapes.append(MOVES[move.op_type](values, self._axes(move)).shape)
            except (LookupError, ValueError):  # what it names is computed, or does not fit
                return []
        return shapes

    def _axes(self, node: NodeProto) -> list[int]:
        """Return the axes or the shape that a move names, as an input or as an attribute."""
        if len(node.input) > 1 and node.input[1]:
            return [int(number) for number in numpy_helper.to_array(self.constants[node.input[1]]).ravel()]
        given = (helper.get_attribute_value(a) for a in node.attribute if a.name in ("perm", "axes", "axis"))
        return [int(number) for number in np.atleast_1d(next(given, []))]

    def _axis_before(self, move: NodeProto, axis: int, after: Shape, before: Shape) -> int:
        """Return which axis was ``axis`` before a move; -1 where it was none, or a part of one."""
        if axis < 0:
            return axis
        if move.op_type == "Transpose":
            return (self._axes(move) or range(len(before))[::-1])[axis]
        # The others keep the order: an axis is the same one where it and what lies behind it hold as many values.
        place = (after[axis], math.prod(after[axis:]))
        return next((i for i, length in enumerate(before) if (length, math.prod(before[i:])) == place), -1)

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
