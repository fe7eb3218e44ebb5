"""OpenVINO's files: FP16 weights, or INT8 by NNCF with its recipe for transformers."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.export.crops import Crops
from dpal_edge.export.linears import Graph, name_of

_LAYERS = ("MatMul", "Convolution", "GroupConvolution")


def write_fp16(graph: Path, path: Path) -> None:
    """Convert the float32 ONNX file ``graph`` to ``path`` (.xml, its weights in FP16 beside it as .bin)."""
    import openvino as ov

    ov.save_model(ov.convert_model(graph), path, compress_to_fp16=True)


def write_int8(graph: Path, path: Path, crops: Crops, kept: Sequence[str]) -> None:
    """Quantize the float32 ONNX file ``graph`` on uint8 ``crops`` (n, H, W, 3); write ``path`` (.xml) and its .bin.

    Args:
        graph: its linear layers are nodes with names.
        path: of the .xml.
        crops: to calibrate on.
        kept: names of nodes that stay in float.

    Source: NNCF's post-training quantization, model type TRANSFORMER: SmoothQuant, symmetric activations where
    attention needs them. Differs: products of two activations (attention) stay in float, as in TensorRT's files, where
    quantizing them cost accuracy and no kernel gained from it; weights use half of their range, because sums of full
    ones saturate on CPUs without VNNI, and a bundle must say the same on all of them.

    Raises:
        BackendUnavailable: NNCF is not installed.
        ModelFileError: it fails on the model, or its process ended before it was done.
    """
    if find_spec("nncf") is None:
        raise BackendUnavailable("openvino-int8 needs nncf: pip install 'dpal-edge[export]'")
    run_alone(_quantize, graph, path, crops, tuple(kept))


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function of this module in a process of its own, of which nothing is printed.

    Beside the engines of an export NNCF once ended in a segmentation fault, and would have taken the other targets
    along; and its progress bars go to standard output, which belongs to ``--json``.

    Raises:
        ModelFileError: the function failed, or the process ended before it did.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_be_silent) as pool:
        error = pool.submit(function, *arguments).exception()  # NNCF's exceptions have no base class of their own
    if error is not None:
        reason = " ".join(str(error).split())
        if isinstance(error, BrokenProcessPool):
            reason = "its process ended before it had quantized the model: out of memory, or a fault of its own"
        raise ModelFileError(f"NNCF fails ({reason}); export again, or without openvino-int8") from error


def int8_layers(path: Path, graph: Path) -> set[str]:
    """Return what ``graph``, the ONNX file that ``path`` (.xml) was made of, calls the layers that are INT8 in it."""
    import openvino as ov

    fused = _fused_names(graph)
    return {
        _own_name(node, fused)
        for node in ov.Core().read_model(path).get_ops()
        if node.get_type_name() in _LAYERS and _stored_type(node) == ov.Type.i8
    }


def _stored_type(layer: Any) -> Any:
    """Return the type of what a layer's weight is made of, through the conversion and the scale behind it."""
    node = layer.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node.get_output_element_type(0)


def _be_silent() -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)


def _quantize(graph: Path, path: Path, crops: Crops, kept: tuple[str, ...]) -> None:
    import nncf
    import openvino as ov

    model, fused = ov.convert_model(graph), _fused_names(graph)
    names = [node.get_friendly_name() for node in model.get_ops() if _stays(node, kept, fused)]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(crops[:, None])),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(crops),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        ignored_scope=nncf.IgnoredScope(names=names),
    )
    ov.save_model(quantized, path, compress_to_fp16=True)


def _stays(node: Any, kept: tuple[str, ...], fused: Mapping[str, str]) -> bool:
    """Say whether a node of OpenVINO's stays in float: one of ``kept``, or a product of two activations."""
    if node.get_type_name() == "ScaledDotProductAttention":
        return True
    if node.get_type_name() == "MatMul" and all(
        port.get_source_output().get_node().get_type_name() != "Constant" for port in node.inputs()
    ):
        return True
    return _own_name(node, fused) in kept and node.get_type_name() in _LAYERS


def _own_name(node: Any, fused: Mapping[str, str]) -> str:
    """Return the name that a layer has in the ONNX graph: OpenVINO splits what has a bias in two."""
    name = str(node.get_friendly_name().removesuffix("/WithoutBiases"))
    return fused.get(name, name)


def _fused_names(graph: Path) -> dict[str, str]:
    """Return layers by the factors that follow them, as of norms: OpenVINO merges both under the factor's name."""
    found = Graph(onnx.load(graph))
    return {
        name_of(reader): layer.name
        for layer in found.linears()
        for reader in found.consumers[layer.node.output[0]]
        if reader.op_type == "Mul"
    }
