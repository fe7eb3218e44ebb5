"""OpenVINO as a backend."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError

DEVICE = "cpu"  # unless another is asked for

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}  # none that would choose by itself, such as AUTO
_VERSION = ov.__version__.partition("-")[0]
# Where a CPU has bfloat16 OpenVINO would use it by itself; layers that are quantized in the file stay quantized.
_PRECISIONS = ("f32", "bf16")
# Requests at a time: more than a frame usually has people would leave cores idle.
_MOST_STREAMS = 4
# Images of one of several requests, the most first. Each size takes 120 MB and 0.7 s once, when it is first needed.
_SIZES = (4, 1)


class OpenVinoBackend:
    """A model on one device: compiled for few fixed sizes where its batch is free, as it is where that is fixed.

    One image gets all threads. Several are requests side by side, each on its share of the threads, because small
    kernels do not divide well among cores (bench/results/openvino_speed.json).
    """

    device_clock = "OpenVINO's latency of its requests; of several side by side the longest"

    def __init__(
        self, model: ov.Model, compile_model: Callable[[ov.Model, int], ov.CompiledModel], name: str, streams: int
    ) -> None:
        """Take a model and what compiles it for 1 or for ``streams`` requests at a time."""
        self.name = name
        self._model, self._compile, self._streams = model, compile_model, streams
        self._outputs = [port.any_name for port in model.outputs]
        self._types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
        self.inputs = {
            port.any_name: tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
            for port in model.inputs
        }
        self._free = all(shape[0] is None for shape in self.inputs.values())
        self._lone = compile_model(self._fix(1) if self._free else model, 1).create_infer_request()
        self._ms = 0.0  # of the last call, by OpenVINO's clock
        self._side_by_side: dict[int, list[ov.InferRequest]] = {}  # by images of each

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        names = self._outputs if outputs is None else outputs
        # OpenVINO would cast another type, and run once more on what it had before where an input is missing.
        if (found := {name: array.dtype for name, array in feeds.items()}) != self._types:
            raise ModelFileError(
                f"{self.name} cannot run the model on these inputs: {_show(found)} found, expected {_show(self._types)}"
            )
        try:
            if not self._free:
                self._lone.infer(dict(feeds))
                self._ms = self._lone.latency
                return {name: np.array(self._lone.get_tensor(name).data) for name in names}
            return self._run_each(feeds, len(next(iter(feeds.values()))), names)
        except RuntimeError as error:
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {_line(error)}") from error

    def run_timed(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """Run as ``run`` does; return the milliseconds that OpenVINO counted."""
        self.run(feeds)
        return self._ms

    def _run_each(self, feeds: Mapping[str, NDArray[Any]], count: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run ``count`` images in as few rounds of equal requests as that takes."""
        tensors = {name: self._lone.get_tensor(name) for name in names}
        outputs = {
            name: np.empty((count, *list(tensor.shape)[1:]), tensor.element_type.to_dtype())
            for name, tensor in tensors.items()
        }
        start, self._ms = 0, 0.0
        while start < count:
            size = next(size for size in _SIZES if count - start >= size * self._streams or size == 1)
            starts = range(start, min(start + size * self._streams, count), size)
            requests = [self._lone] if size == len(starts) == 1 else self._requests(size)
            for request, i in zip(requests, starts, strict=False):
                request.start_async({name: array[i : i + size] for name, array in feeds.items()})
            for request, i in zip(requests, starts, strict=False):
                request.wait()
                for name in names:
                    outputs[name][i : i + size] = request.get_tensor(name).data
            self._ms += max(request.latency for request, _ in zip(requests, starts, strict=False))
            start = starts.stop
        return outputs

    def _requests(self, size: int) -> list[ov.InferRequest]:
        """Return as many requests for ``size`` images each as run side by side."""
        if size not in self._side_by_side:
            compiled = self._compile(self._fix(size), self._streams)
            self._side_by_side[size] = [compiled.create_infer_request() for _ in range(self._streams)]
        return self._side_by_side[size]

    def _fix(self, size: int) -> ov.Model:
        """Return the model for ``size`` images."""
        fixed = self._model.clone()
        fixed.reshape({port: [size, *list(port.partial_shape)[1:]] for port in fixed.inputs})
        return fixed


def load(path: Path, device: str, threads: int, precision: str | None) -> OpenVinoBackend:
    """Open ``path`` (.xml beside its .bin, or .onnx) on ``device`` with ``threads`` CPU threads.

    Args:
        precision: of the layers that the file does not quantize: f32 (None) or bf16.
    """
    core = ov.Core()
    available = {name.partition(".")[0] for name in core.available_devices}  # several of a kind are GPU.0, GPU.1
    if DEVICES.get(device) not in available:
        usable = ", ".join(name for name, plugin in DEVICES.items() if plugin in available)
        raise BackendUnavailable(f"{path}: this openvino has no device {device!r}, expected one of: {usable}")
    hint = precision or "f32"
    if hint not in _PRECISIONS:
        raise BackendUnavailable(f"{path}: openvino computes in {' or '.join(_PRECISIONS)}, not in {precision!r}")
    streams = min(threads, _MOST_STREAMS) if device == "cpu" else 1

    def compile_model(model: ov.Model, requests: int) -> ov.CompiledModel:
        return core.compile_model(model, DEVICES[device], settings(device, threads, hint, requests))

    try:
        model = core.read_model(str(path))
        return OpenVinoBackend(model, compile_model, f"openvino {_VERSION} {device} {hint}", streams)
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: openvino {_VERSION} cannot load it ({_line(error)}); export the model again"
        ) from error


def settings(device: str, threads: int, hint: str, requests: int) -> dict[str, Any]:
    """Return how to compile for ``requests`` at a time, which compute in the precision ``hint``."""
    cpu = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": requests} if device == "cpu" else {}
    return {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", **cpu}


def _show(types: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in types.items()) or "nothing"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
