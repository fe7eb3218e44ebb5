"""Each rule of the linter on a graph that breaks it and no other, and on one that breaks none."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import dpal_edge
from dpal_edge.cli import main
from dpal_edge.errors import ModelFileError
from dpal_edge.export.lint import lint
from dpal_edge.manifest import Manifest

ASSETS = Path(dpal_edge.__file__).parent / "assets"
WIDTH, OUT = 4, 6


def constant(name, values, dtype=np.float16):
    return numpy_helper.from_array(np.array(values, dtype), name)


class Builder:
    """A graph of one MatMul in FP16 whose inputs are quantized as they should be; changed before it is built."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.constants = {
            "w": constant("w", rng.normal(size=(WIDTH, OUT))),
            "x.scale": constant("x.scale", 0.1),
            "x.zero": constant("x.zero", 0, np.int8),
            "w.scale": constant("w.scale", [0.1] * OUT),
            "w.zero": constant("w.zero", [0] * OUT, np.int8),
            "norm": constant("norm", [1.0] * WIDTH),
        }
        self.nodes = {
            "normal": helper.make_node("LayerNormalization", ["input", "norm"], ["x"], "normal"),
            "xq": helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.int8"], "xq"),
            "xd": helper.make_node("DequantizeLinear", ["x.int8", "x.scale", "x.zero"], ["x.float"], "xd"),
            "wq": helper.make_node("QuantizeLinear", ["w", "w.scale", "w.zero"], ["w.int8"], "wq", axis=1),
            "wd": helper.make_node("DequantizeLinear", ["w.int8", "w.scale", "w.zero"], ["w.float"], "wd", axis=1),
            "product": helper.make_node("MatMul", ["x.float", "w.float"], ["y"], "product"),
        }
        self.opset = 20

    def build(self):
        graph = helper.make_graph(
            list(self.nodes.values()),
            "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT16, ["n", WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", OUT])],
            list(self.constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])

    def set(self, name, values, dtype=np.float16):
        self.constants[name] = constant(name, values, dtype)


def axis_0(builder):
    """The fault that no compiler tells: a scale per input channel. 4 by 4, so that the lengths agree."""
    builder.set("w", np.eye(WIDTH))
    builder.set("w.scale", [0.1] * WIDTH)
    builder.set("w.zero", [0] * WIDTH, np.int8)
    for name in ("wq", "wd"):
        builder.nodes[name].attribute[0].i = 0


def too_few_scales(builder):
    builder.set("w.scale", [0.1] * WIDTH)
    builder.set("w.zero", [0] * WIDTH, np.int8)


def stored_quantized(builder):
    """The other one: the weight in INT8, without QuantizeLinear."""
    del builder.nodes["wq"], builder.constants["w"]
    builder.set("w.int8", np.ones((WIDTH, OUT)), np.int8)


def asymmetric(builder):
    builder.set("x.zero", 3, np.int8)


def unsigned(builder):
    builder.set("x.zero", 0, np.uint8)


def unsigned_by_default(builder):
    for name in ("xq", "xd"):
        del builder.nodes[name].input[2]


def scales_per_channel_of_an_activation(builder):
    builder.set("x.scale", [0.1] * WIDTH)
    builder.set("x.zero", [0] * WIDTH, np.int8)


def float_weight(builder):
    builder.nodes["product"].input[1] = "w"
    del builder.nodes["wq"], builder.nodes["wd"]


def no_dequantize(builder):
    builder.nodes["more"] = helper.make_node("QuantizeLinear", ["y", "x.scale", "x.zero"], ["y.int8"], "more")


def another_scale_back(builder):
    builder.set("other", 0.2)
    builder.nodes["xd"].input[1] = "other"


def zero_scale(builder):
    builder.set("x.scale", 0.0)


def bias(builder):
    builder.set("b", [1] * OUT, np.int32)
    builder.set("b.scale", 0.1)
    builder.nodes["bias"] = helper.make_node("DequantizeLinear", ["b", "b.scale"], ["b.float"], "bias")
    builder.nodes["add"] = helper.make_node("Add", ["y", "b.float"], ["z"], "add")


