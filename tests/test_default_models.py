"""The models that come with the package, and the scripts that make them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import load_file

from dpal_edge.models.checkpoint import read_checkpoint
from dpal_edge.models.human import load_human

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
