"""OpenVINO as a backend."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
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


class OpenVinoBackend:
    """A model on one device: compiled for one image where its batch is free, as it is where that is fixed.

    Several images are requests side by side, each on its share of the threads, because small kernels do not divide well
    among cores. One image gets all threads as long as only single ones came, and is a request among several later: a
    way of its own would take 120 MB more. So would requests of four images each, which are a tenth faster where there
    are eight people or more (bench/results/openvino_requests.json).
    """

    device_clock = "OpenVINO's latency of its requests; of several side by side the busiest"

    def __init__(
        self, model: ov.Model, compile_model: Callable[[ov.Model, int], ov.CompiledModel], name: str, streams: int
    ) -> None:
        """Take a model and what compiles it for 1 or for ``streams`` requests at a time, when images come."""
        self.name = name
        self._model, self._compile, self._streams = model, compile_model, streams
        self._outputs = [port.any_name for port in model.outputs]
        self._types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
        self.inputs = {
            port.any_name: tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
            for port in model.inputs
        }
        self._free = all(shape[0] is None for shape in self.inputs.values())
        self._requests: list[ov.InferRequest] = []
        self._ms = 0.0  # of the last call, by OpenVINO's clock

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        names = self._outputs if outputs is None else outputs
        # OpenVINO would cast another type, and run once more on what it had before where an input is missing.
        if (found := {name: array.dtype for name, array in feeds.items()}) != self._types:
            raise ModelFileError(
                f"{self.name} cannot run the model on these inputs: {_show(found)} found, expected {_show(self._types)}"
            )
        try:
            if self._free:
                return self._run_each(feeds, len(next(iter(feeds.values()))), names)
            [request] = self._open(1)
            request.infer(dict(feeds))
            self._ms = request.latency
            return {name: np.array(request.get_tensor(name).data) for name in names}
        except RuntimeError as error:
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {_line(error)}") from error

    def run_timed(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """Run as ``run`` does; return the milliseconds that OpenVINO counted."""
        self.run(feeds)
        return self._ms

    def _run_each(self, feeds: Mapping[str, NDArray[Any]], count: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run ``count`` images, each request taking its next one as soon as its last is done."""
        requests = self._open(count)
        tensors = {name: requests[0].get_tensor(name) for name in names}
        outputs = {
            name: np.empty((count, *list(tensor.shape)[1:]), tensor.element_type.to_dtype())
            for name, tensor in tensors.items()
        }
        busy_ms = [0.0] * len(requests)
        for i in range(count + len(requests)):
            turn, done = i % len(requests), i - len(requests)
            request = requests[turn]
            if done >= 0:
                request.wait()
                busy_ms[turn] += request.latency
                for name in names:
                    outputs[name][done] = request.get_tensor(name).data[0]
            if i < count:
                request.start_async({name: array[i : i + 1] for name, array in feeds.items()})
        self._ms = max(busy_ms)
        return outputs

    def _open(self, count: int) -> list[ov.InferRequest]:
        """Return the requests for ``count`` images: one with all threads, or as many as run side by side."""
        wanted = self._streams if self._free and count > 1 else 1
        if len(self._requests) < wanted:
            try:
                model = self._model.clone()
                fix_batch(model, 1)
                compiled = self._compile(model, wanted)
            except RuntimeError as error:
                raise ModelFileError(f"{self.name} cannot compile the model: {_line(error)}") from error
            self._requests = [compiled.create_infer_request() for _ in range(wanted)]
            _give_back_freed_memory()
        return self._requests


@lru_cache(maxsize=1)
def core() -> ov.Core:
    """Return the one core of this process.

    A core's CPU plugin gives the thread that first compiles with it another stack for signal handlers, and at its end
    puts back the one it found. With several cores, closed in the order they were opened, that is one that is gone by
    then, and the next signal ends the process (openvino 2026.4).
    """
    return ov.Core()


def load(path: Path, device: str, threads: int, precision: str | None) -> OpenVinoBackend:
    """Open ``path`` (.xml beside its .bin, or .onnx) on ``device`` with ``threads`` CPU threads.

    Args:
        precision: of the layers that the file does not quantize: f32 (None) or bf16.
    """
    available = {name.partition(".")[0] for name in core().available_devices}  # several of a kind are GPU.0, GPU.1
    if DEVICES.get(device) not in available:
        usable = ", ".join(name for name, plugin in DEVICES.items() if plugin in available)
        raise BackendUnavailable(f"{path}: this openvino has no device {device!r}, expected one of: {usable}")
    hint = precision or "f32"
    if hint not in _PRECISIONS:
        raise BackendUnavailable(f"{path}: openvino computes in {' or '.join(_PRECISIONS)}, not in {precision!r}")
    streams = min(threads, _MOST_STREAMS) if device == "cpu" else 1

    def compile_model(model: ov.Model, requests: int) -> ov.CompiledModel:
        return core().compile_model(model, DEVICES[device], settings(device, threads, hint, requests))

    try:
        model = core().read_model(str(path))
        return OpenVinoBackend(model, compile_model, f"openvino {_VERSION} {device} {hint}", streams)
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: openvino {_VERSION} cannot load it ({_line(error)}); export the model again"
        ) from error


def _give_back_freed_memory() -> None:
    """Give the system back what compiling took for a moment, and glibc keeps otherwise."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def fix_batch(model: ov.Model, count: int) -> None:
    """Give a model ``count`` images for good, where it leaves their number free."""
    if all(port.partial_shape[0].is_dynamic for port in model.inputs):
        model.reshape({port: [count, *list(port.partial_shape)[1:]] for port in model.inputs})


def settings(device: str, threads: int, hint: str, requests: int) -> dict[str, Any]:
    """Return how to compile for ``requests`` at a time, which compute in the precision ``hint``."""
    cpu = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": requests} if device == "cpu" else {}
    return {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", **cpu}


def _show(types: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in types.items()) or "nothing"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
