"""OpenVINO's files: FP16 weights, or INT8 by NNCF with its recipe for transformers."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.export.crops import Crops


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
        ModelFileError: its process ended before it was done.
    """
    if find_spec("nncf") is None:
        raise BackendUnavailable("openvino-int8 needs nncf: pip install 'dpal-edge[export]'")
    run_alone(_quantize, graph, path, crops, tuple(kept))


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function of this module in a process of its own, of which nothing is printed.

    Beside the engines of an export NNCF once ended in a segmentation fault, and would have taken the other targets
    along; and its progress bars go to standard output, which belongs to ``--json``.

    Raises:
        ModelFileError: the process ended before the function did.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_be_silent) as pool:
        try:
            pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ModelFileError(
                "the process of NNCF ended before it had quantized the model (out of memory, or a fault of its own); "
                "nothing was written: export again, or without openvino-int8"
            ) from error


def _be_silent() -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)


def _quantize(graph: Path, path: Path, crops: Crops, kept: tuple[str, ...]) -> None:
    import nncf
    import openvino as ov

    model = ov.convert_model(graph)
    names = [node.get_friendly_name() for node in model.get_ops() if _stays(node, kept)]
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


def _stays(node: Any, kept: tuple[str, ...]) -> bool:
    """Say whether a node of OpenVINO's stays in float: one of ``kept``, or a product of two activations."""
    if node.get_type_name() == "ScaledDotProductAttention":
        return True
    if node.get_type_name() == "MatMul" and all(
        port.get_source_output().get_node().get_type_name() != "Constant" for port in node.inputs()
    ):
        return True
    # OpenVINO splits what has a bias in two, and calls the first part so.
    own = node.get_friendly_name().removesuffix("/WithoutBiases")
    return own in kept and node.get_type_name() in ("MatMul", "Convolution")
