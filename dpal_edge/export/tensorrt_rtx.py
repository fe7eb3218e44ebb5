"""TensorRT for RTX: NVIDIA's parser and compiler on a machine without a GPU, and what it made of the layers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime.rtx import load_bindings
from dpal_edge.runtime.tensorrt import BuildOptions, build_engine

OPTIONS = BuildOptions()
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
    """Compile an ONNX file ahead of time for all cards that TensorRT for RTX supports.

    Raises:
        BackendUnavailable: the packages are not installed.
        ModelFileError: the parser or the compiler refuses the graph.
    """
    built = build_engine(_load(), graph, OPTIONS)
    path.write_bytes(built.engine)
    return read_layers("\n".join(built.log))


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
