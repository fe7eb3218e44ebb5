"""Models with heads: every output is exported, compared and described."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from dpal_edge.errors import ConfigError, DataError, ModelFileError, ParityError
from dpal_edge.export.bundle import ExportSettings, describe, export
from dpal_edge.export.crops import read_inputs
from dpal_edge.export.folding import FoldedPatches, fold_norms
from dpal_edge.export.onnx import ExportedModel, write_onnx
from dpal_edge.export.proof import check_parity, prove_stripped, torch_outputs
from dpal_edge.export.source import output_names
from dpal_edge.manifest import Manifest
from dpal_edge.models.human import resize_model
from dpal_edge.runtime.backend import open_backend
from tests.export.conftest import CONFIG, DETECTION, HEADS, MEAN, STD, SWIN, tiny_human, write_human

FRAMES = replace(CONFIG, size=(64, 96), window=(2, 3))
TEACHER = replace(CONFIG, patch_size=14, size=(56, 28), layer_scale=True, last_heads=2)


def column(values):
    return torch.tensor(values).view(3, 1, 1)


@pytest.fixture(scope="session")
def human(tmp_path_factory, crops):
    """A checkpoint whose running means are the better weights, with an identity classifier that is not exported."""
    path = tmp_path_factory.mktemp("heads") / "human.safetensors"
    parts = {"backbone": tiny_human(0, HEADS), "ema": tiny_human(1, HEADS)}
    return write_human(path, parts, best="ema", config={"data": [str(crops)]}, step=9, origin={"licence": "MIT"})


@pytest.fixture(scope="session")
def exported(tmp_path_factory, human):
    out = tmp_path_factory.mktemp("heads") / "bundle"
    return out, export(human, out, ExportSettings())


@torch.no_grad()
def test_every_head_is_an_output_of_the_chosen_weights(exported, crops):
    images = read_inputs((str(crops),), {}, CONFIG.size, 5, frames=False)
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - column(MEAN)) / column(STD)
    expected = tiny_human(1, HEADS)(normalised)
    found = open_backend(exported[0] / "model.onnx").run({"images": images})
    assert list(found) == ["pose", "parsing", "attributes", "embedding"]
    for name, output in found.items():
        head = expected["reid" if name == "embedding" else name].numpy()
        np.testing.assert_allclose(output, head, rtol=1e-4, atol=1e-4 * np.abs(head).max())
        assert output.dtype == np.float32


def test_the_manifest_describes_the_heads(exported):
    out, manifest = exported
    assert Manifest.read(out) == manifest
    found = {head.name: (head.task, head.kind, head.shape, head.labels) for head in manifest.heads}
    assert found == {
        "pose": ("pose", "simcc", (3, 192), HEADS["pose"].labels),
        "parsing": ("parsing", "upsample", (2, 16, 8), HEADS["parsing"].labels),
        "attributes": ("attributes", "query", (4,), HEADS["attributes"].labels),
        "embedding": ("embedding", "bnneck", (12,), ()),
    }
    assert manifest.artifacts[0].parity.head in found
    assert manifest.provenance["checkpoint"]["weights"] == "ema"
    assert manifest.provenance["origin"] == {"licence": "MIT"}
    assert "outputs pose, parsing, attributes, embedding" in describe(manifest, out)
    with np.load(manifest.file(out, manifest.golden)) as golden:
        assert golden.keys() == {"images", *found}
        expected = open_backend(out / "model.onnx").run({"images": golden["images"]})
        for name in found:
            np.testing.assert_allclose(golden[name], expected[name], rtol=1e-3, atol=1e-4)


def test_weights_of_backbone_and_heads_are_counted(exported):
    stripped = exported[1].stripped
    model = ExportedModel(tiny_human(1, HEADS), tuple(MEAN), tuple(STD))
    assert stripped.parameters_after == sum(p.numel() for p in model.parameters())
    # Norms become a factor and a summand: their running means, variances and counts are gone.
    running = sum(b.numel() for b in tiny_human(1, HEADS).heads.buffers())
    assert stripped.parameters_before == stripped.parameters_after + CONFIG.width + running
    assert stripped.removed == {}


def test_training_parts_go(tmp_path, human, crops):
    from dpal_edge.models.checkpoint import read_checkpoint, write_checkpoint

    checkpoint = read_checkpoint(human)
    more = {"objectives.reid.classifier": torch.ones(7, 12), "optimizer.x": torch.ones(3)}
    write_checkpoint(tmp_path / "x.safetensors", {**checkpoint.tensors, **more}, checkpoint.metadata)
    manifest = export(tmp_path / "x.safetensors", tmp_path / "bundle", ExportSettings(images=2))
    assert manifest.stripped.removed == {"objectives": 84}
    names = [tensor.name for tensor in onnx.load(tmp_path / "bundle" / "model.onnx").graph.initializer]
    assert not [name for name in names if "classifier" in name or "running" in name]


def test_exporting_twice_gives_the_same_bytes_and_no_paths(exported, human, tmp_path):
    export(human, tmp_path / "again", ExportSettings())
    content = (exported[0] / "model.onnx").read_bytes()
    assert (tmp_path / "again" / "model.onnx").read_bytes() == content
    assert b"site-packages" not in content
    assert b"forward" not in content  # of a stack trace


@torch.no_grad()
@pytest.mark.parametrize("kinds", [{"attributes": "linear", "parsing": "linear"}, {"pose": "heatmap"}])
@pytest.mark.parametrize(
    "config", [CONFIG, TEACHER, SWIN, replace(CONFIG, class_token=False)], ids=lambda c: str(c.size)
)
def test_other_kinds_and_backbones(tmp_path, config, kinds):
    heads = {task: replace(HEADS[task], kind=kind) for task, kind in kinds.items()}
    model, file = tiny_human(0, heads, config), tmp_path / "model.onnx"
    exported = ExportedModel(model, tuple(MEAN), tuple(STD))
    write_onnx(exported, file, size=exported.size, outputs=exported.outputs)
    images = torch.randint(0, 256, (3, *config.size, 3), dtype=torch.uint8).numpy()
    reference = torch_outputs(model, images, tuple(MEAN), tuple(STD))
    assert list(reference) == [*kinds, "embedding"]  # the class token, as there is no head for it
    np.testing.assert_allclose(
        reference["embedding"][0],
        model.backbone((torch.from_numpy(images[:1]).permute(0, 3, 1, 2) / 255 - column(MEAN)) / column(STD))[0, 0],
        rtol=1e-3,
        atol=1e-5,
    )
    assert check_parity(file, images, reference, 1e-4).parity.max_rel_error < 1e-5
    prove_stripped(file, exported, {"backbone": 1, "heads": 1})


def test_output_names():
    assert output_names(["pose", "reid"]) == ("pose", "embedding")
    assert output_names(["pose"]) == ("pose", "embedding")
    assert output_names([]) == ("embedding",)
    assert output_names(["detection"]) == ("detection",)


def test_detector_takes_whole_frames(tmp_path, frames):
    checkpoint = write_human(tmp_path / "detector.safetensors", {"backbone": tiny_human(0, DETECTION, FRAMES)})
    manifest = export(checkpoint, tmp_path / "bundle", ExportSettings(calibration=(str(frames),)))
    [head] = manifest.heads
    assert (head.name, head.task, head.kind, head.shape) == ("detection", "detection", "pyramid", (96 + 24 + 6, 5))
    assert manifest.artifacts[0].parity.max_rel_error < 1e-5
    assert "real frames" in describe(manifest, tmp_path)
    assert f"--detector {tmp_path}" in describe(manifest, tmp_path)
    with np.load(tmp_path / "bundle" / "golden.npz") as golden:
        images = golden["images"]
    # 40 high, 80 wide: times 1.2, so that 48 rows are the frame and 16 grey.
    assert (images[:, 48:] == 114).all()
    assert not (images[:, :48] == 114).all(axis=(1, 2, 3)).any()


@pytest.fixture
def frames(tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{i}.png")
    return tmp_path / "frames"


@torch.no_grad()
def test_another_size_resizes_what_has_no_size_of_its_own():
    heads = {"parsing": HEADS["parsing"], "reid": HEADS["reid"]}
    model = tiny_human(0, heads)
    images = torch.rand(2, 3, 96, 64)
    resized = resize_model(model, (96, 64))
    assert resized(images)["parsing"].shape == (2, 2, 24, 16)
    model.heads["parsing"].grid = (6, 4)  # with which the original takes the other size as well
    for name, output in model(images).items():
        torch.testing.assert_close(resized(images)[name], output)
    assert resize_model(model, CONFIG.size) is model


def test_a_simcc_head_has_one_size(human, tmp_path):
    text = r"size 96x64: the simcc head for pose works at 64x32 only; export at that size, or fine-tune at the other"
    with pytest.raises(ConfigError, match=text):
        export(human, tmp_path / "bundle", ExportSettings(size=(96, 64)))
    assert not (tmp_path / "bundle").exists()


def test_the_head_that_differs_is_named(exported, human, tmp_path, crops):
    images = read_inputs((str(crops),), {}, CONFIG.size, 3, frames=False)
    reference = torch_outputs(tiny_human(1, HEADS), images, tuple(MEAN), tuple(STD))
    file = exported[0] / "model.onnx"
    for name in reference:
        wrong = {**reference, name: reference[name] + 0.01 * np.abs(reference[name]).max()}
        with pytest.raises(
            ParityError, match=rf"model\.onnx: differs from torch by .* largest output of '{name}' on 3"
        ):
            check_parity(file, images, wrong, 1e-4)
    nothing = {**reference, "pose": np.full_like(reference["pose"], np.nan)}
    with pytest.raises(ParityError, match="differs from torch by nan of the largest output of 'pose'"):
        check_parity(file, images, nothing, 1e-4)


@torch.no_grad()
def test_norms_fold_exactly():
    model = tiny_human(0, {**HEADS, "attributes": replace(HEADS["attributes"], kind="linear")})
    tokens = torch.randn(4, 1 + 8, CONFIG.width)
    folded = fold_norms(model.heads)
    for task, head in model.heads.items():
        torch.testing.assert_close(folded[task](tokens), head(tokens), rtol=1e-5, atol=1e-5)
    assert not [m for m in folded.modules() if "BatchNorm" in type(m).__name__]
    assert [m for m in model.heads.modules() if "BatchNorm" in type(m).__name__]  # the model's own stay


def test_padded_patches_are_refused():
    with pytest.raises(ModelFileError, match="patches reach beyond the image"):
        FoldedPatches(torch.nn.Conv2d(3, 8, 16, 16, padding=2), (0.5,) * 3, (0.5,) * 3)


def test_images_of_the_tasks_it_was_trained_on(tmp_path):
    """Reads the boxes of COCO keypoints and a folder of images for embeddings; a folder that is gone is named."""
    import json

    root = tmp_path / "coco"
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.new("RGB", (40, 40), (200, 0, 0)).save(root / "train" / "a.png")
    joints = {"keypoints": [5, 5, 2], "num_keypoints": 1, "category_id": 1, "image_id": 1, "iscrowd": 0, "area": 100}
    people = [{**joints, "id": i, "bbox": [i, 0, 20, 30]} for i in (1, 2)]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}],
        "categories": [{"id": 1, "name": "person", "keypoints": ["nose"], "skeleton": []}],
        "annotations": people,
    }
    (root / "annotations" / "person_keypoints_train.json").write_text(json.dumps(document))
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (8, 8), (0, 0, 200)).save(tmp_path / "plain" / "b.png")
    tasks = [f"pose={root}", f"reid={tmp_path / 'plain'}"]
    metadata = {"config": {"task": tasks, "reid_teacher": "x.xml"}}
    images = read_inputs((), metadata, (16, 8), 9, frames=False)
    assert [tuple(image[0, 0]) for image in images] == [(200, 0, 0), (200, 0, 0), (0, 0, 200)]
    metadata["config"]["task"] = [f"pose={tmp_path / 'gone'}"]
    with pytest.raises(DataError, match=r"gone.*; or give a folder of them with --calibration DIR"):
        read_inputs((), metadata, (16, 8), 9, frames=False)
    with pytest.raises(DataError, match="no real crops to compare the exported model on; give a folder"):
        read_inputs((), {}, (16, 8), 9, frames=False)
