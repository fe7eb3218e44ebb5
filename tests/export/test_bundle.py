import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from dpal_edge.cli import main
from dpal_edge.errors import ConfigError, DataError, ModelFileError, ParityError
from dpal_edge.export.bundle import ExportSettings, describe, export
from dpal_edge.export.crops import read_crops
from dpal_edge.export.onnx import ExportedModel, count_parameters, write_onnx
from dpal_edge.export.proof import prove_stripped, torch_outputs
from dpal_edge.manifest import Manifest
from dpal_edge.models.checkpoint import read_newest, write_checkpoint
from dpal_edge.models.human import HumanModel, resize_model
from dpal_edge.models.students import build_student, config_to_dict, init_student_weights
from dpal_edge.runtime.backend import open_backend
from tests.export.conftest import CONFIG, MEAN, STD, SWIN, tiny_student

PARAMETERS = sum(p.numel() for p in tiny_student(1).parameters())


def unexported():
    """The model that the bundle was exported from."""
    return ExportedModel(HumanModel(tiny_student(1), {}), tuple(MEAN), tuple(STD))


@pytest.fixture(scope="session")
def exported(tmp_path_factory, checkpoint):
    """A bundle; not to be changed by a test."""
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    return out, export(checkpoint, out, ExportSettings())


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_verifies(exported, checkpoint):
    out, written = exported
    assert sorted(content(out)) == ["golden.npz", "manifest.json", "model.onnx", "report.html", "report.json"]
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]  # no draft is left beside it
    manifest = Manifest.read(out)
    assert manifest.model == "vit_tiny"
    assert manifest.input == written.input
    assert manifest.input.size == CONFIG.size
    assert list(manifest.input.mean) == MEAN
    [artifact] = manifest.artifacts
    assert manifest.file(out, artifact.file).suffix == ".onnx"
    assert artifact.parity.images == 12
    assert artifact.parity.max_rel_error < 1e-5
    assert artifact.parity.min_cosine > 0.99999
    assert manifest.provenance["checkpoint"]["weights"] == "ema"
    assert manifest.provenance["checkpoint"]["file"] == read_newest(checkpoint)[0].name
    assert manifest.provenance["step"] == 7
    assert [teacher["spec"] for teacher in manifest.provenance["teachers"]] == ["vit.pth", "reid.pth"]


def test_goldens_reproduce(exported):
    out, manifest = exported
    backend = open_backend(out / "model.onnx")
    assert backend.inputs == {"images": (None, 64, 32, 3)}
    with np.load(manifest.file(out, manifest.golden)) as golden:
        images, expected = golden["images"], golden["embedding"]
    assert images.shape == (8, 64, 32, 3)
    assert images.dtype == np.uint8
    for count in (1, 3, 8):
        found = backend.run({"images": images[:count]})["embedding"]
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_outputs_are_those_of_the_chosen_weights(exported, crops):
    images = read_crops((str(crops),), CONFIG.size, 4)
    found = open_backend(exported[0] / "model.onnx").run({"images": images})["embedding"]
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - column(MEAN)) / column(STD)
    np.testing.assert_allclose(found, tiny_student(1)(normalised)[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(found - tiny_student(0)(normalised)[:, 0].numpy()).max() > 0.01


def column(values):
    return torch.tensor(values).view(3, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 32), (96, 64)])
@pytest.mark.parametrize("value", [0, 255, None])
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, class_token=False), SWIN, replace(SWIN, size=(32, 32), window=7)]
)
def test_folding_is_exact(config, size, value):
    model = resize_model(HumanModel(tiny_student(0, config), {}).eval(), size)
    images = torch.full((2, *size, 3), value or 0, dtype=torch.uint8)
    if value is None:
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    folded = ExportedModel(model, tuple(MEAN), tuple(STD)).eval()
    expected = torch_outputs(model, images.numpy(), tuple(MEAN), tuple(STD))["embedding"]
    np.testing.assert_allclose(folded(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_only_the_backbone_is_left(exported):
    out, manifest = exported
    assert manifest.stripped.parameters_before == PARAMETERS + 720 + 8 + 1000
    assert manifest.stripped.parameters_after == PARAMETERS - CONFIG.width  # class token and its position are one
    assert manifest.stripped.removed == {"decoder": 720, "mask": 8, "teacher": 1000}
    names = count_parameters(out / "model.onnx")
    assert not [name for name in names if name.startswith(("decoder", "teacher", "mask", "ema", "optim"))]


@pytest.mark.parametrize("name", ["heads.token.weight", "mask_token", "hidden"])
def test_extra_weights_are_found(exported, tmp_path, name):
    model = onnx.load(exported[0] / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 5), np.float32), name))
    onnx.save(model, tmp_path / "more.onnx")
    left, right = PARAMETERS - CONFIG.width + 20, PARAMETERS - CONFIG.width
    expected = rf"export left {left} weights in the graph, expected {right} of the backbone"
    with pytest.raises(ModelFileError, match=expected) as caught:
        prove_stripped(tmp_path / "more.onnx", unexported(), {"backbone": PARAMETERS, "heads": 20, "mask_token": 20})
    assert (f"training parts: {name}" in str(caught.value)) == (name != "hidden")


