"""FP16 for the whole graph between its inputs and outputs, which keep their types."""

import onnx
from onnx import NodeProto, TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from dpal_edge.export.linears import Graph, attribute

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a float32 graph that computes in FP16; float inputs and outputs stay float32.

    Scales of quantization become FP16 as well, so that what they surround does. What an exponential leads to stays
    float32: a detector's boxes, of which FP16 rounds pixels above 512 to halves and those above 1024 to wholes.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    converted: onnx.ModelProto = convert_float_to_float16(
        copied, keep_io_types=True, op_block_list=[], node_block_list=_after_exponentials(model)
    )
    _drop_round_trips(converted)
    _sort(converted.graph)
    return converted


def _after_exponentials(model: onnx.ModelProto) -> list[str]:
    """Return the names of all nodes that an exponential reaches, and of the exponentials."""
    graph = Graph(model)
    found: dict[str, None] = {}
    waiting = [node for node in graph.nodes if node.op_type == "Exp"]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found[node.name] = None
            waiting += [reader for output in node.output for reader in graph.consumers[output]]
    return list(found)


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Let float32 nodes read each other: the conversion rounds what they write to FP16, and casts it back."""
    graph, outputs = Graph(model), {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for back in graph.nodes:
        before = _cast_from(graph, _cast_from(graph, back.output[0], _FLOAT), _HALF)
        if before is not None and graph.producers[before].op_type != "Cast":
            after = back.output[0]
            renamed |= {before: after} if after in outputs else {after: before}
            model.graph.node.remove(back)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                while name in renamed:
                    name = renamed[name]
                names[i] = name
    read = {name for node in model.graph.node for name in node.input} | outputs
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in read]:
        model.graph.node.remove(node)


def _cast_from(graph: Graph, name: str | None, kind: int) -> str | None:
    """Return what another node made of which ``name`` is a cast to ``kind``; None if it is no such cast."""
    node = graph.producers.get(name or "")
    if node is None or node.op_type != "Cast" or attribute(node, "to", 0) != kind:
        return None
    return node.input[0] if node.input[0] in graph.producers else None


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes after what they read: the conversion appends its casts at the end."""
    ready = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input} | {""}
    waiting = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    ordered: list[NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if ready.issuperset(node.input):
                ordered.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError(f"{later[0].name} reads {set(later[0].input) - ready}, which nothing makes")
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)
