"""OpenVINO's files: FP16 weights, or INT8 by NNCF with its recipe for transformers."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dpal_edge.errors import BackendUnavailable
from dpal_edge.export.crops import Crops


def write_fp16(graph: Path, path: Path) -> None:
    """Convert the float32 ONNX file ``graph`` to ``path`` (.xml, its weights in FP16 beside it as .bin)."""
    import openvino as ov

    ov.save_model(ov.convert_model(graph), path, compress_to_fp16=True)


def write_int8(graph: Path, path: Path, crops: Crops, kept: Iterable[str]) -> None:
    """Quantize the float32 ONNX file ``graph`` on uint8 ``crops`` (n, H, W, 3); write ``path`` (.xml) and its .bin.

    Args:
        kept: names of the graph's nodes that stay in float.

    Source: NNCF's post-training quantization, model type TRANSFORMER: SmoothQuant, symmetric activations where
    attention needs them. Differs: weights use half of their range, because sums of full ones saturate on CPUs without
    VNNI, and a bundle must say the same on all of them.

    Raises:
        BackendUnavailable: NNCF is not installed.
    """
    import openvino as ov

    try:
        import nncf
    except ModuleNotFoundError as error:
        raise BackendUnavailable("openvino-int8 needs nncf: pip install 'dpal-edge[export]'") from error
    nncf.set_log_level(logging.ERROR)
    model = ov.convert_model(graph)
    wanted = set(kept)
    # OpenVINO splits what has a bias in two, and calls the first part so.
    names = [n.get_friendly_name() for n in model.get_ops()
             if n.get_friendly_name().removesuffix("/WithoutBiases") in wanted
             and n.get_type_name() in ("MatMul", "Convolution")]  # fmt: skip
    data = nncf.Dataset([crops[i : i + 1] for i in range(len(crops))], lambda crop: np.ascontiguousarray(crop))
    quantized = nncf.quantize(
        model,
        data,
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(crops),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        ignored_scope=nncf.IgnoredScope(names=names),
    )
    ov.save_model(quantized, path, compress_to_fp16=True)
