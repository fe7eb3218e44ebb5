"""TensorRT as a backend: engines that ``dpal-edge install`` built on this device."""

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime.backend import require_own_precision
from dpal_edge.runtime.cuda import Buffer, Cuda, Event, Graph, Memory, Stream
from dpal_edge.runtime.tensorrt import import_tensorrt, listen

DEVICE = "gpu"

_Resource = TypeVar("_Resource", Buffer, Event, Memory, Stream)

# Why an engine does not load, by the name that users know.
_STALE = {
    "tensorrt": "it was built by another TensorRT or for another GPU; build it again with: dpal-edge install BUNDLE",
    "tensorrt-rtx": "it was compiled by another release, or not for this card; export the bundle again with this one",
}


class TensorRtBackend:
    """An engine with its buffers: one copy in, one launch of a CUDA graph per number of images, one copy out.

    The first call with a number of images runs as TensorRT queues it and is recorded; later ones replay the record. A
    record is only good while its execution context keeps its shapes (NVIDIA/TensorRT 3798), so each number has a
    context of its own, and all share the memory for activations. Outputs are copies: they outlive the next call.
    """

    device_clock = "CUDA events around the copies and the engine"

    def __init__(self, engine: Any, trt: Any, cuda: Cuda, log: Any, name: str, *, recorded: bool) -> None:
        """Most callers want ``load``; ``recorded`` is whether CUDA graphs are used."""
        self.name = f"{name} {trt.__version__} {cuda.gpu}"
        self.engine, self._log, self._recorded = engine, log, recorded
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        entering = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._types = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
        self._shapes = {n: tuple(engine.get_tensor_shape(n)) for n in names}
        self.inputs = {n: tuple(None if side < 0 else side for side in self._shapes[n]) for n in entering}
        self.most = min(int(engine.get_tensor_profile_shape(n, 0)[2][0]) for n in entering)  # images at a time
        self._leaving = [n for n in names if n not in entering]
        self._contexts: dict[int, Any] = {}  # by number of images, as the next
        self._graphs: dict[int, Graph] = {}
        self._events: tuple[Event, Event] | None = None  # before and after a call that is timed
        self._owned: list[Buffer | Event | Memory | Stream] = []
        self.close = weakref.finalize(self, _free, self._graphs, self._owned)  # also of half of them, should one fail
        self._cuda, self._stream = cuda, self._own(Stream(cuda))
        self._activations = self._own(Memory(cuda, int(engine.device_memory_size_v2)))
        self._buffers = {n: self._own(Buffer(cuda, self.most * self._bytes(n))) for n in names}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        count = self._take(feeds)
        self._launch(count)
        self._finish(count)
        return {name: self._view(name, count).copy() for name in outputs or self._leaving}

    def run_timed(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """Run as ``run`` does; return the milliseconds between CUDA's events before and after."""
        if self._events is None:
            self._events = self._own(Event(self._cuda)), self._own(Event(self._cuda))
        before, after = self._events
        count = self._take(feeds)
        before.record(self._stream)
        self._launch(count)
        after.record(self._stream)
        self._finish(count)
        for name in self._leaving:  # a call gives its outputs away, and the host pays for that
            self._view(name, count).copy()
        return after.ms_since(before)

    def _own(self, resource: _Resource) -> _Resource:
        """Have ``close`` free it."""
        self._owned.append(resource)
        return resource

    def _take(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Put the inputs where the engine reads them; return the number of images."""
        found = {name: (array.dtype, array.shape[1:]) for name, array in feeds.items()}
        expected = {name: (self._types[name], self._shapes[name][1:]) for name in self.inputs}
        counts = {len(array) for array in feeds.values()}
        if found != expected or len(counts) != 1:
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {found}, expected {expected}")
        [count] = counts
        if not 1 <= count <= self.most:
            raise ModelFileError(f"{self.name}: {count} images at a time, expected 1 to {self.most}")
        for name, array in feeds.items():
            self._view(name, count)[...] = array
        return count

    def _launch(self, count: int) -> None:
        """Queue all work for ``count`` images."""
        if count in self._graphs:
            self._graphs[count].launch(self._stream)
        else:
            self._queue(self.context(count), count)

    def _finish(self, count: int) -> None:
        """Wait for the work; record it if that was the first with so many images."""
        self._stream.wait()  # a capture must not find work that is under way
        if self._recorded and count not in self._graphs:
            self._graphs[count] = self._stream.record(lambda: self._queue(self.context(count), count))

    def context(self, count: int) -> Any:
        """Return the execution context for ``count`` images."""
        if count in self._contexts:
            return self._contexts[count]
        context = self.engine.create_execution_context(self._strategy)
        if context is None:
            raise ModelFileError(f"{self.name}: no execution context for {count} images ({self._log.reason()})")
        context.set_device_memory(int(self._activations.address.value or 0), self._activations.size)
        for name, buffer in self._buffers.items():
            context.set_tensor_address(name, int(buffer.device.value or 0))
        for name in self.inputs:
            context.set_input_shape(name, (count, *self._shapes[name][1:]))
        self._contexts[count] = context
        return context

    def _queue(self, context: Any, count: int) -> None:
        """Queue the copies and the engine for ``count`` images."""
        for name in self.inputs:
            self._buffers[name].upload(self._stream, count * self._bytes(name))
        if not context.execute_async_v3(int(self._stream.handle.value or 0)):
            raise ModelFileError(f"{self.name}: the engine failed ({self._log.reason()})")
        for name in self._leaving:
            self._buffers[name].download(self._stream, count * self._bytes(name))

    def _bytes(self, name: str) -> int:
        """Return the bytes of one image's part of a tensor."""
        return int(math.prod(self._shapes[name][1:]) * self._types[name].itemsize)

    def _view(self, name: str, count: int) -> NDArray[Any]:
        """Return the host's side of a tensor for ``count`` images."""
        filled: NDArray[Any] = self._buffers[name].bytes[: count * self._bytes(name)].view(self._types[name])
        return filled.reshape(count, *self._shapes[name][1:])


def load(path: Path, device: str, threads: int, precision: str | None) -> TensorRtBackend:
    """Open the engine file ``path``; it runs on the GPU, and ``threads`` of the CPU mean nothing to it.

    Raises:
        BackendUnavailable: no TensorRT, no GPU, or another device is asked for.
        ModelFileError: the file is no engine of this TensorRT and this GPU.
    """
    require_own_precision(path, precision)
    return open_engine(path, device, import_tensorrt(), "tensorrt", recorded=True)


def open_engine(path: Path, device: str, trt: Any, name: str, *, recorded: bool) -> TensorRtBackend:
    """Open an engine file with the bindings ``trt``, which users know as ``name``."""
    if device != DEVICE:
        raise BackendUnavailable(f"{path}: {name} has no device {device!r}, expected {DEVICE}")
    cuda = Cuda.open()
    log = listen(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ModelFileError(f"{path}: {name} {trt.__version__} cannot load it ({log.reason()}); {_STALE[name]}")
    return TensorRtBackend(engine, trt, cuda, log, name, recorded=recorded)


def _free(graphs: dict[int, Graph], resources: list[Buffer | Event | Memory | Stream]) -> None:
    for resource in (*graphs.values(), *reversed(resources)):
        with suppress(ModelFileError):  # after one failure all of CUDA's calls may fail, or none
            resource.free()
