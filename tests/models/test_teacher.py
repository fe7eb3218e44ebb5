import os
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.encoders import Encoder, SwinEncoder, TimmEncoder, VitEncoder
from dpal_edge.models.layouts import Family
from dpal_edge.models.opening import Origin
from dpal_edge.models.students import config_to_dict
from dpal_edge.models.swin import SwinConfig, SwinTransformer, init_swin
from dpal_edge.models.teacher import (
    check_features,
    load_teacher,
    load_teachers,
    make_teacher,
    passport_fields,
)
from dpal_edge.models.teacher_spec import parse_spec
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, ViTConfig, init_student

TIMM = "test_vit"  # timm's smallest: width 64, 6 blocks, stored for 160 x 160, mean and std 0.5
SIZE = (64, 32)
STORED = "?stored=64x32"  # 9 positions would also be 3 x 3 without a class token


def save_timm(path, name=TIMM, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options).eval()
    safetensors.torch.save_file(model.state_dict(), path)
    return model


def tiny_vit(**options):
    vit = VisionTransformer(
        ViTConfig(**{"size": SIZE, "width": 64, "depth": 3, "heads": 1, "last_heads": 1, **options})
    )
    init_student(vit, torch.Generator().manual_seed(0))
    return vit.eval()


def save_vit(path, **options):
    vit = tiny_vit(pos_interp="2d-dino", **options)
    safetensors.torch.save_file(vit.state_dict(), path)
    return vit


def tiny_swin():
    swin = SwinTransformer(SwinConfig(width=64, depths=(1, 1, 1, 2), heads=(1, 1, 1, 1)))
    init_swin(swin, torch.Generator().manual_seed(0))
    return swin.eval()


def wrap(encoder, options="", **given):
    """A teacher of an encoder made here."""
    origin = Origin(family=Family(name="made in a test"), sha256="")
    return make_teacher(encoder, parse_spec(f"made{options}"), origin, **{"size": SIZE, **given})


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
    assert (passport.family, passport.licence, passport.global_target) == ("timm test_vit", "unknown", "cls")


