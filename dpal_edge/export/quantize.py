"""INT8 for the linear layers of a graph: explicit, symmetric pairs on both inputs, and nothing anywhere else.

The recipe that TensorRT's compiler turns into INT8 products with its attention still fused: one scale per activation,
one per output channel of a weight, zero points of 0, weights kept in float beside their pair, biases, residuals, norms
and products of two activations left alone, and the rest of the graph in FP16 (``float16``).
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dpal_edge.export.calibration import LEVELS, Range
from dpal_edge.export.linears import DEQUANTIZE, QUANTIZE, Graph, Linear

_HALF_STEP = 2.0**-24  # the least that FP16 holds


def quantizable(model: onnx.ModelProto) -> list[Linear]:
    """Return the layers that are worth INT8: all with constant weights, but convolutions of single channels.

    Those read more than they compute, so fewer bits save nothing, and their few weights per channel lose most.
    """
    return [layer for layer in Graph(model).linears() if not layer.grouped]


def quantize(model: onnx.ModelProto, ranges: Mapping[str, Range], skip: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a float32 graph with pairs before both inputs of its linear layers.

    Args:
        model: its weights are initializers.
        ranges: of the layers' inputs, by tensor.
        skip: names of layers that stay in float.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    layers = {layer.node.output[0]: layer for layer in quantizable(quantized)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, str] = {}  # tensor -> its dequantized twin
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        layer = layers.get(node.output[0])
        if layer is not None and layer.name not in skip and ranges[layer.activation.source].clip > 0:
            source, weight = node.input[0], node.input[1]
            if source not in made:
                scale = np.array(ranges[layer.activation.source].clip / LEVELS)
                made[source] = _add_pair(graph, nodes, source, scale, None)
            if weight not in made:
                values = numpy_helper.to_array(weights[weight])
                made[weight] = _add_pair(graph, nodes, weight, _weight_scales(values, layer.axis), layer.axis)
            node.input[0], node.input[1] = made[source], made[weight]
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return quantized


def _weight_scales(weight: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(others).astype(np.float64)
    return np.where(largest > 0, largest, 1.0) / LEVELS  # a channel of zeros keeps any scale


def _add_pair(
    graph: onnx.GraphProto, nodes: list[NodeProto], name: str, scale: NDArray[np.float64], axis: int | None
) -> str:
    """Append Q and DQ of a tensor; return the name of what comes out."""
    # What becomes FP16 later must not round down, or the largest value would be clipped; nor to 0.
    half = scale.astype(np.float16)
    rounded = np.maximum(np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half), _HALF_STEP)
    graph.initializer.append(numpy_helper.from_array(rounded.astype(np.float32), f"{name}.scale"))
    zero = helper.make_tensor(f"{name}.zero", TensorProto.INT8, scale.shape, np.zeros(scale.size, np.int8).tolist())
    graph.initializer.append(zero)
    settings = {} if axis is None else {"axis": axis}
    scale_and_zero = [f"{name}.scale", f"{name}.zero"]
    stored, back = f"{name}.int8", f"{name}.float"
    nodes.append(helper.make_node(QUANTIZE, [name, *scale_and_zero], [stored], f"{name}/quantize", **settings))
    nodes.append(helper.make_node(DEQUANTIZE, [stored, *scale_and_zero], [back], f"{name}/dequantize", **settings))
    return back
