"""The profile of an engine, through TensorRT's profiler and inspector on a GPU that is not there."""

import math

import pytest
from tiny_bundle import write_model

from dpal_edge.errors import ModelFileError
from dpal_edge.profile.layers import profile_layers
from dpal_edge.runtime.tensorrt import BuildOptions, build_engine, import_tensorrt


@pytest.fixture
def engine(tmp_path, gpu):
    gpu()
    graph = write_model(tmp_path / "model.onnx")
    (tmp_path / "model.engine").write_bytes(build_engine(import_tensorrt(), graph, BuildOptions()).engine)
    return tmp_path / "model.engine"


def test_layers_of_an_engine(engine):
    found = profile_layers(engine, engine="tensorrt", batch=4, calls=3, graph=engine.with_suffix(".onnx"))
    assert found["engine"] == "tensorrt 10.3.0 Fake Orin"
    assert found["source"] == "TensorRT IProfiler"
    assert [(kernel["name"], kernel["kind"]) for kernel in found["kernels"]] == [
        ("__myl_Cast_myl0_0", "kgen"),
        ("Div_2 + MatMul_3", "gemm"),
    ]
    assert all(kernel["ms"] > 0 and kernel["precision"] == "f16" for kernel in found["kernels"])
    [group] = found["groups"]  # no name tells a block
    assert (group["group"], group["kernels"], group["operations"]) == ("other", 2, 2 * 4 * 3 * 5)
    assert math.isclose(group["ms"], found["sum_ms"])
    assert found["missing"] == []


def test_an_engine_without_its_graph(engine):
    found = profile_layers(engine, engine="tensorrt", batch=1, calls=1)
    assert [group["operations"] for group in found["groups"]] == [None]
    assert found["attention"] is None
    assert found["missing"] == ["operations and bytes: model.engine does not tell the graph that it was built of"]


def test_an_engine_that_does_not_take_so_many(engine):
    with pytest.raises(ModelFileError, match="33 images at a time, expected 1 to 32"):
        profile_layers(engine, engine="tensorrt", batch=33)