@torch.no_grad()
@pytest.mark.parametrize(
    ("option", "mean", "std"),
    [
        ("norm=half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("norm=none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("norm=sapiens", (123.5 / 255, 116.5 / 255, 103.5 / 255), (58.5 / 255, 57 / 255, 57.5 / 255)),
        ("mean=0.1,0.2,0.3&std=0.4,0.5,0.6", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ],
)
def test_normalisation_by_option(tmp_path, option, mean, std):
    vit = save_vit(tmp_path / "t.safetensors")
    teacher = load_teacher(f"{tmp_path / 't.safetensors'}{STORED}&{option}")
    images, normalised = pixels()
    expected = vit((images - tensor(mean)) / tensor(std))
    torch.testing.assert_close(teacher(normalised), expected, rtol=1e-4, atol=1e-5)
    assert (teacher.passport.mean, teacher.passport.std) == (mean, std)


@torch.no_grad()
def test_file_teacher_is_not_renormalised_and_resizes_positions_as_published(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors")
    teacher = load_teacher(str(tmp_path / "t.safetensors"))
    for size in (SIZE, (96, 64)):
        _, normalised = pixels(size=size)
        assert torch.equal(teacher(normalised), vit(normalised))
    assert teacher.passport.mean == IMAGENET_MEAN
    assert teacher.passport.licence == "unknown"
    assert (teacher.heads, teacher.passport.depth) == (1, 3)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_layer_of_a_file_teacher(tmp_path, layer):
    vit = save_vit(tmp_path / "t.safetensors")
    by_argument = load_teacher(str(tmp_path / "t.safetensors"), layer=layer)
    by_option = load_teacher(f"{tmp_path / 't.safetensors'}" + (f"?layer={layer}" if layer else ""))
    _, normalised = pixels()
    for teacher in (by_argument, by_option):
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
    vit = save_vit(tmp_path / "t.safetensors", size=(56, 28), patch_size=14)
    teacher = load_teacher(str(tmp_path / "t.safetensors"), size=SIZE)
    _, normalised = pixels()
    tokens = teacher(normalised)
    assert tokens.shape == (2, 1 + 4 * 2, 64)
    resized = F.interpolate(normalised, size=(56, 28), mode="bicubic", antialias=True)
    assert torch.equal(tokens, vit(resized))
    assert (teacher.passport.input_size, teacher.passport.grid) == ((56, 28), (4, 2))


@pytest.mark.parametrize(
    ("patch", "student_patch", "input_size", "grid"),
    [
        (16, 16, (64, 64), (4, 4)),
        (14, 16, (56, 56), (4, 4)),
        (8, 16, (64, 64), (8, 8)),  # four of its patches on one of the student's
        (16, 32, (64, 64), (4, 4)),
        (14, 32, (56, 56), (4, 4)),  # 28 pixels for the student's 32
        (32, 16, (64, 64), (2, 2)),
    ],
)
def test_images_change_as_little_as_patches_allow(patch, student_patch, input_size, grid):
    vit = tiny_vit(size=(4 * patch, 4 * patch), patch_size=patch)
    teacher = wrap(VitEncoder(vit), size=(64, 64), student_patch=student_patch)
    assert (teacher.passport.input_size, teacher.passport.grid) == (input_size, grid)
    assert teacher(pixels(size=(64, 64))[1]).shape == (2, 1 + (64 // student_patch) ** 2, 64)


@torch.no_grad()
def test_size_scales_every_view_and_the_grid_is_resized(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors")
    teacher = load_teacher(f"{tmp_path / 't.safetensors'}{STORED}&size=128x64", size=SIZE)
    assert (teacher.passport.input_size, teacher.passport.grid) == ((128, 64), (8, 4))
    for size, seen in ((SIZE, (128, 64)), ((32, 48), (64, 96))):
        _, normalised = pixels(size=size)
        tokens = teacher(normalised)
        own = vit(F.interpolate(normalised, size=seen, mode="bicubic", antialias=True))
        assert torch.equal(tokens[:, 0], own[:, 0])
        maps = own[:, 1:].mT.unflatten(2, (seen[0] // 16, seen[1] // 16))
        expected = F.interpolate(maps, size=(size[0] // 16, size[1] // 16), mode="bicubic").flatten(2).mT
        torch.testing.assert_close(tokens[:, 1:], expected)


@torch.no_grad()
def test_a_swin_sees_the_image_as_it_is_and_its_map_is_doubled():
    swin = tiny_swin()
    teacher = wrap(SwinEncoder(swin))
    _, normalised = pixels()
    tokens, own = teacher(normalised), swin(normalised)
    assert tokens.shape == (2, 1 + 4 * 2, 64)
    assert torch.equal(tokens[:, 0], own[:, 0])
    expected = F.interpolate(own[:, 1:].mT.unflatten(2, (2, 1)), size=(4, 2), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(tokens[:, 1:], expected)
    assert (teacher.passport.input_size, teacher.passport.grid) == (SIZE, (2, 1))
    assert teacher.heads is None


@torch.no_grad()
def test_registers_are_left_out(tmp_path):
    model = save_timm(tmp_path / "t.safetensors", "vit_small_patch14_reg4_dinov2", img_size=56, depth=2)
    teacher = wrap(TimmEncoder(model))
    _, normalised = pixels(count=1)
    tokens, qkv = teacher.attend(normalised)
    assert tokens.shape == (1, 1 + 4 * 2, 384)
    assert qkv.shape == (1, 1 + 4 * 2, 3 * 384)
    seen = F.interpolate(normalised, size=(56, 28), mode="bicubic", antialias=True)
    x = model.blocks[0](model._pos_embed(model.patch_embed(seen)))
    expected = model.blocks[1].attn.qkv(model.blocks[1].norm1(x))
    torch.testing.assert_close(qkv, torch.cat([expected[:, :1], expected[:, 5:]], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_medium_patch16_gap_240", "vit_wee_patch16_reg1_gap_256"])
def test_without_a_class_token_the_mean_of_the_patches_is_the_global_token(tmp_path, name):
    save_timm(tmp_path / "t.safetensors", name, depth=2)
    teacher = wrap(TimmEncoder(timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=2)))
    tokens, qkv = teacher.attend(pixels()[1])
    assert tokens.shape[:2] == (2, 1 + 4 * 2)
    assert qkv.shape[:2] == (2, 4 * 2)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert teacher.passport.global_target == "mean"


@torch.no_grad()
def test_a_norm_after_pooling_is_applied_to_every_token(tmp_path):
    model = save_timm(tmp_path / "t.safetensors", "test_vit2")
    torch.nn.init.normal_(model.fc_norm.weight)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "t.safetensors")
    teacher = load_teacher(f"timm:test_vit2@{tmp_path / 't.safetensors'}?norm=imagenet")
    assert isinstance(model.norm, torch.nn.Identity)
    _, normalised = pixels()
    expected = model.fc_norm(model.forward_features(normalised))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(teacher(normalised)[:, 1:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_global_target_by_option(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors")
    spec = f"{tmp_path / 't.safetensors'}{STORED}"
    _, normalised = pixels()
    mean = load_teacher(f"{spec}&global=mean")(normalised)
    torch.testing.assert_close(mean[:, 0], vit(normalised)[:, 1:].mean(1))
    assert torch.equal(mean[:, 1:], vit(normalised)[:, 1:])
    assert torch.equal(load_teacher(f"{spec}&global=cls")(normalised), vit(normalised))
    with pytest.raises(ConfigError, match=r"global=pooled is not there; it has (cls and mean|mean and cls)"):
        load_teacher(f"{spec}&global=pooled")
    with pytest.raises(ConfigError, match="global=cls is not there"):
        wrap(SwinEncoder(tiny_swin()), "?global=cls")


def test_frozen_in_eval_mode_and_without_gradient(tmp_path):
    save_vit(tmp_path / "t.safetensors")
    teacher = load_teacher(str(tmp_path / "t.safetensors"))
    parent = torch.nn.ModuleDict({"teacher": teacher, "student": torch.nn.Linear(64, 64)})
    parent.train()
    assert parent["student"].training
    assert not any(module.training for module in teacher.encoder.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    _, normalised = pixels()
    tokens = teacher(normalised.requires_grad_())
    assert not tokens.requires_grad
    assert tokens.dtype == torch.float32
    (parent["student"](tokens) * tokens).sum().backward()  # they may be kept for a backward pass
    assert parent["student"].weight.grad.abs().sum() > 0
    assert not [key for key in teacher.state_dict() if not key.startswith("encoder.")]


ENCODERS = {
    "vit": lambda: VitEncoder(tiny_vit()),
    "vit_small": lambda: VitEncoder(tiny_vit(width=384, depth=12, heads=6, last_heads=6)),
    "swin": lambda: SwinEncoder(tiny_swin()),
    "timm": lambda: TimmEncoder(timm.create_model(TIMM, num_classes=0, dynamic_img_size=True)),
    "dinov3": lambda: TimmEncoder(timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, depth=2)),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_tokens(name, dtype):
    teacher = wrap(ENCODERS[name]())
    _, normalised = pixels()
    exact = teacher(normalised)
    low = teacher.cast(dtype)(normalised)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert F.cosine_similarity(low, exact, dim=-1).min() > 0.999
    norms = [m for m in teacher.encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    linears = [m for m in teacher.encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert {m.weight.dtype for m in linears} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_outside_changes_nothing(dtype):
    teacher = wrap(VitEncoder(tiny_vit())).cast(dtype)
    _, normalised = pixels()
    expected = teacher(normalised)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        assert torch.equal(teacher(normalised), expected)


@torch.no_grad()
def test_attend_gives_the_qkv_of_the_aligned_block(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors", heads=2, last_heads=2)
    teacher = load_teacher(f"{tmp_path / 't.safetensors'}{STORED}&heads=2&layer=2")
    by_timm = timm.create_model(TIMM, num_classes=0, dynamic_img_size=True, img_size=SIZE, depth=3, mlp_ratio=4)
    by_timm.load_state_dict({**by_timm.state_dict(), **vit.state_dict()})
    _, normalised = pixels()
    tokens, qkv = teacher.attend(normalised)
    assert torch.equal(tokens, teacher(normalised))
    assert torch.equal(qkv, vit.attend(normalised, 2)[1])
    encoder = TimmEncoder(by_timm, 2)
    assert encoder.heads == teacher.heads == 2
    torch.testing.assert_close(wrap(encoder).attend(normalised)[1], qkv, rtol=1e-4, atol=1e-5)
    assert wrap(encoder).cast(torch.bfloat16).attend(normalised)[1].dtype == torch.float32


def test_attention_that_cannot_be_paired_is_refused(tmp_path):
    _, normalised = pixels()
    with pytest.raises(ConfigError, match=r"SwinTransformer has no plain attention"):
        wrap(SwinEncoder(tiny_swin()), student_patch=32).attend(normalised)
    normed = timm.create_model(TIMM, num_classes=0, dynamic_img_size=True, qk_norm=True)
    assert wrap(TimmEncoder(normed)).heads is None
    with pytest.raises(ConfigError, match=r"attention is on 8x4 patches, the student's on 4x2; .* need the same grid"):
        wrap(VitEncoder(tiny_vit()), "?size=128x64").attend(normalised)


@pytest.fixture
def two(tmp_path):
    """A wide teacher for the global token and a narrow one for the rest."""
    wide = save_vit(tmp_path / "wide.safetensors", width=128, heads=2, last_heads=2)
    narrow = save_vit(tmp_path / "narrow.safetensors")
    specs = (
        f"{tmp_path / 'wide.safetensors'}?for=global&layer=2",
        f"{tmp_path / 'narrow.safetensors'}?for=relation,local",
    )
    return SimpleNamespace(wide=wide, narrow=narrow, specs=specs)


@torch.no_grad()
def test_several_teachers_play_roles_and_run_once(two):
    teachers = load_teachers(two.specs, size=SIZE)
    calls = []
    for teacher in teachers.each():
        teacher.encoder.register_forward_hook(lambda module, *_: calls.append(module.width))
    _, normalised = pixels()
    found = teachers(normalised, ("global", "local", "relation"))
    assert calls == [128, 64]
    wide, narrow = two.wide(normalised, 2), two.narrow(normalised)
    assert {role: tuple(tokens.shape) for role, tokens in found.items()} == {
        "global": (2, 1, 128),
        "local": (2, 8, 64),
        "relation": (2, 9, 64),
    }
    assert torch.equal(found["global"], wide[:, :1])
    assert torch.equal(found["local"], narrow[:, 1:])
    assert torch.equal(found["relation"], narrow)
    assert teachers(normalised, ("relation",)).keys() == {"relation"}
    assert calls == [128, 64, 64]
    assert (teachers.width("global"), teachers.width("local")) == (128, 64)
    assert teachers.teacher("local") is teachers.teacher("relation")
    assert torch.equal(teachers.attend(normalised, "local")[1], two.narrow.attend(normalised)[1])
    assert [passport.roles for passport in teachers.passports] == [("global",), ("local", "relation")]
    assert teachers.cast(torch.bfloat16)(normalised, ("local",))["local"].dtype == torch.float32


@torch.no_grad()
def test_one_teacher_plays_all_roles_by_default(tmp_path):
    vit = save_vit(tmp_path / "t.safetensors")
    teachers = load_teachers([str(tmp_path / "t.safetensors")], layer=2, size=SIZE)
    _, normalised = pixels()
    assert torch.equal(teachers(normalised, ("global",))["global"], vit(normalised, 2)[:, :1])
    assert len(teachers.each()) == len(teachers.passports) == 1


@pytest.mark.parametrize(
    ("specs", "layer", "message"),
    [
        (
            ["a.pth", "b.pth"],
            None,
            r"a\.pth and b\.pth for global, expected one; tell who is for what, as in SPEC\?for=global",
        ),
        (["a.pth?for=global,local"], None, "nobody for relation, expected one"),
        ([], None, "nobody for global"),
        (
            ["a.pth?for=global", "b.pth?for=local,relation"],
            3,
            r"layer 3: there are 2 teachers; tell whose, as in SPEC\?layer=3",
        ),
        (["a.pth?layer=2"], 3, "names layer 2, and layer 3 is asked for; give one"),
    ],
)
def test_roles_and_layers_that_are_open_are_refused_before_any_file_is_read(specs, layer, message):
    with pytest.raises(ConfigError, match=message):
        load_teachers(specs, layer=layer)


def test_passport_is_ready_for_json(two):
    passport = load_teachers(two.specs, size=SIZE).passports[0]
    fields = passport_fields(passport)
    assert (fields["roles"], fields["mean"], fields["input_size"]) == (["global"], list(IMAGENET_MEAN), [64, 32])
    assert (fields["layer"], fields["depth"], fields["semantic_weight"], fields["entry"]) == (2, 3, None, "")
    assert "layer=2" in fields["note"]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_our_own_checkpoints_teach(tmp_path, architecture):
    student = tiny_vit() if architecture == "vit" else tiny_swin()
    path = tmp_path / "step-00000001.safetensors"
    parts = {
        part: {k: v + shift for k, v in student.state_dict().items()} for part, shift in (("backbone", 0), ("ema", 1))
    }
    tensors = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    passport = {"spec": "sapiens.pth", "parameters": 1, "limits": "Non-commercial use only."}
    metadata = {"architecture": config_to_dict(student.config), "teachers": [passport], "best": "backbone"}
    write_checkpoint(path, tensors, {**metadata, "mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    teacher = load_teacher(str(path), student_patch=student.config.patch_size)
    _, normalised = pixels()
    torch.testing.assert_close(teacher(normalised), student(normalised))
    assert (teacher.passport.family, teacher.passport.entry) == ("model of dpal-edge", "backbone")
    assert teacher.passport.limits == "Its teacher's: Non-commercial use only."
    assert load_teacher(f"{path}?entry=ema").passport.entry == "ema"
    with pytest.raises(ConfigError, match="heads means nothing for a checkpoint of this project"):
        load_teacher(f"{path}?heads=2")


@pytest.fixture
def from_the_hub(monkeypatch):
    """timm without a network: what the hub would send is what the model begins with."""
    create = timm.create_model

    def offline(name, *, pretrained, **options):
        assert pretrained
        torch.manual_seed(0)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)


@pytest.mark.parametrize(
    ("name", "licence", "limits"),
    [(TIMM, "apache-2.0", ""), ("vit_small_patch16_dinov3", "dinov3-license", "The DINOv3 licence has terms")],
)
def test_licence_of_the_hub(from_the_hub, name, licence, limits):
    passport = load_teacher(f"timm:{name}").passport
    assert passport.licence == licence
    assert passport.limits.startswith(limits)
    assert bool(passport.limits) == bool(limits)
    assert len(passport.sha256) == 64


def test_weights_of_the_hub_are_known_by_their_tensors(from_the_hub):
    assert load_teacher(f"timm:{TIMM}").passport.sha256 == load_teacher(f"timm:{TIMM}").passport.sha256
    assert load_teacher(f"timm:{TIMM}").passport.sha256 != load_teacher("timm:test_vit2").passport.sha256


def test_a_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelFileError, match=r"its weights cannot be fetched .* give local weights as timm:test_vit@FILE"
    ):
        load_teacher(f"timm:{TIMM}")


def test_heads_are_a_64th_of_the_width_unless_given(tmp_path):
    save_vit(tmp_path / "t.safetensors", width=128)
    spec = f"{tmp_path / 't.safetensors'}{STORED}"
    assert load_teacher(spec).heads == 2
    assert load_teacher(f"{spec}&heads=4").heads == 4
    mixed = f"{spec}&heads=4+8"
    assert (load_teacher(mixed).heads, load_teacher(mixed, layer=1).heads) == (8, 4)
    with pytest.raises(ConfigError, match=r"teacher heads 3: .* tokens of 128 channels, expected a divisor"):
        load_teacher(f"{spec}&heads=3")
    passport = load_teacher(f"{spec}&resize=2d").passport
    assert (passport.heads, passport.resize, passport.missing) == ("2", "2d", ())
    assert load_teacher(mixed).passport.heads == "4+8"


@pytest.mark.parametrize("width", [1280, 1408])
def test_wide_published_vits_have_16_heads(tmp_path, width):
    save_vit(tmp_path / "t.safetensors", width=width, depth=1, mlp_ratio=0.1)
    assert load_teacher(f"{tmp_path / 't.safetensors'}{STORED}").heads == 16


@pytest.mark.parametrize("width", [96, 1088, 1536])
def test_heads_that_the_width_leaves_open_are_asked_for(tmp_path, width):
    save_vit(tmp_path / "t.safetensors", width=width, depth=1, mlp_ratio=0.25)
    spec = f"{tmp_path / 't.safetensors'}{STORED}"
    with pytest.raises(
        ConfigError, match=rf"tokens of {width} channels leave .* heads open; give it, as in .*\?heads="
    ):
        load_teacher(spec)
    assert load_teacher(f"{spec}&heads=2").heads == 2


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


@pytest.mark.parametrize("key", ["patch_embed.proj.bias", "cls_token", "blocks.4.attn.qkv.weight"])
def test_a_single_random_tensor_is_refused(tmp_path, key):
    path = tmp_path / "t.safetensors"
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(ModelFileError, match=rf"lacks {key}, which the tokens of block 6 need; .* the whole file"):
        load_teacher(f"timm:{TIMM}@{path}")


def test_a_block_that_is_missing_is_refused_unless_it_lies_above_the_aligned_one(tmp_path):
    path = tmp_path / "t.safetensors"
    state = save_vit(path, depth=24, width=64, mlp_ratio=1.0).state_dict()
    for gone in ("blocks.5.", "blocks.22."):
        safetensors.torch.save_file({k: v for k, v in state.items() if not k.startswith(gone)}, path)
        with pytest.raises(
            ModelFileError, match=rf"lacks {gone}norm1.weight, .* \.\.\., which the tokens of block 24 need"
        ):
            load_teacher(f"{path}{STORED}")
    passport = load_teacher(f"{path}{STORED}&layer=22").passport
    assert passport.keys_matched == pytest.approx(1 - 12 / len(state))
    assert passport.missing[0] == "blocks.22.norm1.weight"
    assert passport.missing[8:] == ("and 4 more",)


def test_a_norm_that_is_missing_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({k: v for k, v in state.items() if not k.startswith("norm.")}, path)
    passport = load_teacher(f"timm:{TIMM}@{path}").passport
    assert passport.missing == ("norm.weight", "norm.bias")
    assert passport.keys_matched == pytest.approx(76 / 78)


def test_weights_of_another_width_are_refused_and_positions_of_another_size_are_resized(tmp_path):
    path = tmp_path / "t.safetensors"
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({**state, "norm.weight": torch.zeros(65)}, path)
    with pytest.raises(ModelFileError, match=r"norm.weight has shape \(65,\), the model's is \(64,\)"):
        load_teacher(f"timm:{TIMM}@{path}")
    safetensors.torch.save_file({**state, "pos_embed": torch.ones(1, 197, 64)}, path)
    assert load_teacher(f"timm:{TIMM}@{path}").passport.keys_matched == 1.0


@pytest.mark.parametrize("key", ["reg_token", "blocks.0.attn.q_norm.weight", "norm_pre.weight"])
def test_file_of_more_than_its_architecture_is_refused(tmp_path, key):
    path = tmp_path / "t.safetensors"
    state = save_vit(path).state_dict()
    safetensors.torch.save_file({**state, key: torch.ones(64), "head.weight": torch.ones(3)}, path)
    with pytest.raises(ModelFileError, match=rf"a plain ViT has no {key}, .* use timm:NAME@"):
        load_teacher(f"{path}{STORED}")
    state = save_timm(path).state_dict()
    safetensors.torch.save_file({**state, key: torch.ones(64)}, path)
    with pytest.raises(ModelFileError, match=rf"timm's VisionTransformer has no {key}, "):
        load_teacher(f"timm:{TIMM}@{path}")


def test_unknown_teachers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"timm 1\.\S+ has no model 'vit_tinny'; close to it: "):
        load_teacher("timm:vit_tinny")
    with pytest.raises(ConfigError, match=r"has no model 'vit_tiny_patch17_224'"):
        load_teacher("timm:vit_tiny_patch17_224@somewhere.pth")
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"):
        with pytest.raises(ConfigError, match=f"{name} is not a ViT"):
            load_teacher(f"timm:{name}@somewhere.pth")
    with pytest.raises(ConfigError, match=r"vit_pe_spatial_tiny_patch16_512 has no final norm, .* choose a model with"):
        load_teacher("timm:vit_pe_spatial_tiny_patch16_512@somewhere.pth")
    with pytest.raises(ModelFileError, match=r"none\.pth: no such file"):
        load_teacher(f"timm:{TIMM}@{tmp_path / 'none.pth'}")
    with pytest.raises(ModelFileError, match=r"none\.pth: no such file"):
        load_teacher(str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match="heads means nothing for a timm model; it takes entry, for, global"):
        load_teacher(f"timm:{TIMM}@somewhere.pth?heads=3")


def test_file_of_another_architecture_names_the_way_out(tmp_path):
    path = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(ModelFileError, match=rf"{path}: not a ViT: .* for another architecture use timm:NAME@{path}"):
        load_teacher(str(path))


@pytest.mark.parametrize("prefix", ["", f"timm:{TIMM}@"])
def test_nothing_in_a_file_is_executed(tmp_path, prefix):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"teacher": tiny_vit().state_dict(), "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelFileError, match=r"evil\.pth: cannot be read as weights: .*code that is never run here"):
        load_teacher(f"{prefix}{tmp_path / 'evil.pth'}")
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def file_teacher(tmp_path):
    save_vit(tmp_path / "t.safetensors")
    return load_teacher(str(tmp_path / "t.safetensors"))


def test_features_of_a_working_teacher(file_teacher):
    check = check_features(file_teacher, pixels(count=4)[1])
    assert check["std"] > 1e-3
    assert -1 <= check["cosine"] < 1


def test_features_by_hand():
    class Fixed(Encoder):
        patch_size, step, width, depth, layer, target = 16, 16, 2, 1, 1, "cls"

        def forward(self, images):
            return torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, None].expand(-1, 9, -1)

    assert check_features(wrap(Fixed()), pixels()[1]) == {"std": 0.5, "cosine": 0.0}


def test_constant_features_are_refused(file_teacher):
    with torch.no_grad():
        file_teacher.encoder.network.norm.weight.zero_()
    with pytest.raises(ModelFileError, match="gives the same features for 3 different crops; wrong weights"):
        check_features(file_teacher, pixels(count=3)[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(file_teacher, value):
    with torch.no_grad():
        file_teacher.encoder.network.norm.bias[0] = value
    with pytest.raises(ModelFileError, match="not finite on real crops; wrong weights"):
        check_features(file_teacher, pixels()[1])