def test_missing_weights_are_found(exported, tmp_path):
    model = onnx.load(exported[0] / "model.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    model.graph.initializer.remove(largest)
    onnx.save(model, tmp_path / "less.onnx")
    with pytest.raises(ModelFileError, match=r"weights in the graph, expected \d+ of the backbone"):
        prove_stripped(tmp_path / "less.onnx", unexported(), {"backbone": PARAMETERS})


def test_equal_tensors_are_counted_once(checkpoint, tmp_path):
    fresh = build_student(CONFIG)  # all its norms and biases are alike, and the exporter merges them
    init_student_weights(fresh, torch.Generator().manual_seed(0))
    model = ExportedModel(HumanModel(fresh, {}).eval(), tuple(MEAN), tuple(STD))
    write_onnx(model, tmp_path / "model.onnx", size=CONFIG.size, outputs=("embedding",))
    assert prove_stripped(tmp_path / "model.onnx", model, {"backbone": PARAMETERS}).parameters_after < PARAMETERS


@torch.no_grad()
def test_swin(tmp_path, crops):
    student, file = tiny_student(0, SWIN), tmp_path / "swin.safetensors"
    metadata = {"student": "tiny", "architecture": config_to_dict(SWIN), "mean": MEAN, "std": STD}
    metadata["teachers"] = [{"parameters": 1000}]
    write_checkpoint(file, {f"backbone.{key}": value for key, value in student.state_dict().items()}, metadata)
    manifest = export(file, tmp_path / "bundle", ExportSettings(calibration=(str(crops),)))
    assert manifest.input.size == SWIN.size
    assert manifest.heads[0].shape == (32,)
    assert manifest.artifacts[0].parity.max_rel_error < 1e-5
    images = read_crops((str(crops),), SWIN.size, 3)
    found = open_backend(tmp_path / "bundle" / "model.onnx").run({"images": images})["embedding"]
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - column(MEAN)) / column(STD)
    np.testing.assert_allclose(found, student(normalised)[:, 0], rtol=1e-4, atol=1e-5)

    # Each table of 25 rows becomes the biases of 9x9 pairs; the shifted block's, of the 6x4 map's 2x2 windows.
    tables, biases = 25 * (1 + 1 + 2 + 2 + 2), 81 * (1 + 1 + 2 + 2 * 4 + 2)
    backbone = sum(p.numel() for p in student.parameters())
    assert manifest.stripped.parameters_before == backbone + 1000
    assert manifest.stripped.parameters_after == backbone - tables + biases

    with pytest.raises(ConfigError, match=r"size 80x64: expected positive multiples of the patch size 32"):
        export(file, tmp_path / "other", ExportSettings(size=(80, 64)))


def test_another_size(checkpoint, tmp_path):
    manifest = export(checkpoint, tmp_path / "bundle", ExportSettings(size=(96, 64), weights="backbone"))
    assert manifest.input.size == (96, 64)
    assert manifest.provenance["checkpoint"]["weights"] == "backbone"
    assert open_backend(tmp_path / "bundle" / "model.onnx").inputs == {"images": (None, 96, 64, 3)}
    with pytest.raises(ConfigError, match=r"size 90x64: expected positive multiples of the patch size 16"):
        export(checkpoint, tmp_path / "other", ExportSettings(size=(90, 64)))


