"""One call, several targets: what each bundle holds, what is refused, and that verify finds what was changed."""

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from dpal_edge.cli import main
from dpal_edge.errors import BackendUnavailable, ConfigError, ModelFileError
from dpal_edge.evaluate.predictor import Choice, open_predictor
from dpal_edge.export import artifacts, gate, openvino, tensorrt_rtx
from dpal_edge.export.bundle import ExportSettings, describe, export
from dpal_edge.export.calibration import calibrate
from dpal_edge.export.float16 import to_float16
from dpal_edge.export.lint import lint
from dpal_edge.export.onnx import ExportedModel, write_onnx
from dpal_edge.export.quantize import quantizable, quantize
from dpal_edge.export.report import judge_in_words
from dpal_edge.export.source import open_source
from dpal_edge.export.targets import TARGETS
from dpal_edge.manifest import FileSpec, Latency, Manifest
from dpal_edge.runtime.device import cpu_features
from dpal_edge.runtime.model import Model
from dpal_edge.verification import verify
from tests.export.conftest import HEADS, tiny_human, write_human
from tests.export.test_quantization import smooth_crops
from tests.tasks import layouts

STUDENT = Path(__file__).parents[2] / "dpal_edge" / "assets" / "dpal_vit_tiny.safetensors"
RTX = tuple(name for name in TARGETS if name.startswith("trt-rtx"))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A tiny model with every head for people, and a folder of crops."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "crops").mkdir()
    for i, crop in enumerate(smooth_crops(40)):
        Image.fromarray(crop).save(folder / "crops" / f"{i:02d}.png")
    checkpoint = write_human(folder / "model.safetensors", {"backbone": tiny_human(0, HEADS)}, best="backbone", step=1)
    return checkpoint, str(folder / "crops")


@pytest.fixture(scope="module")
def bundle(people, tmp_path_factory):
    """All targets that need no compiler; not to be changed by a test."""
    checkpoint, crops = people
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    names = tuple(name for name in TARGETS if name not in RTX)
    return out, export(checkpoint, out, ExportSettings(targets=names, calibration=(crops,), images=8))


def test_every_target_is_written_judged_and_timed(bundle):
    out, manifest = bundle
    held = {artifact.target: artifact for artifact in manifest.artifacts}
    assert set(held) | {refusal.target for refusal in manifest.refused} == set(TARGETS) - set(RTX)
    assert {"onnx", "onnx-fp16", "openvino-fp16", "trt-fp16", "onnx-int8", "trt-int8"} <= set(held)
    assert held["trt-int8"].file == held["onnx-int8"].file
    assert held["openvino-fp16"].data[0].file == "model.fp16.bin"
    for name, artifact in held.items():
        assert artifact.precision == TARGETS[name].precision
        assert [one.batch for one in artifact.latency] == [1, 8]
        heads = {verdict.head for verdict in artifact.verdicts}
        assert heads == (set() if name == "onnx" else {"pose", "parsing", "attributes", "embedding"})
        assert all(verdict.passed for verdict in artifact.verdicts)
        assert artifact.parity.max_rel_error < {"float32": 1e-5, "float16": 1e-2, "int8": 0.5}[artifact.precision]
    assert Manifest.read(out) == manifest
    named = {spec.file for one in held.values() for spec in (one.file, *one.data)}
    assert {path.name for path in out.iterdir()} == named | {
        "manifest.json", "golden.npz", "report.html", "report.json"
    }  # fmt: skip


def test_int8_graph_passes_the_linter(bundle):
    out, manifest = bundle
    report = lint(out / "model.int8.onnx")
    [artifact] = [one for one in manifest.artifacts if one.target == "trt-int8"]
    assert report.errors == 0
    assert report.quantized + len(artifact.kept) == len(layers_of(out / "model.int8.onnx"))


def layers_of(path):
    return quantizable(onnx.load(path))


