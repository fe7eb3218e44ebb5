"""A transformer of one block and two heads on images of 4 x 4 pixels, small enough to count by hand."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH = 16, 8


def write_small(path: Path) -> Path:
    rng = np.random.default_rng(0)
    constants = {
        "tokens": np.array([-1, 16, 3]),
        "backbone.patches.weight": rng.normal(size=(3, 8)),
        "backbone.patches.bias": rng.normal(size=8),
        "one": np.ones(8),
        "zero": np.zeros(8),
        "qkv.weight": rng.normal(size=(8, 24)),
        "proj.weight": rng.normal(size=(8, 8)),
        "fc1.weight": rng.normal(size=(8, 16)),
        "fc1.bias": rng.normal(size=16),
        "fc2.weight": rng.normal(size=(16, 8)),
        "fc2.bias": rng.normal(size=8),
        "middle": np.array([1]),
        "pose.weight": rng.normal(size=(8, 5)),
        "map": np.array([-1, 8, 4, 4]),
        "classify.weight": rng.normal(size=(2, 8, 1, 1)),
        "per_label": rng.normal(size=(2, 8)),
    }
    node = helper.make_node
    norm = ["one", "zero"]
    nodes = [
        node("Cast", ["images"], ["floats"], "to_float", to=TensorProto.FLOAT),
        node("Reshape", ["floats", "tokens"], ["flat"], "flatten"),
        node("MatMul", ["flat", "backbone.patches.weight"], ["embedded"], "backbone.patches.embed"),
        node("Add", ["embedded", "backbone.patches.bias"], ["x0"], "add_bias"),
        node("LayerNormalization", ["x0", *norm], ["n1"], "norm_1"),
        node("MatMul", ["n1", "qkv.weight"], ["qkv"], "backbone.blocks.0.attn.qkv"),
        node("Split", ["qkv"], ["q", "k", "v"], "split", axis=-1, num_outputs=3),
        node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"], "scores"),
        node("Softmax", ["scores"], ["weights"], "softmax", axis=-1),
        node("MatMul", ["weights", "v"], ["mixed"], "mix"),
        node("MatMul", ["mixed", "proj.weight"], ["projected"], "backbone.blocks.0.attn.proj"),
        node("Add", ["x0", "projected"], ["x1"], "residual_1"),
        node("LayerNormalization", ["x1", *norm], ["n2"], "norm_2"),
        node("MatMul", ["n2", "fc1.weight"], ["wide"], "backbone.blocks.0.mlp.fc1"),
        node("Add", ["wide", "fc1.bias"], ["wide_biased"], "wide_bias"),
        node("Gelu", ["wide_biased"], ["active"], "gelu"),
        node("MatMul", ["active", "fc2.weight"], ["narrow"], "backbone.blocks.0.mlp.fc2"),
        node("Add", ["narrow", "fc2.bias"], ["narrow_biased"], "narrow_bias"),
        node("Add", ["x1", "narrow_biased"], ["x2"], "residual_2"),
        node("LayerNormalization", ["x2", *norm], ["features"], "norm_3"),
        node("ReduceMean", ["features", "middle"], ["mean"], "average", keepdims=0),
        node("MatMul", ["mean", "pose.weight"], ["pose"], "heads.pose.out"),
        node("Transpose", ["features"], ["channels"], "to_channels", perm=[0, 2, 1]),
        node("Reshape", ["channels", "map"], ["maps"], "to_map"),
        node("Conv", ["maps", "classify.weight"], ["segments"], "heads.segments.classify"),
        node("Einsum", ["n1_head", "per_label"], ["labels"], "weigh", equation="bn, cn -> bc"),
    ]
    nodes.insert(-1, node("LayerNormalization", ["mean", *norm], ["n1_head"], "heads.labels.norm"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 4, 4, 3])],
        [
            helper.make_tensor_value_info("pose", TensorProto.FLOAT, ["n", 5]),
            helper.make_tensor_value_info("segments", TensorProto.FLOAT, ["n", 2, 4, 4]),
            helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["n", 2]),
        ],
        [numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
