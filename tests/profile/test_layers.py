"""Real profiles of a small graph by ONNX Runtime and OpenVINO, and TensorRT's names for the kernels that it makes."""

import math
import re

import pytest
from small_graph import write_small

from dpal_edge.errors import BackendUnavailable, ModelFileError
from dpal_edge.profile.graph_files import read_graph
from dpal_edge.profile.layers import SEVERAL, place_engine_layers, profile_layers
from dpal_edge.runtime.rtx import load_bindings
from dpal_edge.runtime.tensorrt import BuildOptions, build_engine

BLOCKS = {
    "patch embedding", "block 0 attention", "block 0 MLP", "norms", "head pose", "head segments", "head labels",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("layers") / "small.onnx")


@pytest.mark.parametrize(("engine", "source"), [("onnxruntime", "ONNX Runtime profiling"), ("openvino", "OpenVINO c")])
def test_each_kernel_is_placed(small, engine, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = profile_layers(small, engine=engine, batch=3, calls=4)
    assert found["engine"].startswith(engine)
    assert found["source"].startswith(source)
    assert (found["file"], found["batch"], found["calls"]) == ("small.onnx", 3, 4)
    groups = {group["group"]: group for group in found["groups"]}
    assert set(groups) == BLOCKS
    kernels = found["kernels"]
    assert math.isclose(sum(kernel["ms"] for kernel in kernels), found["sum_ms"], abs_tol=1e-3)
    assert math.isclose(sum(group["ms"] for group in groups.values()), found["sum_ms"])
    assert math.isclose(sum(group["share"] for group in groups.values()), 1)
    assert math.isclose(found["unaccounted_share"], 1 - found["sum_ms"] / found["host_ms"])
    assert {kernel["found"] for kernel in kernels} <= {"name", "graph", "order"}
    assert sum(group["kernels"] for group in groups.values()) == len(kernels)
    for name in ("patch embedding", "block 0 attention", "block 0 MLP", "head pose", "head segments"):
        assert list(groups[name]["precisions"]) == ["f32"], name
        assert groups[name]["ms"] > 0
    assert groups["block 0 MLP"]["operations"] == 2 * 3 * (16 * 8 * 16 + 16 * 16 * 8)
    assert found["plain_ms"] > 0
    assert found["missing"] == []
    assert list(tmp_path.iterdir()) == []  # the engine's own file is gone


def test_attention_in_one_kernel_and_in_parts(small):
    softmax = profile_layers(small, engine="onnxruntime", batch=1, calls=1)
    assert softmax["attention"] == {"blocks": 1, "fused": 0}
    attention = profile_layers(small, engine="openvino", batch=1, calls=1)
    separate = sum("softmax" in kernel["kind"].lower() for kernel in attention["kernels"])
    assert attention["attention"] == {"blocks": 1, "fused": 1 - separate}


def test_calls_are_averages(small):
    """Twice as many calls count as many kernels, and the sums stay below the wall time of a call."""
    one, two = (profile_layers(small, engine="onnxruntime", batch=1, calls=calls) for calls in (1, 7))
    assert [kernel["name"] for kernel in one["kernels"]] == [kernel["name"] for kernel in two["kernels"]]
    assert two["sum_ms"] < two["host_ms"]


def test_what_cannot_be(small, tmp_path):
    with pytest.raises(ValueError, match="batch is 0"):
        profile_layers(small, engine="onnxruntime", batch=0)
    with pytest.raises(BackendUnavailable, match="no engine 'tensorrt'"):
        profile_layers(small, engine="tensorrt", batch=1)
    with pytest.raises(BackendUnavailable, match="only openvino computes in a precision of choice"):
        profile_layers(small, engine="onnxruntime", batch=1, precision="bf16")
    (tmp_path / "text.onnx").write_text("not a graph")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ModelFileError, match=r"text\.onnx"):
            profile_layers(tmp_path / "text.onnx", engine=engine, batch=1)


@pytest.fixture(scope="module")
def compiled(small):
    """What NVIDIA's compiler tells of the kernels that it made of the small graph; only running them takes a GPU."""
    try:
        bindings = load_bindings()
    except ImportError:
        pytest.skip("TensorRT for RTX is not installed")
    log = "\n".join(build_engine(bindings, small, BuildOptions()).log)
    line = r"Name: ([^,\n]*), LayerType: (\w+), Inputs: \[(.*?)\], Constants: .*Metadata: (.*)"
    layers = [
        {"Name": name, "LayerType": kind, "Metadata": notes,
         "Inputs": [{"Datatype": dtype} for dtype in re.findall(r"Datatype: (\w+)", inputs)]}
        for name, kind, inputs, notes in re.findall(line, log)
    ]  # fmt: skip
    return [layer for layer in layers if layer["LayerType"] not in ("signal", "wait", "shape_call")]


def test_the_names_of_tensorrt_tell_the_block(compiled, small):
    times = {layer["Name"]: 0.5 for layer in compiled}
    kernels = {kernel.name: kernel for kernel in place_engine_layers(times, compiled, read_graph(small, 1))}
    assert kernels.keys() == times.keys()
    groups = {kernel.group for kernel in kernels.values()}
    assert {"block 0 attention", "block 0 MLP", "head segments"} <= groups
    assert groups <= {*BLOCKS, SEVERAL}
    by_notes = {layer["Name"]: layer["Metadata"] for layer in compiled}
    for name, group in (("mlp.fc1", "block 0 MLP"), ("mlp.fc2", "block 0 MLP"), ("attn.qkv", "block 0 attention")):
        own = [kernel for kernel in kernels.values() if name in by_notes[kernel.name]]  # fc1 is fused, without its name
        assert {(kernel.group, kernel.precision, kernel.multiplies) for kernel in own} == {(group, "f32", True)}
    assert all(kernel.found for kernel in kernels.values())


def test_kernels_of_several_blocks(small):
    graph = read_graph(small, 1)
    layers = [
        {"Name": "mix", "Metadata": "[ONNX Layer: norm_1]\x1e[ONNX Layer: backbone.blocks.0.attn.qkv]"},
        {"Name": "{ForeignNode[flatten...classify]}", "Metadata": "\x1e".join(
            f"[ONNX Layer: {name}]" for name in ("flatten", "gelu", "mix", "heads.pose.out", "norm_3"))},
        {"Name": "__myl_Tran_myl0_9", "Metadata": "", "Inputs": [{"Format/Datatype": "Row major linear INT8 format"}]},
        "a name alone, as engines without details have",
    ]  # fmt: skip
    times = {layer["Name"]: 1.0 for layer in layers[:3]} | {"unheard of": 2.0}
    kernels = place_engine_layers(times, layers, graph)
    assert [kernel.group for kernel in kernels] == ["block 0 attention", SEVERAL, SEVERAL, SEVERAL]
    assert [kernel.found for kernel in kernels] == ["name", "name", "order", "order"]
    assert kernels[2].precision == "int8"


def test_without_a_graph_names_of_modules_tell(tmp_path):
    layers = [{"Name": "backbone.blocks.3.mlp.fc1_myl0_4"}, {"Name": "__myl_MulAdd"}]
    kernels = place_engine_layers({layer["Name"]: 1.0 for layer in layers}, layers, None)
    assert [kernel.group for kernel in kernels] == ["block 3 MLP", "block 3 MLP"]