def test_parity_failure_leaves_the_bundle_as_it_was(exported, checkpoint, tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    for name, data in content(exported[0]).items():
        (out / name).write_bytes(data)
    before = content(out)
    with pytest.raises(
        ParityError, match=r"model\.onnx: differs from torch by .* tolerance 1e-12 .* nothing was written"
    ):
        export(checkpoint, out, ExportSettings(tolerance=1e-12))
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_crash_between_two_renames_loses_no_bundle(exported, checkpoint, tmp_path):
    """It leaves the earlier bundle under another name; the next export gives it its own again, or removes it."""
    aside, out = tmp_path / ".bundle.replaced", tmp_path / "bundle"
    shutil.copytree(exported[0], aside)
    before = content(aside)
    with pytest.raises(ParityError):
        export(checkpoint, out, ExportSettings(tolerance=1e-12))
    assert content(out) == before
    shutil.copytree(exported[0], aside)
    (out / "left over").touch()
    export(checkpoint, out, ExportSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (out / "left over").exists()


def test_a_failed_rename_leaves_the_bundle_as_it_was(exported, checkpoint, tmp_path, monkeypatch):
    out, rename = tmp_path / "bundle", Path.rename
    shutil.copytree(exported[0], out)
    before = content(out)

    def interrupted(path, target):
        if path.parent.name.startswith(".bundle."):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, out, ExportSettings())
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(ConfigError, match=f"{name}: exists and is no bundle; choose another --out"):
            export(checkpoint, tmp_path / name, ExportSettings())
    assert (tmp_path / "photos" / "mine.jpg").exists()


def test_no_crops(checkpoint, tmp_path, crops):
    with pytest.raises(DataError, match="nowhere: does not exist"):
        export(checkpoint, tmp_path / "bundle", ExportSettings(calibration=(str(tmp_path / "nowhere"),)))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("text")
    Image.new("RGB", (8, 8)).save(tmp_path / "bad" / "b.png")
    with pytest.raises(DataError, match="bad: 1 readable images, expected at least 2 crops of people"):
        export(checkpoint, tmp_path / "bundle", ExportSettings(calibration=(str(tmp_path / "bad"),)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_crops_are_spread_and_replaced_where_unreadable(tmp_path):
    for i in range(10):
        Image.new("RGB", (4, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_text("text")
    reds = read_crops((str(tmp_path),), (16, 16), 5)[:, 0, 0, 0].tolist()
    assert reds == [0, 2, 4, 6, 8]
    (tmp_path / "4.png").write_text("text")
    assert read_crops((str(tmp_path),), (16, 16), 5)[:, 0, 0, 0].tolist() == [0, 2, 6, 8, 1]
    assert len(read_crops((str(tmp_path),), (16, 16), 99)) == 8


def test_published_weights(tmp_path, crops):
    torch.save(tiny_student(0).state_dict(), tmp_path / "released.pth")
    with pytest.raises(DataError, match=r"no real crops to compare .* --calibration DIR"):
        export(tmp_path / "released.pth", tmp_path / "bundle", ExportSettings())
    manifest = export(tmp_path / "released.pth", tmp_path / "bundle", ExportSettings(calibration=(str(crops),)))
    assert manifest.stripped.removed == {}
    assert manifest.input.size == CONFIG.size
    assert manifest.provenance["teachers"] == []
    assert "stripped  nothing" in describe(manifest, tmp_path)


@pytest.mark.parametrize(("suffix", "message"), [(".safetensors", "damaged"), (".pth", "cut short")])
def test_damaged_checkpoint(tmp_path, suffix, message, checkpoint):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(read_newest(checkpoint)[0].read_bytes()[:1000] if suffix == ".safetensors" else b"")
    with pytest.raises(ModelFileError, match=message):
        export(path, tmp_path / "bundle", ExportSettings())
    with pytest.raises(ModelFileError, match="no checkpoint in"):
        export(tmp_path, tmp_path / "bundle", ExportSettings())


def test_command(checkpoint, tmp_path):
    out = tmp_path / "bundle"
    arguments = ["export", str(checkpoint), "--target", "onnx", "--out", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "manifest.json").read_text())
    assert "stripped  decoder 720 and mask 8 and teacher 1000: 0.03 M parameters became 0.03 M" in result.stderr
    assert "verified  onnx: largest error" in result.stderr

    failed = CliRunner().invoke(main, [*arguments, "--tolerance", "1e-12"])
    assert failed.exit_code == 2
    assert failed.stderr.startswith("Error: model.onnx: differs from torch by ")
    assert failed.stderr.count("\n") == 1

    inspected = CliRunner().invoke(main, ["inspect", str(out), "--json"])
    assert json.loads(inspected.stdout)["kind"] == "bundle, all files intact"
    assert CliRunner().invoke(main, ["export", str(tmp_path / "none"), *arguments[2:]]).exit_code == 1


def test_full_disk_is_one_line(checkpoint, tmp_path):
    arguments = ["export", str(checkpoint), "--target", "onnx", "--out", str(tmp_path / "bundle")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than the graph
    try:
        result = CliRunner().invoke(main, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'bundle'}: cannot be written (File too large)")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"bundle: cannot be written \((File exists|Not a directory)\)"):
        export(checkpoint, tmp_path / "file" / "bundle", ExportSettings())
    assert isinstance(checkpoint, Path)
