"""As much of CUDA as running an engine takes, through libcudart and ctypes: no package to match with JetPack's CUDA."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ModelFileError

_NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_MAPPED = 2  # cudaHostAllocMapped: a device that shares memory with the CPU reads and writes it in place
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads do meanwhile does not spoil a capture
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76  # cudaDeviceAttr
_NAME_BYTES, _PROPERTIES_BYTES = 256, 8192  # cudaDeviceProp begins with the name; it is smaller than this in CUDA 13

_Pointer = ctypes.c_void_p


class Cuda:
    """The runtime library, on device 0 of the process (``CUDA_VISIBLE_DEVICES`` chooses which that is)."""

    def __init__(self, library: Any) -> None:
        """Most callers want ``open``."""
        self._library = library
        count = ctypes.c_int()
        error = library.cudaGetDeviceCount(ctypes.byref(count))
        if error or not count.value:
            reason = self._reason(error) if error else "no device"
            raise BackendUnavailable(f"CUDA has no GPU to run on ({reason}); check the driver with nvidia-smi")
        self.integrated = bool(self._attribute(_INTEGRATED))  # memory is shared with the CPU, as on Jetson
        self.capability = f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"  # for example "8.7"
        self.gpu = self._name()

    @classmethod
    def open(cls) -> "Cuda":
        """Load the library.

        Raises:
            BackendUnavailable: it is not installed, or sees no GPU.
        """
        for name in _NAMES:
            try:
                return cls(ctypes.CDLL(name))
            except OSError:
                continue
        raise BackendUnavailable(
            "libcudart was not found; on Jetson it comes with JetPack (apt install nvidia-jetpack), elsewhere with CUDA"
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library.

        Raises:
            ModelFileError: it fails; ``name`` and CUDA's own words say what.
        """
        if error := getattr(self._library, name)(*arguments):
            raise ModelFileError(f"{name} failed: {self._reason(error)}")

    def create(self, name: str, *arguments: Any) -> _Pointer:
        """Call a function that puts a handle where its first argument points, and return the handle."""
        handle = _Pointer()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle

    def free_memory(self) -> int:
        """Return the bytes of the device's memory that nobody uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def _name(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        # CUDA 12 grew the struct and named the function that fills it anew; 13 took the name back.
        modern = hasattr(self._library, "cudaGetDeviceProperties_v2")
        self.call("cudaGetDeviceProperties_v2" if modern else "cudaGetDeviceProperties", properties, 0)
        return ctypes.string_at(properties, _NAME_BYTES).partition(b"\0")[0].decode(errors="replace")

    def _reason(self, error: int) -> str:
        function = self._library.cudaGetErrorString
        function.restype = ctypes.c_char_p
        return f"{function(error).decode(errors='replace')} (error {error})"


class Memory:
    """Memory of the device alone."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size = cuda, size
        self.address = cuda.create("cudaMalloc", ctypes.c_size_t(size))

    def free(self) -> None:
        """Give the memory back."""
        self._cuda.call("cudaFree", self.address)


class Buffer:
    """Pinned memory of the host and the memory of the device that mirrors it; one and the same on Jetson."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.host = cuda.create("cudaHostAlloc", ctypes.c_size_t(size), _MAPPED)
        try:
            if cuda.integrated:
                self.device = cuda.create("cudaHostGetDevicePointer", self.host, 0)
            else:
                self.device = cuda.create("cudaMalloc", ctypes.c_size_t(size))
        except ModelFileError:
            cuda.call("cudaFreeHost", self.host)
            raise
        memory = (ctypes.c_uint8 * size).from_address(int(self.host.value or 0))
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)  # of the host

    def upload(self, stream: "Stream", size: int) -> None:
        """Copy the first bytes to the device, in the order of ``stream``."""
        self._copy(self.device, self.host, _TO_DEVICE, stream, size)

    def download(self, stream: "Stream", size: int) -> None:
        """Copy the first bytes to the host, in the order of ``stream``."""
        self._copy(self.host, self.device, _TO_HOST, stream, size)

    def free(self) -> None:
        """Give the memory back."""
        if not self._cuda.integrated:
            self._cuda.call("cudaFree", self.device)
        self._cuda.call("cudaFreeHost", self.host)

    def _copy(self, to: _Pointer, origin: _Pointer, kind: int, stream: "Stream", size: int) -> None:
        if not self._cuda.integrated:
            self._cuda.call("cudaMemcpyAsync", to, origin, ctypes.c_size_t(size), kind, stream.handle)


class Stream:
    """A queue of work on the device."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.create("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def wait(self) -> None:
        """Wait until all is done that was queued."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def record(self, work: Callable[[], None]) -> "Graph":
        """Return what ``work`` queues as a graph that can be launched at once; nothing of it is run."""
        self._cuda.call("cudaStreamBeginCapture", self.handle, _THREAD_LOCAL)
        recorded = _Pointer()
        try:
            try:
                work()
            finally:
                self._cuda.call("cudaStreamEndCapture", self.handle, ctypes.byref(recorded))
            handle = self._cuda.create("cudaGraphInstantiateWithFlags", recorded, ctypes.c_ulonglong(0))
        finally:
            if recorded:
                self._cuda.call("cudaGraphDestroy", recorded)
        return Graph(self._cuda, handle)

    def free(self) -> None:
        """Give the stream back."""
        self._cuda.call("cudaStreamDestroy", self.handle)


class Event:
    """A moment in a stream, by the device's clock."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.create("cudaEventCreate")

    def record(self, stream: Stream) -> None:
        """Be the moment when all is done that was queued before."""
        self._cuda.call("cudaEventRecord", self.handle, stream.handle)

    def ms_since(self, earlier: "Event") -> float:
        """Return the milliseconds from ``earlier``, to half a microsecond; both must have come."""
        ms = ctypes.c_float()
        self._cuda.call("cudaEventElapsedTime", ctypes.byref(ms), earlier.handle, self.handle)
        return ms.value

    def free(self) -> None:
        """Give the event back."""
        self._cuda.call("cudaEventDestroy", self.handle)


class Graph:
    """Recorded work: one launch in place of one for each kernel, which is most of the time of a small model."""

    def __init__(self, cuda: Cuda, handle: _Pointer) -> None:
        self._cuda, self._handle = cuda, handle

    def launch(self, stream: Stream) -> None:
        """Queue the work."""
        self._cuda.call("cudaGraphLaunch", self._handle, stream.handle)

    def free(self) -> None:
        """Give the graph back."""
        self._cuda.call("cudaGraphExecDestroy", self._handle)
