"""TensorRT for RTX: NVIDIA's parser and compiler on a machine without a GPU, and what it made of the layers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.runtime.rtx import load_bindings

_BATCHES = (1, 8, 32)  # least, best served, most
_LAYER = re.compile(r"Name: (?P<name>[^,]*), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: ")
_SYNCHRONISATION = ("signal", "wait", "shape_call")


@dataclass(frozen=True)
class Layers:
    """What the compiler made of a graph."""

    total: int  # kernels
    products: int  # matrix products and convolutions
    int8_products: int  # of them, on INT8
    fused_attention: int  # blocks whose two products and softmax are one kernel


def compile_engine(graph: Path, path: Path) -> Layers:
    """Compile an ONNX file ahead of time for all cards that TensorRT for RTX supports, for batches of 1 to 32.

    Raises:
        BackendUnavailable: the packages are not installed.
        ModelFileError: the parser or the compiler refuses the graph.
    """
    trt = _load()
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # the bindings have no types
        def log(self, severity: Any, message: str) -> None:
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise ModelFileError(f"{graph.name}: TensorRT for RTX {trt.__version__} does not take it ({reasons})")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log then lists the layers
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        image = network.get_input(i)
        profile.set_shape(image.name, *((batch, *tuple(image.shape)[1:]) for batch in _BATCHES))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ModelFileError(f"{graph.name}: TensorRT for RTX {trt.__version__} cannot build it ({lines[-1]})")
    path.write_bytes(bytes(engine))
    return read_layers("\n".join(lines))


def read_layers(log: str) -> Layers:
    """Count kernels in a build log of detailed verbosity."""
    found = [match for match in _LAYER.finditer(log) if match["type"] not in _SYNCHRONISATION]
    products = [match for match in found if match["type"] in ("gemm", "correlation", "conv")]
    return Layers(
        total=len(found),
        products=len(products),
        int8_products=sum("Datatype: Int8" in match["inputs"] for match in products),
        fused_attention=sum("_mha" in match["name"] for match in found),
    )


def version() -> str:
    """Return the compiler's version.

    Raises:
        BackendUnavailable: it is not installed.
    """
    return str(_load().__version__)


def _load() -> Any:
    try:
        return load_bindings()
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"trt-rtx targets need NVIDIA's compiler: pip install 'dpal-edge[tensorrt-rtx]' ({error})"
        ) from error
