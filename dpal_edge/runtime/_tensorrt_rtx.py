"""TensorRT for RTX as a backend: engines that were compiled ahead of time for all RTX cards."""

from pathlib import Path

from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime._tensorrt import DEVICE, TensorRtBackend, open_engine
from dpal_edge.runtime.backend import require_own_precision
from dpal_edge.runtime.rtx import load_bindings

__all__ = ["DEVICE", "load"]


def load(path: Path, device: str, threads: int, precision: str | None) -> TensorRtBackend:
    """Open the engine file ``path``, as ``_tensorrt.load`` does; the card's own kernels are made at the first call."""
    try:
        trt = load_bindings()
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"{path} needs NVIDIA's runtime: pip install 'dpal-edge[tensorrt-rtx]'") from error
    require_own_precision(path, precision)
    # Not recorded: kernels for the very shape are made while others stand in for them, and a record would keep those.
    return open_engine(path, device, trt, "tensorrt-rtx", recorded=False)
