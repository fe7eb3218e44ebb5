"""OpenVINO as a backend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError

DEVICE = "cpu"  # unless another is asked for

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}  # none that would choose by itself, such as AUTO
_VERSION = ov.__version__.partition("-")[0]
# Where a CPU has bfloat16 OpenVINO would use it by itself; layers that are quantized in the file stay quantized.
_PRECISION = "f32"


class OpenVinoBackend:
    """A compiled model that computes in float32 on one device."""

    def __init__(self, model: ov.CompiledModel, name: str) -> None:
        self.name = name
        self._model = model
        self._outputs = [port.any_name for port in model.outputs]
        self._types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
        self.inputs = {
            port.any_name: tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
            for port in model.inputs
        }

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        # OpenVINO would cast another type, and run once more on what it had before where an input is missing.
        if (found := {name: array.dtype for name, array in feeds.items()}) != self._types:
            raise ModelFileError(
                f"{self.name} cannot run the model on these inputs: {_show(found)} found, expected {_show(self._types)}"
            )
        try:
            outputs = self._model(dict(feeds))
        except RuntimeError as error:
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {_line(error)}") from error
        return {name: outputs[name] for name in self._outputs}


def load(path: Path, device: str, threads: int) -> OpenVinoBackend:
    """Open ``path`` (.xml beside its .bin, or .onnx) on ``device`` with ``threads`` CPU threads."""
    core = ov.Core()
    available = {name.partition(".")[0] for name in core.available_devices}  # several of a kind are GPU.0, GPU.1
    if _DEVICES.get(device) not in available:
        usable = ", ".join(name for name, plugin in _DEVICES.items() if plugin in available)
        raise BackendUnavailable(f"{path}: this openvino has no device {device!r}, expected one of: {usable}")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _PRECISION, "PERFORMANCE_HINT": "LATENCY"}
    if device == "cpu":
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.compile_model(str(path), _DEVICES[device], settings)
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: openvino {_VERSION} cannot load it ({_line(error)}); export the model again"
        ) from error
    return OpenVinoBackend(model, f"openvino {_VERSION} {device} {_PRECISION}")


def _show(types: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in types.items()) or "nothing"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
