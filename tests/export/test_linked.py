"""Bundles whose weights stay in the checkpoint."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dpal_edge
from dpal_edge.errors import ConfigError, ModelFileError, ParityError
from dpal_edge.export import tensorrt_rtx
from dpal_edge.export.bundle import ExportSettings
from dpal_edge.export.crops import read_crops
from dpal_edge.export.linked import link
from dpal_edge.export.lint import lint
from dpal_edge.export.proof import torch_outputs
from dpal_edge.export.source import open_source
from dpal_edge.manifest import Manifest
from dpal_edge.models.human import load_human
from dpal_edge.runtime import ModelDetector
from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.model import Model
from dpal_edge.verification import verify
from tests.export.conftest import CONFIG, DETECTION, HEADS, MEAN, STD, SWIN, tiny_human, write_human
from tests.export.test_quantization import smooth_crops

ASSETS = Path(dpal_edge.__file__).parent / "assets"
FORMS = ("onnx", "onnx-int8", "trt-fp16", "trt-int8")
FRAMES = replace(CONFIG, size=(64, 96), window=(2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, crops):
    """A folder with a model of several heads in float16, its graph and its manifest, of whose files none can change."""
    path = tmp_path_factory.mktemp("linked") / "person.safetensors"
    write_human(path, {"backbone": tiny_human(0, HEADS)}, dtype=torch.float16)
    link(path, ExportSettings(calibration=(str(crops),)))
    for file in path.parent.iterdir():
        file.chmod(0o444)
    path.parent.chmod(0o555)  # as an installed package may be
    return path.parent


@pytest.fixture
def copied(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    copy.chmod(0o755)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


def expected_outputs(folder, images):
    model, _ = load_human(folder / "person.safetensors")
    return torch_outputs(model, images, tuple(MEAN), tuple(STD))


def test_three_files_are_written_beside_the_checkpoint(folder):
    names = ["person.json", "person.npz", "person.onnx", "person.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    manifest = Manifest.read(folder / "person.json")
    [artifact] = manifest.artifacts
    assert artifact.file.file == "person.onnx"
    assert [spec.file for spec in artifact.data] == ["person.safetensors"]
    assert artifact.parity.max_rel_error < 1e-5
    assert [head.name for head in manifest.heads] == ["pose", "parsing", "attributes", "embedding"]
    with np.load(folder / "person.npz") as golden:
        assert golden["images"].shape == (2, *CONFIG.size, 3)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_read_the_weights_from_the_checkpoint(folder, engine, crops):
    pytest.importorskip(engine)
    model = Model.open(folder / "person.json", engine=engine)
    images = read_crops((str(crops),), CONFIG.size, 5)
    found = model.run(images)
    for name, expected in expected_outputs(folder, images).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_graph_holds_no_weights(folder):
    graph = onnx.load(folder / "person.onnx", load_external_data=False).graph
    stored = load_file(folder / "person.safetensors")
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    held = sum(
        np.prod(tensor.dims, dtype=int)
        for tensor in graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.data_type == onnx.TensorProto.FLOAT
    )
    norms = sum(value.numel() for name, value in stored.items() if "running" in name)
    assert (
        held <= norms + 30
    )  # a factor and a summand of each norm, the mean and standard deviation, factors of resizes
    linked = sum(int(entry.value) for tensor in outside for entry in tensor.external_data if entry.key == "length")
    floats = sum(value.numel() for value in stored.values() if value.is_floating_point())
    assert linked == 2 * (floats - 2 * norms)
    assert all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in outside)
    assert (folder / "person.onnx").stat().st_size < 60_000


def test_float32_weights_and_running_means(tmp_path, crops):
    path = tmp_path / "run" / "checkpoints" / "step-00000003.safetensors"
    write_human(path, {"backbone": tiny_human(0, HEADS), "ema": tiny_human(1, HEADS)}, best="ema")
    manifest = link(tmp_path / "run", ExportSettings(calibration=(str(crops),)))
    assert manifest.provenance["checkpoint"]["weights"] == "ema"
    images = read_crops((str(crops),), CONFIG.size, 2)
    found = Model.open(path.with_suffix(".json")).run(images)
    expected = torch_outputs(tiny_human(1, HEADS), images, tuple(MEAN), tuple(STD))
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-3, atol=1e-3)


def test_other_backbones(tmp_path, crops):
    teacher = replace(CONFIG, class_token=False, patch_size=14, size=(56, 28), layer_scale=True)
    path = write_human(tmp_path / "x.safetensors", {"backbone": tiny_human(0, {"reid": HEADS["reid"]}, teacher)})
    assert link(path, ExportSettings(calibration=(str(crops),))).artifacts[0].parity.max_rel_error < 1e-5
    write_human(path, {"backbone": tiny_human(0, {"reid": HEADS["reid"]}, SWIN)})
    with pytest.raises(ConfigError, match=r"x\.safetensors: a Swin's position biases are not stored as a graph needs"):
        link(path, ExportSettings(calibration=(str(crops),)))


def test_a_detector(tmp_path, crops):
    path = tmp_path / "detector.safetensors"
    write_human(path, {"backbone": tiny_human(0, DETECTION, FRAMES)}, dtype=torch.float16)
    assert link(path, ExportSettings(calibration=(str(crops),))).artifacts[0].parity.max_rel_error < 1e-5
    found = ModelDetector.open(tmp_path / "detector.json", threshold=0.0)(np.zeros((48, 64, 3), np.uint8))
    assert len(found.boxes) > 0
    assert found.boxes.min() >= 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A detector for another size than its checkpoint's, in all forms that read from a checkpoint."""
    path = tmp_path_factory.mktemp("wide") / "detector.safetensors"
    write_human(path, {"backbone": tiny_human(0, {"detection": DETECTION["detection"]}, replace(FRAMES, window=None))},
                dtype=torch.float16)  # fmt: skip
    for i, image in enumerate(smooth_crops(80, (32, 96))):
        Image.fromarray(image).save(path.parent / f"{i:02d}.png")
    settings = ExportSettings(targets=FORMS, calibration=(str(path.parent),), size=(32, 96), images=8)
    link(path, settings, "detector_wide")
    return path.parent


