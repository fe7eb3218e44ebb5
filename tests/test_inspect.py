import json
from dataclasses import replace

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from dpal_edge.cli import main
from dpal_edge.errors import DataError, ModelFileError
from dpal_edge.inspection import as_text, describe
from dpal_edge.manifest import FileSpec, Manifest
from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.vit import VisionTransformer, ViTConfig
from tests.runtime.tiny_bundle import write_bundle, write_detector_bundle, write_model

TINY = ViTConfig(size=(32, 16), width=12, depth=2, heads=1, last_heads=1)


@pytest.fixture
def state():
    return VisionTransformer(TINY).state_dict()


@pytest.fixture
def run(tmp_path, state):
    folder = tmp_path / "run"
    metadata = {"student": "vit_tiny", "step": 7, "config": {"batch": 2}, "scaler": {}, "validation": {}}
    tensors = {f"backbone.{key}": value for key, value in state.items()} | {"decoder.w": torch.ones(5)}
    write_checkpoint(folder / "checkpoints" / "step-00000007.safetensors", tensors, metadata)
    return folder


def test_run_folder_and_checkpoint(run, state):
    file = run / "checkpoints" / "step-00000007.safetensors"
    found = describe(file)
    assert found["kind"] == "dpal-edge checkpoint, intact"
    assert found["values"] == {"backbone": sum(v.numel() for v in state.values()), "decoder": 5}
    assert found["step"] == 7
    assert "config" not in found
    assert describe(run) == {**found, "kind": "dpal-edge checkpoint, intact"}


@pytest.mark.parametrize("place", [20, -1])
def test_damaged_checkpoint(run, place):
    file = run / "checkpoints" / "step-00000007.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    for path in (file, run):
        with pytest.raises(ModelFileError, match=r"step-00000007\.safetensors: (damaged|not a dpal-edge checkpoint)"):
            describe(path)


def test_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelFileError, match="no checkpoint in"):
        describe(tmp_path)


def test_bundle(tmp_path):
    found = describe(write_bundle(tmp_path / "bundle"))
    assert found["kind"] == "bundle, all files intact"
    assert found["input"] == "images: uint8 RGB (B, 16, 8, 3)"
    assert found["outputs"] == {"embedding": "embedding (5,)"}
    assert found["parameters"] == 15


def test_bundle_with_labels_and_weights_elsewhere(tmp_path):
    folder = write_detector_bundle(tmp_path / "detector")
    manifest = Manifest.read(folder)
    (folder / "weights.bin").write_bytes(b"weights")
    parity = replace(manifest.artifacts[0].parity, head="detection")
    artifact = replace(manifest.artifacts[0], data=(FileSpec.of(folder / "weights.bin"),), parity=parity)
    replace(manifest, artifacts=(artifact,)).write(folder / "mine.json")
    found = describe(folder / "mine.json")
    assert found["outputs"] == {"detection": "detection (pyramid) (2, 5), labels: person"}
    assert found["artifacts"]["onnx"]["weights in"] == ["weights.bin"]
    assert " of the largest output (detection), on 1 images" in found["artifacts"]["onnx"]["largest error"]
    (folder / "weights.bin").write_bytes(b"weightz")
    with pytest.raises(ModelFileError, match=r"weights\.bin: damaged or replaced"):
        describe(folder / "mine.json")


