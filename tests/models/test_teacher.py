import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.teacher import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Teacher,
    check_features,
    load_teacher,
    passport_fields,
)
from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student

TIMM = "test_vit"  # timm's smallest: width 64, 6 blocks, stored for 160 x 160, mean and std 0.5
SIZE = (64, 32)


def save_timm(path, name=TIMM, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options).eval()
    safetensors.torch.save_file(model.state_dict(), path)
    return model


def save_vit(path, **options):
    fields = {"size": SIZE, "width": 64, "depth": 3, "heads": 1, "last_heads": 1, **options}
    vit = VisionTransformer(ViTConfig(**fields))
    init_student(vit, torch.Generator().manual_seed(0))
    safetensors.torch.save_file(vit.state_dict(), path)
    return vit.eval()


def pixels(count=2, size=SIZE):
    """Images in 0..1, and the same as a training loop passes them."""
    images = torch.rand(count, 3, *size)
    return images, (images - tensor(IMAGENET_MEAN)) / tensor(IMAGENET_STD)


def tensor(values):
    return torch.tensor(values).view(3, 1, 1)


@torch.no_grad()
def test_timm_weights_from_a_file_with_another_normalisation(tmp_path):
    model = save_timm(tmp_path / "t.safetensors")
    teacher = load_teacher(f"timm:{TIMM}@{tmp_path / 't.safetensors'}")
    images, normalised = pixels()
    torch.testing.assert_close(teacher(normalised), model.forward_features((images - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
    passport = teacher.passport
    assert (passport.mean, passport.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (passport.width, passport.patch_size, passport.layer, passport.keys_matched) == (64, 16, 6, 1.0)
    assert passport.sha256 == sha256_of(tmp_path / "t.safetensors")
    assert passport.parameters == sum(p.numel() for p in model.parameters())
    assert passport_fields(passport)["mean"] == [0.5] * 3


@torch.no_grad()
def test_file_teacher_is_not_renormalised_and_resizes_positions_as_published(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors", pos_interp="2d-dino")
    teacher = load_teacher(str(tmp_path / "t.safetensors"))
    for size in (SIZE, (96, 64)):
        _, normalised = pixels(size=size)
        assert torch.equal(teacher(normalised), vit(normalised))
    assert teacher.passport.mean == IMAGENET_MEAN
    assert teacher.passport.licence == "unknown"


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_layer_of_a_file_teacher(tmp_path, layer):
    vit = save_vit(tmp_path / "t.safetensors", pos_interp="2d-dino")
    teacher = load_teacher(str(tmp_path / "t.safetensors"), layer=layer)
    _, normalised = pixels()
    assert torch.equal(teacher(normalised), vit(normalised, layer))
    assert teacher.passport.layer == (layer or 3)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 5, 6])
def test_layer_of_a_timm_teacher(tmp_path, layer):
    model = save_timm(tmp_path / "t.safetensors")
    teacher = load_teacher(f"timm:{TIMM}@{tmp_path / 't.safetensors'}", layer=layer)
    images, normalised = pixels()
    model.blocks = model.blocks[:layer]
    torch.testing.assert_close(teacher(normalised), model.forward_features((images - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patch_14_falls_on_the_grid_of_the_student(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors", size=(56, 28), patch_size=14, pos_interp="2d-dino")
    teacher = load_teacher(str(tmp_path / "t.safetensors"))
    _, normalised = pixels()
    tokens = teacher(normalised)
    assert tokens.shape == (2, 1 + 4 * 2, 64)
    resized = F.interpolate(normalised, size=(56, 28), mode="bicubic", antialias=True)
    assert torch.equal(tokens, vit(resized))


@torch.no_grad()
def test_registers_are_left_out(tmp_path):
    model = save_timm(tmp_path / "t.safetensors", "vit_small_patch14_reg4_dinov2", img_size=56)
    state = {**model.state_dict(), "pos_embed": torch.zeros(1, 1369, 384)}  # as stored for 518 x 518
    safetensors.torch.save_file(state, tmp_path / "t.safetensors")
    teacher = load_teacher(f"timm:vit_small_patch14_reg4_dinov2@{tmp_path / 't.safetensors'}")
    _, normalised = pixels(count=1)
    assert teacher(normalised).shape == (1, 1 + 4 * 2, 384)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "vit_wee_patch16_reg1_gap_256"])
def test_without_a_class_token_the_mean_of_the_patches_is_the_global_token(tmp_path, name):
    save_timm(tmp_path / "t.safetensors", name)
    tokens = load_teacher(f"timm:{name}@{tmp_path / 't.safetensors'}")(pixels()[1])
    assert tokens.shape[:2] == (2, 1 + 4 * 2)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))


def test_frozen_in_eval_mode_and_without_gradient(tmp_path):
    save_vit(tmp_path / "t.safetensors")
    teacher = load_teacher(str(tmp_path / "t.safetensors"))
    parent = torch.nn.ModuleDict({"teacher": teacher, "student": torch.nn.Linear(1, 1)})
    parent.train()
    assert parent["student"].training
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    _, normalised = pixels()
    assert not teacher(normalised.requires_grad_()).requires_grad
    assert teacher(normalised.bfloat16().float()).dtype == torch.float32
    assert not [key for key in teacher.state_dict() if not key.startswith("model.")]


def test_heads_are_a_64th_of_the_width_unless_given(tmp_path):
    save_vit(tmp_path / "t.safetensors", width=128)
    default, given = (load_teacher(str(tmp_path / "t.safetensors"), heads=heads) for heads in (None, 4))
    assert default.model.config.heads == default.model.config.last_heads == 2
    assert given.model.config.last_heads == 4
    with pytest.raises(ConfigError, match=r"teacher heads 3: .* tokens of 128 channels, expected a divisor"):
        load_teacher(str(tmp_path / "t.safetensors"), heads=3)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_that_is_not_there(tmp_path, layer):
    save_vit(tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=rf"teacher layer {layer}: .*t\.safetensors has blocks 1 to 3"):
        load_teacher(str(tmp_path / "t.safetensors"), layer=layer)


def test_few_matching_keys_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({k: v for k, v in state.items() if "blocks.3" not in k}, path)
    with pytest.raises(ModelFileError, match=r"84\.6 % of the model's 78 tensors match, expected at least 95 %"):
        load_teacher(f"timm:{TIMM}@{path}")
    state = save_vit(path).state_dict()
    safetensors.torch.save_file({k: v for k, v in state.items() if "blocks.1" not in k}, path)
    with pytest.raises(ModelFileError, match="expected at least 95 %"):
        load_teacher(str(path))


def test_weights_of_another_size_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({**state, "pos_embed": torch.zeros(1, 197, 64)}, path)
    with pytest.raises(ModelFileError, match=r"pos_embed has shape \(1, 197, 64\), the model's is \(1, 101, 64\)"):
        load_teacher(f"timm:{TIMM}@{path}")


@pytest.mark.parametrize("key", ["register_tokens", "blocks.0.attn.q_norm.weight", "cls_token_pos_embed"])
def test_file_of_more_than_a_plain_vit_is_refused(tmp_path, key):
    path = tmp_path / "t.safetensors"
    state = save_vit(path).state_dict()
    safetensors.torch.save_file({**state, key: torch.ones(64), "head.weight": torch.ones(3)}, path)
    with pytest.raises(ModelFileError, match=rf"a plain ViT has no {key}, .* use timm:NAME@"):
        load_teacher(str(path))


def test_unknown_teachers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"timm 1\.\S+ has no model 'vit_tinny'; close to it: "):
        load_teacher("timm:vit_tinny")
    with pytest.raises(ConfigError, match=r"has no model 'vit_tiny_patch17_224'"):
        load_teacher("timm:vit_tiny_patch17_224@somewhere.pth")
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        with pytest.raises(ConfigError, match=f"{name} is not a ViT"):
            load_teacher(f"timm:{name}@somewhere.pth")
    with pytest.raises(ModelFileError, match=r"none\.pth: no such file"):
        load_teacher(f"timm:{TIMM}@{tmp_path / 'none.pth'}")
    with pytest.raises(ModelFileError, match=r"none\.pth: no such file"):
        load_teacher(str(tmp_path / "none.pth"))


def test_file_of_another_architecture_names_the_way_out(tmp_path):
    path = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(ModelFileError, match=rf"{path}: not a ViT: .* for another architecture use timm:NAME@{path}"):
        load_teacher(str(path))


@pytest.fixture
def file_teacher(tmp_path):
    save_vit(tmp_path / "t.safetensors")
    return load_teacher(str(tmp_path / "t.safetensors"))


def test_features_of_a_working_teacher(file_teacher):
    check = check_features(file_teacher, pixels(count=4)[1])
    assert check["std"] > 1e-3
    assert -1 <= check["cosine"] < 1


def test_features_by_hand(file_teacher):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    fixed = Teacher(torch.nn.Identity(), lambda images: rows[:, None], file_teacher.passport, 16)
    assert check_features(fixed, pixels()[1]) == {"std": 0.5, "cosine": 0.0}


def test_constant_features_are_refused(file_teacher):
    with torch.no_grad():
        file_teacher.model.norm.weight.zero_()
    with pytest.raises(ModelFileError, match="gives the same features for 3 different crops; wrong weights"):
        check_features(file_teacher, pixels(count=3)[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(file_teacher, value):
    with torch.no_grad():
        file_teacher.model.norm.bias[0] = value
    with pytest.raises(ModelFileError, match="not finite on real crops; wrong weights"):
        check_features(file_teacher, pixels()[1])
