"""The models that come with the package, and the scripts that make them."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dpal_edge.models.checkpoint import read_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.teacher import load_teacher
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, ViTConfig, normalize

SCRIPTS = Path(__file__).parents[1] / "scripts" / "default_models"
ASSETS = Path(__file__).parents[1] / "dpal_edge" / "assets"
MODELS = {
    "human_teacher_vit_small": {"pose", "parsing", "attributes", "reid"},
    "dpal_vit_tiny": {"pose", "parsing", "attributes", "reid"},
    "person_detector": {"detection"},
}


def test_the_base_of_the_teacher_fits_timm_key_for_key(tmp_path):
    write_teacher = runpy.run_path(str(SCRIPTS / "base_teacher.py"))["write_teacher"]
    count = write_teacher(tmp_path / "teacher.safetensors")
    state = {name: value.float() for name, value in load_file(tmp_path / "teacher.safetensors").items()}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(state, strict=True)
    assert count == sum(value.numel() for value in state.values()) == 22_056_192


@pytest.mark.parametrize("name", MODELS)
def test_models_open_with_their_heads(name):
    model, metadata = load_human(ASSETS / f"{name}.safetensors")
    assert set(model.configs) == MODELS[name]
    assert metadata["limits"]
    dtypes = {str(value.dtype) for value in read_checkpoint(ASSETS / f"{name}.safetensors").tensors.values()}
    assert dtypes <= {"torch.float16", "torch.int64"}  # the latter: how many batches a batch norm has seen
    assert (ASSETS / f"{name}.md").read_text().startswith(f"# {name}")


def test_what_limits_the_teacher_that_ships_limits_what_it_teaches():
    passport = load_teacher(str(ASSETS / "human_teacher_vit_small.safetensors"), size=(256, 128)).passport
    assert passport.licence.startswith("Apache-2.0")
    assert "for research and evaluation" in passport.limits


def test_boxes_of_photographs_reach_around_joints_and_masks(tmp_path):
    script = runpy.run_path(str(SCRIPTS / "photographs.py"))
    joints = np.zeros((14, 3))
    joints[:12] = [[20 + 5 * i, 10 + 10 * i, 2] for i in range(12)]  # x 20..75, y 10..120
    hidden = joints * [1, 1, 0]
    annotations = [
        {"image_id": i, "keypoints": points.ravel().tolist()} for i, points in enumerate((joints, hidden), 1)
    ]
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    document = {"images": images, "annotations": annotations}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "person_keypoints_train.json").write_text(json.dumps(document))
    [(path, box)] = script["boxes_of_joints"](tmp_path).items()
    assert path == tmp_path / "train" / "a.png"
    np.testing.assert_allclose(box, [20 - 8.8, 10 - 8.8, 75 + 8.8, 120 + 8.8])

    for folder in ("train_images", "train_segmentations"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((60, 40), np.uint8)
    mask[5:50, 12:30] = 4
    Image.fromarray(mask).save(tmp_path / "train_segmentations" / "c.png")
    Image.new("RGB", (40, 60)).save(tmp_path / "train_images" / "c.jpg")
    (tmp_path / "train_id.txt").write_text("c\n")
    [(path, box)] = script["boxes_of_masks"](tmp_path).items()
    assert path.name == "c.jpg"
    assert box.tolist() == [12, 5, 30, 50]


def test_recoloured_people_keep_their_skin_and_are_cut_out_of_their_background():
    recolour = runpy.run_path(str(SCRIPTS / "pedestrians.py"))["recolour"]
    labels = ("background", "hair", "skin", "upper", "pants")
    mask = np.repeat(np.arange(5, dtype=np.uint8), 40)[:, None].repeat(60, axis=1)
    pixels = np.full((200, 60, 3), (200, 90, 30), np.uint8)
    seen = [np.asarray(recolour(pixels, mask, labels, np.random.default_rng(i))) for i in range(12)]
    assert all(image.shape == (160, 60, 4) for image in seen)
    middles = np.stack([[image[row, 30] for row in (20, 60, 100, 140)] for image in seen])  # hair, skin, upper, pants
    assert (middles[:, :2, :3] == (200, 90, 30)).all()
    assert (middles[..., 3] == 255).all()
    for garment in (2, 3):
        assert len(np.unique(middles[:, garment, :3], axis=0)) > 6


def test_the_models_fit_into_the_package():
    assert sum(file.stat().st_size for file in ASSETS.glob("*.safetensors")) < 80e6


def test_a_whitened_embedding_is_centred_and_its_directions_even(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTConfig(size=(64, 32), depth=1, width=32, heads=2, last_heads=2))
    model = HumanModel(backbone, {"reid": HeadConfig(task="reid", kind="strips", channels=8)}).eval()
    crops = [tmp_path / f"{i}.png" for i in range(40)]
    rng = np.random.default_rng(0)
    for crop in crops:
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8)).save(crop)

    def embeddings():
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(crop))) for crop in crops]).permute(0, 3, 1, 2)
        with torch.no_grad():
            return model.heads["reid"](backbone(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))).double()

    before = torch.linalg.eigvalsh(torch.cov(embeddings().T))
    whiten = runpy.run_path(str(SCRIPTS / "make.py"))["whiten"]
    whiten(model, crops, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    after = torch.linalg.eigvalsh(torch.cov(embeddings().T))
    torch.testing.assert_close(after, before.mean() * before / (before + before.mean()), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(embeddings().mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-4)
