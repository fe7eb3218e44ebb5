"""The released student weights, by their sizes: the files hold the backbone alone, in the authors' names."""

import numpy as np
import pytest
import torch

from dpal_edge.export.onnx import ExportedModel, write_onnx
from dpal_edge.export.proof import check_parity, prove_stripped, torch_outputs
from dpal_edge.models.checkpoint import load_backbone
from dpal_edge.models.human import HumanModel, resize_model
from dpal_edge.models.students import STUDENTS, build_student
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tests.models.test_swin import authors_layout

RELEASED = {"vit_tiny": 22_089_949, "vit_small": 86_602_973, "swin_tiny": 110_371_971}  # bytes of the files


def random_backbone(name):
    student = build_student(STUDENTS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            parameter.normal_(std=0.02, generator=generator)
            if "norm" in key and key.endswith("weight"):
                parameter += 1
    return student.eval()


def write_released(name, folder):
    """Write a file of the size and layout of a released one; its weights are random, as those are not at hand."""
    student, path = random_backbone(name), folder / "student.pth"
    torch.save(authors_layout(student) if name == "swin_tiny" else student.state_dict(), path)
    return student, path


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_load(name, tmp_path):
    student, path = write_released(name, tmp_path)
    # The rest of a file is names and, in the Swin's, unused norms and index tables.
    assert path.stat().st_size == pytest.approx(RELEASED[name], rel=2e-3)
    loaded, metadata = load_backbone(path)
    path.unlink()
    assert metadata["student"] == name
    assert metadata["parameters"] == {"backbone": sum(p.numel() for p in student.parameters()), "decoder": 0}
    if name != "swin_tiny":
        config = loaded.config
        assert (loaded.pos_embed.shape[1], config.heads, config.last_heads, config.pos_interp) == (129, 6, 12, "1d")
    images = torch.randn(1, 3, 256, 128)
    assert torch.equal(loaded(images), student(images))


def test_released_vit_tiny_exports(tmp_path):
    backbone, metadata = load_backbone(write_released("vit_tiny", tmp_path)[1])
    size = (128, 96)  # another than that of the positions: they are resized in 1-D
    file = tmp_path / "model.onnx"
    reference = HumanModel(backbone, {}).eval()
    model = ExportedModel(resize_model(reference, size), IMAGENET_MEAN, IMAGENET_STD)
    write_onnx(model, file, size=size, outputs=("embedding",))
    after = prove_stripped(file, model, metadata["parameters"]).parameters_after
    assert after == 5_511_360 - 192 - (128 - 48) * 192  # the class token and its position are one; 48 patches
    crops = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    found = check_parity(file, crops, torch_outputs(reference, crops, IMAGENET_MEAN, IMAGENET_STD), 1e-4)
    assert found.parity.max_rel_error < 1e-5
