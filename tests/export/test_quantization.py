"""Ranges, pairs and their cost, on a tiny model with every head and on photographs of people."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dpal_edge.errors import DataError
from dpal_edge.export.calibration import Histogram, Range, calibrate, check_crops, smoothness
from dpal_edge.export.float16 import to_float16
from dpal_edge.export.linears import Graph
from dpal_edge.export.lint import lint
from dpal_edge.export.onnx import ExportedModel, write_onnx
from dpal_edge.export.quantize import quantizable, quantize
from dpal_edge.export.sensitivity import Switched, rank, relative_errors
from tests.export.conftest import CONFIG, DETECTION, HEADS, MEAN, STD, tiny_human


def smooth_crops(count, size=CONFIG.size, seed=0):
    """Crops with edges and shading, as photographs have."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    crops = []
    for _ in range(count):
        shade = 128 + 60 * np.sin(rng.uniform(1, 6) * rows[..., None] + rng.uniform(0, 6, 3)) + 0 * columns[..., None]
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        shade[top : top + size[0] // 2, left : left + size[1] // 2] += rng.uniform(-80, 80, 3)
        crops.append(np.clip(shade, 0, 255))
    return np.stack(crops).astype(np.uint8)


@pytest.fixture(scope="module", params=["people", "frames"])
def graph(request, tmp_path_factory):
    """The float32 graph of a tiny model with all heads for people, or with a detector."""
    human = tiny_human(0, HEADS if request.param == "people" else DETECTION)
    model = ExportedModel(human, tuple(MEAN), tuple(STD))
    path = tmp_path_factory.mktemp("graphs") / "model.onnx"
    write_onnx(model, path, size=model.size, outputs=model.outputs)
    return onnx.load(path)


def test_layers_have_the_names_of_the_modules(graph):
    names = {layer.name for layer in Graph(graph).linears()}
    assert {"backbone.patches.embed", "backbone.blocks.0.attn.qkv", "backbone.blocks.1.mlp.fc2"} <= names
    assert len(names) == len(list(Graph(graph).linears()))


def test_clip_weighs_rounding_against_clipping():
    """One value far out among very many: to reach it would cost all others more than it is worth."""
    few, many = Histogram(), Histogram()
    values = np.random.default_rng(0).normal(size=100_000)
    few.add(np.array([40.0, *values[:20]]))
    many.add(values)
    many.add(np.array([40.0]))
    assert few.choose().clip == pytest.approx(40.0)
    chosen = many.choose()
    assert chosen.largest == pytest.approx(40.0)
    assert 25 < chosen.clip < 31  # where (clip / 127)**2 / 12 * 100_000 + (40 - clip)**2 is least
    assert 0 < chosen.clipped < 1e-3


def test_histogram_grows_without_forgetting():
    histogram = Histogram()
    histogram.add(np.linspace(0, 1, 4096))
    histogram.add(np.array([-7.5]))
    assert histogram.counts.sum() == 4097
    assert histogram.reach == 8
    assert histogram.counts[: 2048 // 8].sum() == 4096
    empty = Histogram()
    empty.add(np.zeros(10))
    assert empty.choose() == Range(0.0, 0.0, 0.0)


def test_int8_and_fp16_pass_the_linter_and_stay_near(graph):
    crops = smooth_crops(24)
    ranges, coverage = calibrate(graph, crops[:16])
    assert set(ranges) == {layer.activation.source for layer in Graph(graph).linears()}
    assert (coverage.images, coverage.distinct) == (16, 16)
    assert coverage.smoothness > 0.8
    assert "16 images: give 128" in coverage.advice
    quantized = to_float16(quantize(graph, ranges))
    onnx.checker.check_model(quantized)
    report = lint(quantized)
    assert report.errors == 0
    assert report.quantized == len(quantizable(graph)) > 8
    reference, found = run(graph, crops[16:]), run(quantized, crops[16:])
    for name, error in relative_errors(reference, found).items():
        assert error < 0.05, name
    half = run(to_float16(graph), crops[16:])
    for name, error in relative_errors(reference, half).items():
        assert error < (1e-2 if name == "detection" else 1e-4)  # exponentials of what FP16 rounds


def test_boxes_stay_float32():
    """FP16 knows no odd pixels above 2048."""
    human = tiny_human(0, DETECTION)
    head = human.heads["detection"]
    head.centres = head.centres + 4001.0
    model = ExportedModel(human, tuple(MEAN), tuple(STD))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_onnx(model, path, size=model.size, outputs=model.outputs)
        graph = onnx.load(path)
    crops = smooth_crops(2)
    expected, found = (run(one, crops)["detection"][..., 1] for one in (graph, to_float16(graph)))
    np.testing.assert_allclose(found, expected, atol=0.5)
    assert not np.array_equal(np.rint(found / 2) * 2, found)


def test_weight_scales_are_those_of_the_outputs(graph):
    ranges, _ = calibrate(graph, smooth_crops(16))
    quantized = Graph(quantize(graph, ranges))
    for layer in quantized.linears():
        if layer.weight.quantize is None:
            assert layer.grouped
            continue
        weight = numpy_helper.to_array(quantized.constants[layer.weight.source])
        scale = numpy_helper.to_array(quantized.constants[layer.weight.quantize.input[1]])
        largest = np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != layer.axis))
        assert scale.shape == (layer.channels,)
        assert (127 * scale >= largest * (1 - 1e-6)).all()  # nothing is clipped, though scales are rounded to FP16
        assert (127 * scale <= np.maximum(largest, 127 * 2**-24) * 1.002 + 127 * 2**-24).all()


def test_layers_that_are_skipped_stay_in_float(graph):
    ranges, _ = calibrate(graph, smooth_crops(16))
    names = [layer.name for layer in quantizable(graph)]
    report = lint(to_float16(quantize(graph, ranges, names[:3])))
    assert report.quantized == len(names) - 3
    assert [finding.rule for finding in report.findings] == ["unquantized"]
    untouched = quantize(graph, ranges, names)
    assert [node.op_type for node in untouched.graph.node] == [node.op_type for node in graph.graph.node]


def test_switches_choose_what_is_quantized(graph):
    crops = smooth_crops(18)
    ranges, _ = calibrate(graph, crops[:16])
    switched = Switched(graph, ranges)
    reference, test = run(graph, crops[16:]), crops[16:]
    assert max(relative_errors(reference, switched.run(test, ())).values()) < 1e-8
    everything = run(quantize(graph, ranges), test)
    assert max(relative_errors(everything, switched.run(test, switched.layers)).values()) < 1e-6
    ranking = rank(switched, test)
    assert sorted(one.layer for one in ranking) == sorted(switched.layers)
    costs = [one.cost for one in ranking]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0
    alone = run(quantize(graph, ranges, [name for name in switched.layers if name != ranking[0].layer]), test)
    for name, error in relative_errors(reference, alone).items():
        assert error == pytest.approx(ranking[0].errors[name], rel=0.05, abs=1e-7)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (smooth_crops(5), "5 crops to calibrate on, expected 16 or more"),
        (np.full((20, 64, 32, 3), 120, np.uint8), "show nothing"),
        (np.random.default_rng(0).integers(0, 256, (20, 64, 32, 3)).astype(np.uint8), "look like noise"),
    ],
)
def test_what_no_camera_gives_is_refused(crops, message):
    with pytest.raises(DataError, match=message):
        check_crops(crops)


def test_smoothness():
    ramp = np.arange(64, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert smoothness(ramp[None]) == pytest.approx(1)
    assert abs(smoothness(noise[None])) < 0.05


def run(model, crops):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": crops}), strict=True))