def test_report_tells_it_all(bundle):
    out, manifest = bundle
    facts = json.loads((out / "report.json").read_text())
    assert [one["target"] for one in facts["artifacts"]] == [one.target for one in manifest.artifacts]
    assert facts["calibration"]["images"] == 32
    assert "32 images: give 128" in facts["calibration"]["advice"]
    assert "NNCF takes its own" in facts["calibration"]["clips"]
    assert len(facts["sensitivity"]) == len(layers_of(out / "model.onnx"))
    assert {layer.name for layer in layers_of(out / "model.onnx")} <= facts["ranges"].keys()
    for artifact, told in zip(manifest.artifacts, facts["artifacts"], strict=True):
        assert max(told["errors"].values()) == artifact.parity.max_rel_error
        assert set(told["errors"]) == {head.name for head in manifest.heads}
        wider = {name for name, precision in told["layers"].items() if precision != "int8"}
        assert wider == (set(artifact.kept) if artifact.precision == "int8" else told["layers"].keys())
        assert [verdict["drop"] for verdict in told["verdicts"]] == pytest.approx(
            [100 * (verdict.reference - verdict.found) for verdict in artifact.verdicts]
        )
        assert (" here" in told["verdict"]) == (artifact.target != "onnx")
    ways = facts["speeds"]["model.int8.xml"]
    assert any(" f32" in way for way in ways)
    assert any(" bf16" in way for way in ways) == cpu_features().fast_bf16
    page = (out / "report.html").read_text()
    for text in (
        "trt-int8", "rank correlation", "What INT8 costs", "backbone.blocks.0.mlp.fc1", "drop, points",
        "Largest error of each head", "Speed here", "Layers in FP16", "NNCF takes its own",
    ):  # fmt: skip
        assert text in page
    text = describe(manifest, out)
    assert "verified  onnx-int8: largest error" in text
    assert "pose: joints that stay" in text


def test_int8_is_compared_with_the_fastest_wider_form_of_any_kind(bundle):
    """Each in the way in which it is fastest itself: bf16 counts, and float32 also where it is not shipped."""
    _, manifest = bundle
    [int8] = [one for one in manifest.artifacts if one.target == "openvino-int8"]

    def told(ms):
        speeds = {
            file: {way: [Latency(batch=8, median_ms=value, runs=5)] for way, value in ways.items()}
            for file, ways in ms.items()
        }
        return judge_in_words(int8, replace(manifest, artifacts=(int8,)), speeds).split("; ")[-1]

    ms = {"model.onnx": {"ort": 9.0, "bf16": 4.0}, "model.int8.xml": {"f32": 5.0, "bf16": 2.0}}
    assert told(ms) == "2.00 times as fast as onnx here, bf16 against bf16"
    ms["model.int8.xml"] = {"f32": 5.0}
    assert told(ms) == "not faster than onnx here (0.80), f32 against bf16"
    assert told({"model.onnx": ms["model.onnx"]}) == "not run here"


def test_artifacts_answer_alike(bundle):
    """What evaluate runs of a bundle by its target."""
    out, manifest = bundle
    images = smooth_crops(3, seed=5)
    expected = open_predictor(str(out), Choice(target="onnx"))(images, "reid")
    for artifact in manifest.artifacts:
        found = open_predictor(str(out), Choice(target=artifact.target))(images, "reid")
        assert np.abs(found - expected).max() < 0.3 * np.abs(expected).max(), artifact.target