def test_int8_and_fp16_read_the_same_weights(wide):
    manifest = Manifest.read(wide / "detector_wide.json")
    assert manifest.input.size == (32, 96)
    assert [artifact.target for artifact in manifest.artifacts] == list(FORMS)
    files = [artifact.file.file for artifact in manifest.artifacts]
    assert files == [f"detector_wide{form}.onnx" for form in ("", ".int8", ".fp16", ".int8")]
    expected = Model.open(wide / "detector_wide.json", engine="onnxruntime").run(frames := smooth_crops(2, (32, 96)))
    for file in dict.fromkeys(files):
        graph = onnx.load(wide / file, load_external_data=False).graph
        held = {t.name: np.prod(t.dims) for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
        large = {name for name, count in held.items() if count > 100}
        assert large <= {"backbone.pos_embed", "heads.detection.centres"}
        assert any("Quantize" in node.op_type for node in graph.node) == ("int8" in file)
        for engine in ("onnxruntime", "openvino"):
            found = open_backend(wide / file, engine=engine).run({"images": frames})["detection"]
            atol = (0.05 if "int8" in file else 0.01) * np.abs(expected["detection"]).max()
            np.testing.assert_allclose(found, expected["detection"], atol=atol)
    assert not verify(wide / "detector_wide.json").failed  # the linter sees through to the weights


@pytest.mark.parametrize("form", ["int8", "fp16"])
def test_nvidias_compiler_takes_them(wide, tmp_path, form):
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the compiler is not installed")
    layers = tensorrt_rtx.compile_engine(wide / f"detector_wide.{form}.onnx", tmp_path / "engine.rtx")
    assert layers.int8_products == lint(wide / f"detector_wide.{form}.onnx").quantized
    assert (tmp_path / "engine.rtx").stat().st_size > 0


def test_nvidias_compiler_makes_int8_of_the_model_of_the_package(tmp_path):
    """From its own list of layers: all linear ones but those that are kept, and the attention of every block."""
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("the compiler is not installed")
    manifest = Manifest.read(ASSETS / "dpal_vit_tiny.json")
    [artifact] = [one for one in manifest.artifacts if one.target == "trt-int8"]
    layers = tensorrt_rtx.compile_engine(ASSETS / artifact.file.file, tmp_path / "engine.rtx")
    assert layers.int8_products == 66 - len(artifact.kept)
    assert layers.fused_attention == 12 + 1  # blocks, and the attributes' queries


def test_a_size_keeps_its_own_positions(wide):
    frames = smooth_crops(2, (32, 96))
    model = open_source(wide / "detector.safetensors", "best", (32, 96)).model
    expected = torch_outputs(model, frames, tuple(MEAN), tuple(STD))["detection"]
    found = Model.open(wide / "detector_wide.json", engine="onnxruntime").run(frames)["detection"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["person.onnx", "person.safetensors"])
def test_a_changed_byte_is_refused(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{name}: damaged or replaced"):
        Model.open(copied / "person.json")


def test_a_missing_checkpoint_is_refused(copied):
    (copied / "person.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"person\.safetensors: missing, though the manifest names it"):
        Model.open(copied / "person.json")
    with pytest.raises(ModelFileError, match=r"person\.onnx: onnxruntime .* cannot load it"):
        open_backend(copied / "person.onnx")


def test_what_cannot_be_linked(tmp_path, crops):
    settings = ExportSettings(calibration=(str(crops),))
    path = write_human(tmp_path / "x.safetensors", {"backbone": tiny_human(0, HEADS)}, dtype=torch.bfloat16)
    with pytest.raises(ModelFileError, match=r"is stored as BF16, expected F16 or F32; save it as one"):
        link(path, settings)
    write_human(path, {"backbone": tiny_human(0, HEADS)})
    with pytest.raises(ConfigError, match=r"target openvino-int8: only ONNX graphs read their weights from a checkp"):
        link(path, replace(settings, targets=("onnx", "openvino-int8")))
    with pytest.raises(ConfigError, match=r"x\.safetensors: stores float32, but trt-fp16 read float16"):
        link(path, replace(settings, targets=("onnx", "trt-fp16")))
    with pytest.raises(ParityError, match=r"model\.onnx: differs from torch"):
        link(path, replace(settings, tolerance=0.0))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_manifest_is_plain_json(folder):
    document = json.loads((folder / "person.json").read_text(encoding="utf-8"))
    assert not [text for text in json.dumps(document).split('"') if Path(text).is_absolute()]
