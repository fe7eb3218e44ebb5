"""OpenVINO as a backend."""

from collections.abc import Callable, Iterator, Mapping
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
_PRECISIONS = ("f32", "bf16")
# Fixed batches take 5 to 33 % less time than a free one (bench/results/openvino_speed.json), so a crowd is looked at in
# so many images at a time.
_SIZES = (4, 1)


class OpenVinoBackend:
    """A model on one device, compiled for each of ``_SIZES`` when first needed; as it is where its batch is fixed."""

    def __init__(self, model: ov.Model, compile_model: Callable[[ov.Model], ov.CompiledModel], name: str) -> None:
        self.name = name
        self._model, self._compile = model, compile_model
        self._outputs = [port.any_name for port in model.outputs]
        self._types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
        self.inputs = {
            port.any_name: tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
            for port in model.inputs
        }
        self._free = all(shape[0] is None for shape in self.inputs.values())
        self._compiled = {1 if self._free else 0: self._fix(1) if self._free else compile_model(model)}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        # OpenVINO would cast another type, and run once more on what it had before where an input is missing.
        if (found := {name: array.dtype for name, array in feeds.items()}) != self._types:
            raise ModelFileError(
                f"{self.name} cannot run the model on these inputs: {_show(found)} found, expected {_show(self._types)}"
            )
        try:
            if not self._free:
                return self._call(self._compiled[0], feeds)
            count = len(next(iter(feeds.values())))
            if not count:  # what comes of one image tells the shapes
                one = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in feeds.items()}
                return {name: array[:0] for name, array in self._call(self._compiled[1], one).items()}
            parts = []
            for start, size in _pieces(count):
                if size not in self._compiled:
                    self._compiled[size] = self._fix(size)
                piece = {name: array[start : start + size] for name, array in feeds.items()}
                parts.append(self._call(self._compiled[size], piece))
        except RuntimeError as error:
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {_line(error)}") from error
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _call(self, compiled: ov.CompiledModel, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = compiled(dict(feeds))
        return {name: outputs[name] for name in self._outputs}

    def _fix(self, size: int) -> ov.CompiledModel:
        """Compile the model for ``size`` images."""
        fixed = self._model.clone()
        fixed.reshape({port: [size, *list(port.partial_shape)[1:]] for port in fixed.inputs})
        return self._compile(fixed)


def load(path: Path, device: str, threads: int, precision: str | None) -> OpenVinoBackend:
    """Open ``path`` (.xml beside its .bin, or .onnx) on ``device`` with ``threads`` CPU threads.

    Args:
        precision: of the layers that the file does not quantize: f32 (None) or bf16.
    """
    core = ov.Core()
    available = {name.partition(".")[0] for name in core.available_devices}  # several of a kind are GPU.0, GPU.1
    if _DEVICES.get(device) not in available:
        usable = ", ".join(name for name, plugin in _DEVICES.items() if plugin in available)
        raise BackendUnavailable(f"{path}: this openvino has no device {device!r}, expected one of: {usable}")
    hint = precision or "f32"
    if hint not in _PRECISIONS:
        raise BackendUnavailable(f"{path}: openvino computes in {' or '.join(_PRECISIONS)}, not in {precision!r}")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if device == "cpu":
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        return OpenVinoBackend(
            core.read_model(str(path)),
            lambda model: core.compile_model(model, _DEVICES[device], settings),
            f"openvino {_VERSION} {device} {hint}",
        )
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: openvino {_VERSION} cannot load it ({_line(error)}); export the model again"
        ) from error


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """Yield start and size of the passes that ``count`` images take, the largest first."""
    start = 0
    for size in _SIZES:
        while count - start >= size:
            yield start, size
            start += size


def _show(types: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in types.items()) or "nothing"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
