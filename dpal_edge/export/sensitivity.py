"""Which layers INT8 costs how much: each quantized alone, in one graph that can switch every pair on and off."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dpal_edge.export.calibration import LEVELS, Range, open_session
from dpal_edge.export.crops import Crops
from dpal_edge.export.linears import DEQUANTIZE, Graph, Linear
from dpal_edge.export.onnx import INPUT_NAME
from dpal_edge.export.quantize import quantizable, quantize

_BATCH = 8


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer alone does to the outputs."""

    layer: str
    errors: dict[str, float]  # by head: squared error over the squared deviation of its float32 output

    @property
    def cost(self) -> float:
        """The error of the head that suffers most."""
        return max(self.errors.values())

    @property
    def heads(self) -> set[str]:
        """The heads that see the layer."""
        return {head for head, error in self.errors.items() if error > 0}


class Switched:
    """A graph whose layers are quantized at will, without building it again."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, Range]) -> None:
        self.layers = [layer.name for layer in quantizable(model)]
        self.outputs = [output.name for output in model.graph.output]
        self._session = open_session(_add_switches(quantize(model, ranges), self.layers))

    def run(self, crops: Crops, quantized: Collection[str]) -> dict[str, NDArray[np.float32]]:
        """Return the outputs (n, ...) for uint8 crops with these layers in INT8 and the others in float32."""
        switches = {_switch(layer): np.array(layer in quantized) for layer in self.layers}
        parts = [
            self._session.run(self.outputs, {INPUT_NAME: crops[start : start + _BATCH], **switches})
            for start in range(0, len(crops), _BATCH)
        ]
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self.outputs)}


def rank(switched: Switched, crops: Crops) -> list[Sensitivity]:
    """Return the layers, the most costly first."""
    reference = switched.run(crops, ())
    found = [Sensitivity(layer, relative_errors(reference, switched.run(crops, (layer,)))) for layer in switched.layers]
    return sorted(found, key=lambda one: -one.cost)


def relative_errors(reference: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return by head the squared error of ``found`` over the squared deviation of ``reference`` from its mean."""
    errors = {}
    for name, expected in reference.items():
        deviation = expected - expected.mean(0, keepdims=True)
        errors[name] = float(((found[name] - expected) ** 2).sum() / max(float((deviation**2).sum()), 1e-12))
    return errors


def _switch(layer: str) -> str:
    return f"int8/{layer}"


def _add_switches(model: onnx.ModelProto, layers: list[str]) -> onnx.ModelProto:
    """Have each layer read what is quantized, or what it read before, as an input of its name says.

    Weights are quantized once, here: each run would do it again.
    """
    graph, looked_up = model.graph, Graph(model)
    quantized = {layer.node.output[0]: layer for layer in looked_up.linears() if layer.weight.dequantize is not None}
    nodes: list[NodeProto] = []
    for node in graph.node:
        layer = quantized.get(node.output[0])
        if layer is not None and layer.name in layers:
            switch = _switch(layer.name)
            graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
            graph.initializer.append(numpy_helper.from_array(_rounded(looked_up, layer), f"{switch}/weight"))
            choices = ((node.input[0], layer.activation.source), (f"{switch}/weight", layer.weight.source))
            for i, choice in enumerate(choices):
                nodes.append(helper.make_node("Where", [switch, *choice], [f"{switch}/{i}"]))
                node.input[i] = f"{switch}/{i}"
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    unread = [node for node in nodes if node.op_type == DEQUANTIZE and node.output[0] not in read]
    gone = {name for node in unread for name in (node.output[0], node.input[0])}
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(copies)
    return model


def _rounded(graph: Graph, layer: Linear) -> NDArray[np.float32]:
    """Return a layer's weight as INT8 has it, in float."""
    weight = numpy_helper.to_array(graph.constants[layer.weight.source])
    scale = numpy_helper.to_array(graph.constants[graph.producers[layer.node.input[1]].input[1]])
    scale = scale.reshape([-1 if axis == layer.axis else 1 for axis in range(weight.ndim)])
    rounded: NDArray[np.float32] = (np.clip(np.rint(weight / scale), -128, LEVELS) * scale).astype(np.float32)
    return rounded