@pytest.mark.parametrize("name", ["golden.npz", "model.onnx"])
def test_damaged_bundle(tmp_path, name):
    bundle = write_bundle(tmp_path / "bundle")
    with (bundle / name).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelFileError, match=rf"{name}: damaged or replaced"):
        describe(bundle)
    (bundle / name).unlink()
    with pytest.raises(ModelFileError, match=rf"{name}: missing"):
        describe(bundle)
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(ModelFileError, match="not valid JSON"):
        describe(bundle)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_weights(tmp_path, state, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    found = describe(path)
    assert found["kind"] == "published weights"
    assert found["values"] == {"backbone": sum(v.numel() for v in state.values()), "decoder": 0}
    assert found["architecture"]["positions"] == 3
    assert found["architecture"]["depth"] == 2
    assert "heads" not in found["architecture"]  # of a ViT, weights do not tell
    assert found["entries"] == (["model", "epoch"] if suffix == ".pth" else ["a flat state dict"])
    assert len(found["sha256"]) == 64


def test_published_swin(shared):
    found = describe(shared / "golden" / "teachers" / "dpal_swin_student" / "student_checkpoint.pth")
    assert found["entries"] == ["student", "teacher", "optimizer", "epoch", "args"]
    assert found["architecture"] == {
        "family": "swin",
        "patch_size": 32,
        "width": 64,
        "depths": [2, 2, 2, 2],
        "heads": [2, 4, 8, 16],
        "window": 7,
        "mlp_ratio": 4.0,
    }


def test_weights_of_another_kind(tmp_path):
    torch.save({"layers.0": torch.ones(2)}, tmp_path / "x.pth")
    assert describe(tmp_path / "x.pth")["architecture"].startswith("not a ViT: ")
    torch.save({"stages.0": torch.ones(2)}, tmp_path / "swin.pth")
    assert describe(tmp_path / "swin.pth")["architecture"].startswith("not a Swin: ")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ModelFileError, match="holds no tensors; its entries are epoch"):
        describe(tmp_path / "none.pth")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ModelFileError, match="cannot be read as weights"):
        describe(tmp_path / "text.pt")


def test_onnx(tmp_path):
    found = describe(write_model(tmp_path / "model.onnx"))
    assert found["kind"] == "ONNX file"
    assert found["inputs"] == {"images": "uint8 (n, 16, 8, 3)"}
    assert found["outputs"] == {"embedding": "float (n, 5)"}
    assert found["stored values"] == {"int64": 2, "float": 16}
    assert found["operators"]["MatMul"] == 1
    assert found["opsets"] == {"ai.onnx": 18}


@pytest.mark.parametrize(
    "content", [b"", b"text, not a model", b"\xff" * 100, None], ids=["empty", "text", "ones", "cut"]
)
def test_damaged_onnx(tmp_path, content):
    path = write_model(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ModelFileError, match=r"model\.onnx: not a valid ONNX file") as caught:
        describe(path)
    assert "\n" not in str(caught.value)


def test_onnx_whose_weights_lie_elsewhere(tmp_path):
    weight = numpy_helper.from_array(torch.ones(500, 500).numpy(), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [500, 500]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert describe(tmp_path / "model.onnx")["stored values"] == {"float": 250_000}
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelFileError, match="not a valid ONNX file"):
        describe(tmp_path / "model.onnx")


def test_what_is_none_of_these(tmp_path):
    (tmp_path / "photo.jpg").touch()
    for path, what in (
        (tmp_path / "photo.jpg", "is not known"),
        (tmp_path / "nothing", "is missing"),
        (tmp_path, "is neither a bundle nor a run folder"),
    ):
        with pytest.raises(DataError, match=f"{path.name}: {what}; expected a bundle, a run folder, an .onnx file, or"):
            describe(path)


def test_text():
    description = {"kind": "x", "values": {"backbone": 1234567, "none": {}}, "size": (64, 32), "flag": True}
    assert as_text(description) == (
        "kind    x\nvalues\n  backbone  1,234,567\n  none      {}\nsize    64, 32\nflag    True"
    )


def test_text_of_several_descriptions():
    teachers = [{"spec": "a.pth", "roles": ["local", "relation"]}, {"spec": "b.pth", "check": {"std": 0.5}}]
    assert as_text({"step": 7, "teachers": teachers, "others": []}) == (
        "step      7\nteachers 1\n  spec   a.pth\n  roles  local, relation\n"
        "teachers 2\n  spec   b.pth\n  check\n    std  0.5\nothers    "
    )


def test_command(run, tmp_path):
    shown = CliRunner().invoke(main, ["inspect", str(run)])
    assert shown.exit_code == 0
    assert "dpal-edge checkpoint, intact" in shown.stdout
    assert json.loads(CliRunner().invoke(main, ["inspect", str(run), "--json"]).stdout)["step"] == 7
    failed = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("Error: ")
    assert failed.stdout == ""
