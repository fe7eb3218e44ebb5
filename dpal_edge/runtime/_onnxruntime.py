"""ONNX Runtime as a backend."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime.backend import require_own_precision

DEVICE = "cpu"  # unless another is asked for

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERROR_LEVEL = 3  # of ONNX Runtime's log: warnings about a fallback become our own error

# The engine's exceptions have no base class of their own.
FAILURES = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)


class OnnxRuntimeBackend:
    """An ``InferenceSession`` pinned to one provider: it never falls back in silence."""

    def __init__(self, session: ort.InferenceSession, name: str) -> None:
        self.name = name
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        self.inputs = {i.name: tuple(d if isinstance(d, int) else None for d in i.shape) for i in session.get_inputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Map arrays by input name to arrays by output name."""
        names, options = self._outputs, None
        if outputs is not None:
            names, options = list(outputs), ort.RunOptions()
            options.only_execute_path_to_fetches = True
        try:
            found = self._session.run(names, dict(feeds), options)
        except (ValueError, *FAILURES) as error:  # ValueError: an input name is missing
            raise ModelFileError(f"{self.name} cannot run the model on these inputs: {_line(error)}") from error
        return dict(zip(names, found, strict=True))


def load(path: Path, device: str, threads: int, precision: str | None) -> OnnxRuntimeBackend:
    """Open ``path`` on ``device`` ("cpu" or "cuda") with ``threads`` CPU threads per operator."""
    require_own_precision(path, precision)
    provider = PROVIDERS.get(device)
    if provider not in ort.get_available_providers():
        usable = [name for name, value in PROVIDERS.items() if value in ort.get_available_providers()]
        raise BackendUnavailable(
            f"{path}: this onnxruntime has no device {device!r}, expected one of: {', '.join(usable)}"
        )
    try:
        session = ort.InferenceSession(path, session_options(device, threads), providers=[provider])
    except FAILURES as error:
        raise ModelFileError(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({_line(error)}); export the model again"
        ) from error
    # A provider can be compiled in and still fail to start (missing driver); the session then runs on the CPU.
    if (found := session.get_providers()[0]) != provider:
        raise BackendUnavailable(f"{path}: onnxruntime fell back from {provider} to {found}; check the driver")
    return OnnxRuntimeBackend(session, f"onnxruntime {ort.__version__} {device}")


def session_options(device: str, threads: int) -> ort.SessionOptions:
    """Return the settings with which files run on ``device``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERROR_LEVEL
    if device == "cpu":
        # INT8 kernels saturate sums on CPUs without VNNI, outputs came out 30 % off: compute what the graph says.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