def residual(builder):
    builder.nodes["move"] = helper.make_node("Identity", ["x.float"], ["moved"], "move")
    builder.nodes["residual"] = helper.make_node("Add", ["moved", "moved"], ["z"], "residual")


def moved_weight(builder, shape, operator, *inputs, axis, **settings):
    """Store the weight in another shape, and move it behind its DequantizeLinear."""
    builder.set("w", np.ones(shape))
    builder.set("w.scale", [0.1] * shape[axis])
    builder.set("w.zero", [0] * shape[axis], np.int8)
    product = builder.nodes.pop("product")  # which comes last
    for name in ("wq", "wd"):
        builder.nodes[name].attribute[0].i = axis
    builder.nodes["move"] = helper.make_node(operator, ["w.float", *inputs], ["w.moved"], "move", **settings)
    builder.nodes["product"] = product
    product.input[1] = "w.moved"


def transposed(builder, axis=0):
    moved_weight(builder, (OUT, WIDTH), "Transpose", axis=axis, perm=[1, 0])


def transposed_axis_1(builder):
    transposed(builder, axis=1)


def transposed_and_stored_quantized(builder):
    transposed(builder)
    del builder.nodes["wq"], builder.constants["w"]
    builder.set("w.int8", np.ones((OUT, WIDTH)), np.int8)


def reshaped(builder, shape=(WIDTH, OUT, 1), axis=1):
    builder.set("shape", [0, -1], np.int64)
    moved_weight(builder, shape, "Reshape", "shape", axis=axis)


def reshaped_axis_0(builder):
    reshaped(builder, axis=0)


