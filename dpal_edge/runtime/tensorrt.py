"""TensorRT's compiler: one builder for TensorRT 10.3 to 11 and TensorRT for RTX, which asks what a version has.

Graphs say their own precision (strongly typed), so nothing is set that a version may have dropped: no precision flag,
no calibrator.
"""

from collections import deque
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable, ModelFileError

# Versions whose engines of ViTs build and then compute something else: NVIDIA/TensorRT 4419, 4558, 4723 and 4742.
SILENTLY_WRONG = ("10.3", "10.4")
NEWER = "a newer TensorRT is the remedy: 10.7 as a tarball for L4T, or JetPack 7 (7.2 on Orin)"

_LINES = 10_000  # of the log, the newest: a build tells a line for each layer and more
_OLDEST = 10  # major version: 8.6 builds no strongly typed networks, its parser stops at opset 17


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What was asked of the compiler; part of an engine's fingerprint."""

    batches: tuple[int, int, int] = (1, 8, 32)  # least, best served, most images at a time
    workspace: int = 1 << 30  # most bytes that a layer may take while it runs
    optimization_level: int = 3  # 0 to 5: how long the compiler searches; 3 is its own choice

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "batches": list(self.batches)}


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the compiler made of a graph."""

    engine: bytes
    log: tuple[str, ...]  # with a line for each layer
    timing_cache: bytes  # what it measured, which makes the next build shorter; empty where it keeps none
    cache_taken: bool  # the timing cache that was given, for a start


def import_tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        BackendUnavailable: it is not here, does not load, or is too old.
    """
    try:
        trt = import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a library of another JetPack
        raise BackendUnavailable(
            f"TensorRT cannot be imported ({error}); JetPack installs it for the system's Python: make the environment "
            f"with python3 -m venv --system-site-packages"
        ) from error
    require_strong_types("TensorRT", trt.__version__)
    return trt


def require_strong_types(name: str, version: str) -> None:
    """Refuse a release that is too old for our graphs; ``name`` is what it comes as.

    Raises:
        BackendUnavailable: it is.
    """
    if int(version.partition(".")[0]) < _OLDEST:
        raise BackendUnavailable(
            f"{name} {version} is older than the strongly typed graphs of this package need; 10.3 or later comes with "
            f"JetPack 6.1"
        )


def listen(trt: Any) -> Any:
    """Return a logger for TensorRT that keeps what it is told in ``lines``; ``reason()`` is the last error.

    Without an error it is the last warning.
    """
    severities = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # super() does not reach the constructor of a bound class
            self.lines: deque[str] = deque(maxlen=_LINES)  # an engine that runs for months may talk, too
            self._error, self._warning = "", "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                self._error = " ".join(message.split())
            elif severity == severities.WARNING:
                self._warning = " ".join(message.split())

        def reason(self) -> str:
            return self._error or self._warning

    return Log()


def build_engine(trt: Any, graph: Path, options: BuildOptions, *, timing_cache: bytes | None = None) -> Built:
    """Compile the ONNX file ``graph``, whose first axes are batches, with the bindings ``trt``.

    Args:
        timing_cache: of an earlier build by the same version on the same GPU, which may be empty; one that is damaged
            or of another is left unused. None keeps none, as TensorRT for RTX.

    Raises:
        ModelFileError: the parser or the compiler refuses the graph; TensorRT's own words say why.
    """
    log = listen(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise ModelFileError(f"{graph.name}: TensorRT {trt.__version__} does not take it ({reasons})")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log and the inspector then tell the layers
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    config.builder_optimization_level = options.optimization_level
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        image = network.get_input(i)
        profile.set_shape(image.name, *((batch, *tuple(image.shape)[1:]) for batch in options.batches))
    config.add_optimization_profile(profile)
    taken = timing_cache is not None and _take_timings(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ModelFileError(f"{graph.name}: TensorRT {trt.__version__} cannot build it ({log.reason()})")
    measured = None if timing_cache is None else config.get_timing_cache()
    kept = b"" if measured is None else bytes(measured.serialize())
    return Built(engine=bytes(engine), log=tuple(log.lines), timing_cache=kept, cache_taken=taken)


def _take_timings(config: Any, known: bytes) -> bool:
    """Start from the timings ``known``, or from none where TensorRT refuses them; return whether it took them."""
    cache = config.create_timing_cache(known)
    if cache is not None and config.set_timing_cache(cache, False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return False


def _network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network of explicit batches, as far as this version has to be told."""
    kinds = trt.NetworkDefinitionCreationFlag
    wanted = ("EXPLICIT_BATCH", "STRONGLY_TYPED")  # the first is gone from 11, where nothing else exists
    return sum(1 << int(getattr(kinds, name)) for name in wanted if hasattr(kinds, name))
