"""Run one model file, whatever the engine."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime.device import cpu_features

# By file suffix, the preferred engine first; the engines are named like the packages that they come in.
ENGINES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".engine": ("tensorrt",),
    ".rtx": ("tensorrt_rtx",),
}


_TIMED_S = 0.5  # that calls are repeated for, at least


class Backend(Protocol):
    """A loaded model. Blocking; use it from one thread at a time."""

    name: str  # engine, version and device, for example "onnxruntime 1.23.0 cpu"
    inputs: Mapping[str, tuple[int | None, ...]]  # name -> shape, None where free

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name.

        Args:
            feeds: of all inputs.
            outputs: that are wanted; None is all. An engine that can leaves out the work for others.

        Raises:
            ModelFileError: the engine refuses the inputs, or the model fails on them.
        """
        ...


@runtime_checkable
class DeviceClock(Protocol):
    """What a backend has besides, whose engine counts time itself."""

    device_clock: str  # what it counts, in words

    def run_timed(self, feeds: Mapping[str, NDArray[Any]]) -> float:
        """Run as ``Backend.run`` does; return the milliseconds that the engine counted."""
        ...


def open_backend(
    path: Path,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Backend:
    """Load ``path`` with ``engine``, or with the first one installed that reads files of its suffix.

    Args:
        device: "cpu", "cuda", "gpu" or "npu", as the engine has them; ``None`` is its usual one.
        threads: CPU threads inside one operator; ``None`` is one per physical core.
        precision: that OpenVINO computes in, "f32" or "bf16"; ``None`` is the file's own.

    Raises:
        BackendUnavailable: the engine, the precision or the device does not exist here; nothing falls back in silence.
        ModelFileError: the file is missing or is not a model that the engine can load.
    """
    engine = choose_engine(path, engine)
    try:
        module = import_module(f"dpal_edge.runtime._{engine}")
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{path} needs {engine}: pip install 'dpal-edge[{engine}]'") from error
    backend: Backend = module.load(path, device or module.DEVICE, threads or physical_cores(), precision)
    return backend


def require_own_precision(path: Path, precision: str | None) -> None:
    """Refuse a precision for an engine that computes as the file says.

    Raises:
        BackendUnavailable: one is given.
    """
    if precision is not None:
        raise BackendUnavailable(f"{path}: only openvino computes in a precision of choice, here {precision!r}")


def time_in_turns(
    backends: Mapping[str, Backend], feeds: Mapping[str, NDArray[Any]], least: int
) -> dict[str, list[float]]:
    """Return the seconds of each call, ``least`` or more of them within half a second or more; a first is not counted.

    All take turns, so that a busy moment meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in backends}
    for backend in backends.values():
        backend.run(feeds)
    began = time.perf_counter()
    while backends and (min(map(len, times.values())) < least or time.perf_counter() - began < _TIMED_S):
        for name, backend in backends.items():
            start = time.perf_counter()
            backend.run(feeds)
            times[name].append(time.perf_counter() - start)
    return times


def choose_engine(path: Path, engine: str | None = None) -> str:
    """Return ``engine``, or the first one installed that reads files of this suffix, or the preferred one of them.

    Raises:
        BackendUnavailable: no engine reads such files, or ``engine`` does not.
    """
    readers = ENGINES.get(path.suffix)
    if readers is None:
        raise BackendUnavailable(f"{path}: no engine for {path.suffix!r} files, expected {', '.join(ENGINES)}")
    if engine is None:
        return next((name for name in readers if find_spec(name)), readers[0])
    if engine not in readers:
        raise BackendUnavailable(f"{path}: no engine {engine!r}, expected one of: {', '.join(readers)}")
    return engine


def ways_to_run(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield each installed engine that reads ``path``, and the precisions that it may be told; None is the file's own.

    Where none is installed it is the preferred one, whose absence is then told when it is opened.
    """
    readers = ENGINES.get(path.suffix, ())
    for name in tuple(name for name in readers if find_spec(name)) or readers[:1]:
        yield name, None
        if name == "openvino" and cpu_features().fast_bf16:
            yield name, "bf16"


def physical_cores() -> int:
    """Count the cores this process may run on, two hyper-threads as one; CPU quotas of containers are not seen.

    More threads than cores slow matrix products down: hyper-threads share the multipliers.
    """
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:  # some kernels and sandboxes hide the topology
        return str(cpu)