def merged(builder):
    """No axis of what is stored is that of the outputs."""
    reshaped(builder, (WIDTH, 2, OUT // 2), axis=2)


def squeezed(builder):
    builder.set("axes", [0], np.int64)
    moved_weight(builder, (1, WIDTH, OUT), "Squeeze", "axes", axis=2)


def widened(builder):
    builder.set("axes", [0], np.int64)
    moved_weight(builder, (WIDTH, OUT), "Unsqueeze", "axes", axis=1)
    builder.nodes["back"] = helper.make_node("Flatten", ["w.moved"], ["w.back"], "back", axis=2)
    builder.nodes["product"] = builder.nodes.pop("product")
    builder.nodes["product"].input[1] = "w.back"


def identity(builder):
    moved_weight(builder, (WIDTH, OUT), "Identity", axis=1)


def moved_input(builder):
    builder.nodes["move"] = helper.make_node("Transpose", ["x.float"], ["x.moved"], "move", perm=[0, 1])
    builder.nodes["product"] = builder.nodes.pop("product")
    builder.nodes["product"].input[0] = "x.moved"


def float32(builder):
    for name in ("w", "x.scale", "w.scale", "norm"):
        builder.constants[name] = constant(name, numpy_helper.to_array(builder.constants[name]), np.float32)


def old(builder):
    builder.opset = 17


def test_what_is_right_passes():
    report = lint(Builder().build())
    assert report.findings == ()
    assert (report.linear, report.quantized, report.errors) == (1, 1, 0)


@pytest.mark.parametrize(
    ("change", "rule", "where"),
    [
        (axis_0, "weight-axis", "product"),
        (too_few_scales, "weight-axis", "product"),
        (transposed_axis_1, "weight-axis", "product"),
        (reshaped_axis_0, "weight-axis", "product"),
        (merged, "weight-axis", "product"),
        (transposed_and_stored_quantized, "weight-dq-only", "product"),
        (stored_quantized, "weight-dq-only", "product"),
        (asymmetric, "zero-point", "xq"),
        (unsigned, "uint8", "xq"),
        (unsigned_by_default, "uint8", "xq"),
        (scales_per_channel_of_an_activation, "activation-scale", "xq"),
        (float_weight, "half-quantized", "product"),
        (no_dequantize, "pair", "more"),
        (another_scale_back, "pair", "xq"),
        (zero_scale, "scale", "xq"),
        (bias, "int32-bias", "bias"),
        (residual, "misplaced", "xd"),
        (float32, "float32-body", "xq"),
        (old, "opset", "the graph"),
    ],
)
def test_each_fault_is_named_where_it_is(change, rule, where):
    builder = Builder()
    change(builder)
    report = lint(builder.build())
    assert {finding.rule for finding in report.findings} == {rule}
    assert where in {finding.where for finding in report.findings}
    assert report.errors == len(report.findings)


@pytest.mark.parametrize("change", [transposed, reshaped, squeezed, widened, identity, moved_input])
def test_what_only_moves_is_looked_through(change):
    builder = Builder()
    change(builder)
    report = lint(builder.build())
    assert report.findings == ()
    assert (report.linear, report.quantized) == (1, 1)


def test_one_scale_for_a_whole_weight_is_a_warning():
    builder = Builder()
    builder.set("w.scale", 0.1)
    builder.set("w.zero", 0, np.int8)
    report = lint(builder.build())
    assert [(f.rule, f.severity, f.where) for f in report.findings] == [("weight-scale", "warning", "product")]


def test_layers_left_in_float_are_counted():
    builder = Builder()
    builder.set("v", np.ones((OUT, OUT)))
    builder.nodes["second"] = helper.make_node("MatMul", ["y", "v"], ["z"], "second")
    report = lint(builder.build())
    [finding] = report.findings
    assert (finding.rule, finding.severity, finding.where) == ("unquantized", "warning", "second")
    assert (report.linear, report.quantized, report.errors) == (2, 1, 0)


def test_operators_in_parts():
    builder = Builder()
    names = ["mean", "less", "square", "variance", "root"]
    kinds = ["ReduceMean", "Sub", "Mul", "ReduceMean", "Sqrt"]
    inputs = [["y"], ["y", "mean"], ["less", "less"], ["square"], ["variance"]]
    for name, kind, read in zip(names, kinds, inputs, strict=True):
        builder.nodes[name] = helper.make_node(kind, read, [name], name)
    builder.nodes["erf"] = helper.make_node("Erf", ["root"], ["z"], "erf")
    found = [(finding.rule, finding.where) for finding in lint(builder.build()).findings]
    assert found == [("decomposed", "erf"), ("decomposed", "root")]


def test_the_command(tmp_path):
    builder = Builder()
    onnx.save(builder.build(), tmp_path / "good.onnx")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "good.onnx")])
    assert result.exit_code == 0, result.output
    assert "1 of 1 linear layers are quantized; 0 errors, 0 warnings" in result.output
    axis_0(builder)
    onnx.save(builder.build(), tmp_path / "bad.onnx")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "bad.onnx")])
    assert result.exit_code == 2
    assert "weight-axis: product: 4 scales along axis 0 of the weight, expected 4 along axis 1" in result.output


@pytest.mark.parametrize("content", [b"no model at all", b""])
def test_other_files(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "x.onnx")])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    with pytest.raises(ModelFileError, match="cannot be read"):
        lint(tmp_path / "missing.onnx")


def test_weights_in_another_file_that_is_gone(tmp_path):
    onnx.save(Builder().build(), tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "x.onnx")]).exit_code == 0
    for content in (b"short", None):
        (tmp_path / "x.data").write_bytes(content) if content else (tmp_path / "x.data").unlink()
        result = CliRunner().invoke(main, ["verify", str(tmp_path / "x.onnx")])
        assert result.exit_code == 1
        assert "x.onnx: its weights are in another file, which cannot be read" in result.output
        assert result.output.count("\n") == 1


@pytest.mark.parametrize("name", ["dpal_vit_tiny", "person_detector", "person_detector_wide"])
def test_graphs_of_the_package(name):
    """They read their weights from a checkpoint, through a Transpose and a Cast."""
    manifest = Manifest.read(ASSETS / f"{name}.json")
    [artifact] = [one for one in manifest.artifacts if one.target == "trt-int8"]
    report = lint(ASSETS / artifact.file.file)
    assert report.errors == 0
    if name == "dpal_vit_tiny":
        assert (report.linear, report.quantized) == (66, 66 - len(artifact.kept))
