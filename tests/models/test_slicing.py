import pytest
import torch

from dpal_edge.errors import ConfigError
from dpal_edge.models.slicing import explained, principal_basis, slice_vit
from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student

SIZE = (64, 32)


def build(seed=0, **options):
    vit = VisionTransformer(
        ViTConfig(**{"size": SIZE, "width": 32, "depth": 4, "heads": 2, "last_heads": 2, **options})
    )
    init_student(vit, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in vit.named_parameters():  # biases, norms and scales as a trained model has them
        if value.ndim == 1:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
        if name == "pos_embed":
            value.data += 0.5 * torch.randn(value.shape, generator=generator)
    return vit.eval()


@pytest.fixture(scope="module")
def images():
    smooth = torch.randn(80, 3, 16, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(smooth, size=SIZE, mode="bicubic")


@torch.no_grad()
def test_nothing_is_lost_at_the_same_width(images):
    large, student = build(), build(seed=3)
    basis = slice_vit(student, large, images, images)
    assert explained(student, large, images, images, basis) > 0.999
    normed = torch.nn.functional.layer_norm(large.run_blocks(large.embed(images)), (32,))
    torch.testing.assert_close(student(images), normed @ basis, atol=0.1, rtol=0)
    assert (student(images) - normed @ basis).square().mean() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("small", "wide", "layer"),
    [
        ({"width": 16}, {}, None),
        ({"width": 16, "heads": 4, "last_heads": 4}, {}, None),  # each head stands for two
        ({"width": 16, "heads": 1, "last_heads": 1}, {}, None),  # the stronger head of two
        ({"width": 16, "depth": 2}, {}, None),  # each block for two
        ({"width": 16, "depth": 3}, {}, 3),
        ({"width": 16, "patch_size": 16}, {"patch_size": 8, "size": (32, 16), "layer_scale": True}, None),
    ],
)
def test_tokens_follow_the_large_model_on_other_images(images, small, wide, layer):
    large, student = build(**wide), build(seed=3, **small)
    seen = torch.nn.functional.interpolate(images, size=large.config.size, mode="area")
    noise = explained(student, large, images[:16], seen[:16], principal_basis(large, seen, 16, layer), layer=layer)
    basis = slice_vit(student, large, images[16:], seen[16:], layer=layer)
    share = explained(student, large, images[:16], seen[:16], basis, layer=layer)
    assert noise < 0.1
    assert share > 0.7


@torch.no_grad()
def test_basis_is_orthonormal_without_a_mean(images):
    basis = principal_basis(build(), images, 16)
    centred = torch.eye(16) - 1 / 16
    torch.testing.assert_close(basis.mT @ basis, centred, atol=1e-5, rtol=0)
    assert basis.sum(1).abs().max() < 1e-5
    assert basis.sum(0).abs().max() < 1e-4


def test_other_grids_are_refused(images):
    with pytest.raises(ConfigError, match=r"the student sees 4x2 patches, the ViT it is sliced from 2x2; give a size"):
        slice_vit(build(), build(), images[:4], images[:4, :, :32])


@pytest.mark.parametrize(
    ("small", "wide", "message"),
    [
        ({"width": 64}, {}, "4 blocks of 64 channels cannot be sliced from 4 blocks of 32"),
        ({"depth": 5}, {}, "5 blocks of 32 channels cannot be sliced from 4 blocks"),
        ({"width": 30, "heads": 3, "last_heads": 3}, {}, "a block of 3 heads cannot be sliced from one of 2"),
        ({}, {"class_token": False}, "has one itself but no layer scale"),
        ({"layer_scale": True}, {}, "has one itself but no layer scale"),
    ],
)
def test_what_cannot_be_sliced_is_said(images, small, wide, message):
    with pytest.raises(ConfigError, match=message):
        slice_vit(build(**small), build(**wide), images[:4], images[:4])