def test_verify_finds_everything_in_order_and_what_is_not(bundle, tmp_path):
    out, manifest = bundle
    found = verify(out)
    assert not found.failed
    assert {check.what for check in found.checks} == {artifact.target for artifact in manifest.artifacts}
    assert {(c.what, c.check) for c in found.checks} >= {("trt-int8", "quantization"), ("openvino-fp16", "goldens")}

    files = sorted(path.name for path in out.iterdir() if path.name != "manifest.json")
    for name in files:
        copy = tmp_path / name
        shutil.copytree(out, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        result = CliRunner().invoke(main, ["verify", str(copy)])
        assert result.exit_code == 1
        assert f"{name}: damaged or replaced" in result.output

    swapped = tmp_path / "swapped"
    shutil.copytree(out, swapped)
    data = json.loads((swapped / "manifest.json").read_text())
    first = data["artifacts"][0]
    first["parity"]["tolerance"] = 1e-12
    (swapped / "manifest.json").write_text(json.dumps(data))
    result = CliRunner().invoke(main, ["verify", str(swapped), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.output)["failed"] is True


def test_verify_goes_on_where_an_artifact_fails(bundle, tmp_path):
    """One that computes no numbers, and one that is no model, with hashes of their own."""
    out, manifest = bundle
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    half = onnx.load(out / "model.fp16.onnx")
    for tensor in half.graph.initializer:
        if tensor.name.startswith("backbone") and tensor.data_type == onnx.TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(np.nan * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(half, copy / "model.fp16.onnx")
    (copy / "model.int8.onnx").write_bytes(b"no model")
    specs = {name: FileSpec.of(copy / name) for name in ("model.fp16.onnx", "model.int8.onnx")}
    changed = tuple(replace(one, file=specs.get(one.file.file, one.file)) for one in manifest.artifacts)
    replace(manifest, artifacts=changed).write(copy)
    found = {(check.what, check.check): check for check in verify(copy).checks}
    assert {what for (what, _), check in found.items() if check.passed is False} == {
        "onnx-fp16", "onnx-int8", "trt-fp16", "trt-int8"
    }  # fmt: skip
    assert "not a number" in found["onnx-fp16", "goldens"].found
    assert "not an ONNX model" in found["onnx-int8", "quantization"].found
    assert found["onnx", "goldens"].passed
    assert found["openvino-fp16", "goldens"].passed


def test_exporting_twice_gives_the_same_bytes(people, bundle, tmp_path):
    checkpoint, crops = people
    out, _ = bundle
    names = ("onnx", "onnx-fp16", "onnx-int8")
    export(checkpoint, tmp_path / "again", ExportSettings(targets=names, calibration=(crops,), images=8))
    for name in names:
        file = TARGETS[name].file
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()


def test_sensitive_layers_stay_in_float_until_the_gate_holds(people, tmp_path, monkeypatch):
    """A gate that asks for more than all layers in INT8 give."""
    checkpoint, crops = people
    demand_cosine(monkeypatch, 0.9997)
    settings = ExportSettings(targets=("onnx-int8",), calibration=(crops,), images=8)
    manifest = export(checkpoint, tmp_path / "bundle", settings)
    [artifact] = manifest.artifacts
    assert artifact.kept
    told = json.loads((tmp_path / "bundle" / "report.json").read_text())["sensitivity"]
    # What the embedding alone sees comes first; then, as before it, the most sensitive.
    told.sort(key=lambda one: any(error > 0 for head, error in one["errors"].items() if head != "embedding"))
    ranked = [one["layer"] for one in told]
    assert list(artifact.kept) == ranked[: len(artifact.kept)]
    assert ranked[0].startswith("heads.reid")
    assert lint(tmp_path / "bundle" / "model.int8.onnx").quantized == len(ranked) - len(artifact.kept)


def demand_cosine(monkeypatch, least):
    demanding = {task: tuple((name, least if name == "cosine" else 0.0, compare) for name, _, compare in measures)
                 for task, measures in gate._AGREEMENTS.items()}  # fmt: skip
    monkeypatch.setattr(gate, "_AGREEMENTS", demanding)


def test_int8_without_a_layer_in_int8_is_refused(people, tmp_path, monkeypatch):
    """With float32's own embeddings the gate would hold."""
    checkpoint, crops = people
    demand_cosine(monkeypatch, 0.999999)
    out = tmp_path / "bundle"
    result = CliRunner().invoke(
        main, ["export", str(checkpoint), "--target", "onnx-int8", "--calibration", crops, "--out", str(out)]
    )
    assert result.exit_code == 2
    assert "with 16 layers in float; with twice as many none would be left in INT8" in result.stderr
    check_that_nothing_runs(out, "onnx-int8")
    monkeypatch.undo()
    crops = ("--calibration", crops, "--out", str(out))
    assert CliRunner().invoke(main, ["export", str(checkpoint), "--target", "onnx", *crops]).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    demand_cosine(monkeypatch, 0.999999)
    result = CliRunner().invoke(main, ["export", str(checkpoint), "--target", "onnx-int8", *crops])
    assert result.exit_code == 2
    assert f"{out} stays as it was" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def check_that_nothing_runs(out, target):
    """What a bundle is whose targets were all refused."""
    assert {path.name for path in out.iterdir()} == {"manifest.json", "golden.npz", "report.html", "report.json"}
    facts = json.loads((out / "report.json").read_text())
    assert [one["target"] for one in facts["refused"]] == [target]
    assert facts["refused"][0]["verdicts"][0].keys() >= {"head", "found", "drop"}
    assert target in (out / "report.html").read_text()
    assert "nothing that runs; report.html in it says what was found" in describe(Manifest.read(out), out)
    with pytest.raises(BackendUnavailable, match="it holds nothing"):
        Model.open(out)
    result = CliRunner().invoke(main, ["verify", str(out)])
    assert result.exit_code == 2
    assert f"nothing in it runs: export refused {target} (" in result.output


def test_heads_without_labels_must_agree(people, tmp_path):
    """The data's name of the task of an embedding is reid."""
    checkpoint, crops = people
    market = layouts.write_market(tmp_path / "market")
    settings = ExportSettings(targets=("onnx-fp16",), calibration=(crops,), images=8, gate=(f"reid={market}",))
    [artifact] = export(checkpoint, tmp_path / "bundle", settings).artifacts
    assert [(verdict.head, verdict.measure) for verdict in artifact.verdicts] == [
        ("reid", "mAP"),
        ("pose", "joints that stay"),
        ("parsing", "pixels of the same class"),
        ("attributes", "same decisions"),
    ]


def test_what_cannot_be_made_is_refused_and_the_rest_is_shipped(people, tmp_path, monkeypatch):
    """A compiler that takes no graph, and a quantizer that dies."""
    checkpoint, crops = people

    def fails(*arguments):
        raise ModelFileError("out of luck")

    monkeypatch.setattr(tensorrt_rtx, "version", lambda: "1.0")
    monkeypatch.setattr(tensorrt_rtx, "compile_engine", fails)
    monkeypatch.setattr(openvino, "write_int8", fails)
    settings = ExportSettings(
        targets=("trt-rtx-fp16", "openvino-int8", "trt-fp16"), calibration=(crops,), images=8, calibration_images=16
    )
    manifest = export(checkpoint, tmp_path / "bundle", settings)
    assert [(one.target, one.reason) for one in manifest.refused] == [
        ("trt-rtx-fp16", "out of luck"),
        ("openvino-int8", "out of luck"),
    ]
    assert [artifact.target for artifact in manifest.artifacts] == ["trt-fp16"]
    assert "tensorrt_rtx" not in manifest.provenance


def test_what_fails_is_refused_and_the_rest_is_shipped(people, tmp_path, monkeypatch):
    checkpoint, crops = people
    real = artifacts.to_float16

    def broken(model):
        converted = real(model)
        for tensor in converted.graph.initializer:
            if "patches" in tensor.name and tensor.dims:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        return converted

    monkeypatch.setattr(artifacts, "to_float16", broken)
    out = tmp_path / "bundle"
    result = CliRunner().invoke(
        main, ["export", str(checkpoint), "--target", "onnx", "--target", "onnx-fp16", "--calibration", crops,
               "--out", str(out)]
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "REFUSED   onnx-fp16: " in result.stderr
    manifest = Manifest.read(out)
    assert [artifact.target for artifact in manifest.artifacts] == ["onnx"]
    [refusal] = manifest.refused
    assert any(not verdict.passed for verdict in refusal.verdicts)
    assert not (out / "model.fp16.onnx").exists()
    export(checkpoint, tmp_path / "none", ExportSettings(targets=("onnx-fp16",), calibration=(crops,)))
    check_that_nothing_runs(tmp_path / "none", "onnx-fp16")


def test_quantizer_prints_nothing_and_takes_nobody_along(bundle, tmp_path, capfd):
    out, _ = bundle
    kept = ("heads.attributes.key_value", "heads.parsing.stages.0.0")  # a norm follows the second
    openvino.write_int8(out / "model.onnx", tmp_path / "model.xml", smooth_crops(16), kept)
    assert capfd.readouterr() == ("", "")
    xml = (tmp_path / "model.xml").read_text()
    assert xml.count('type="FakeQuantize"') > 10
    names = {layer.name for layer in layers_of(out / "model.onnx")}
    assert openvino.int8_layers(tmp_path / "model.xml", out / "model.onnx") == names - {*kept}
    with pytest.raises(ModelFileError, match="ended before it had quantized the model"):
        openvino.run_alone(os.abort)
    with pytest.raises(ModelFileError, match=r"NNCF fails .*invalid literal.*; export again, or without openvino-int8"):
        openvino.run_alone(int, "one")


def test_rtx_compiler_fuses_attention_and_computes_in_int8(people, tmp_path):
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the compiler is not installed")
    checkpoint, crops = people
    settings = ExportSettings(targets=("trt-rtx-int8",), calibration=(crops,), images=8)
    manifest = export(checkpoint, tmp_path / "bundle", settings)
    [artifact] = manifest.artifacts
    assert artifact.file.file == "model.int8.rtx"
    assert artifact.latency == ()
    layers = json.loads((tmp_path / "bundle" / "report.json").read_text())["compiled"]["trt-rtx-int8"]
    assert layers["int8_products"] > 0
    compiler = Manifest.read(tmp_path / "bundle").provenance["tensorrt_rtx"]
    assert compiler["version"] == tensorrt_rtx.version()
    assert compiler["options"]["batches"] == [1, 8, 32]
    checks = {check.check: check for check in verify(tmp_path / "bundle").checks}
    assert checks["goldens"].passed is None
    assert checks["files"].passed


def test_rtx_compiler_fuses_all_blocks_of_the_model_that_ships(tmp_path):
    """Its own list of layers: every linear layer a product of INT8, the attention of every block one kernel."""
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the compiler is not installed")
    source = open_source(STUDENT, "best")
    model = ExportedModel(source.model, source.mean, source.std)
    write_onnx(model, tmp_path / "model.onnx", size=model.size, outputs=model.outputs)
    graph = onnx.load(tmp_path / "model.onnx")
    ranges, _ = calibrate(graph, smooth_crops(16, model.size))
    onnx.save(to_float16(quantize(graph, ranges)), tmp_path / "model.int8.onnx")
    layers = tensorrt_rtx.compile_engine(tmp_path / "model.int8.onnx", tmp_path / "model.rtx")
    assert layers.int8_products == len(quantizable(graph)) == 66
    assert layers.fused_attention == source.model.backbone.config.depth + 1  # and that of the attributes' queries
    assert (tmp_path / "model.rtx").stat().st_size > 5e6


def test_a_missing_compiler_is_said_first(people, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)  # as import finds what is not installed
    with pytest.raises(BackendUnavailable, match=r"pip install 'dpal-edge\[tensorrt-rtx\]'"):
        export(people[0], tmp_path / "x", ExportSettings(targets=("trt-rtx-fp16",), calibration=(people[1],)))


@pytest.mark.parametrize("fields", [{"targets": ("onnx", "caffe")}, {"targets": ()}, {"max_drop": -1.0}])
def test_wrong_settings(fields):
    with pytest.raises(ConfigError, match="expected"):
        ExportSettings(**fields)
