"""Layouts that the shared set has no files of: built here by undoing what timm's translation does."""

import pytest
import safetensors.torch
import timm
import torch

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.layouts import licence_limits, recognise
from dpal_edge.models.swin import SwinConfig, SwinTransformer
from dpal_edge.models.teacher import load_teacher
from dpal_edge.models.teacher_spec import parse_spec
from dpal_edge.models.vit import VisionTransformer, ViTConfig

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0, "dynamic_img_size": True}
WIDE = {**TINY, "embed_dim": 128, "num_heads": 2}


def randomised(model):
    """The model with every parameter random, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def raw_dinov2(model):
    """Meta's names of timm's DINOv2: a class token in pos_embed, register_tokens, w12 and w3 in gated MLPs."""
    state = dict(model.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.full_like(state["cls_token"], 0.25)  # which timm adds to the class token once and for all
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    if "SwiGLU" in type(model.blocks[0].mlp).__name__ or "Glu" in type(model.blocks[0].mlp).__name__:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for key, v in state.items()}
    return {**state, "mask_token": torch.zeros(1, model.embed_dim)}


def raw_dinov3(model):
    """Meta's names of timm's DINOv3: storage_tokens, ls1 and ls2, one qkv bias with a mask, w1 to w3, periods."""
    state = {}
    gated = "blocks.0.mlp.fc1_g.weight" in model.state_dict()
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"} if gated else {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    for i in range(len(model.blocks)):
        if (q := state.pop(f"blocks.{i}.attn.q_bias", None)) is not None:
            v = state.pop(f"blocks.{i}.attn.v_bias")
            state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones_like(q), 0 * q, torch.ones_like(q)])
    head = model.embed_dim // model.blocks[0].attn.num_heads
    return {**state, "rope_embed.periods": torch.ones(head // 4), "mask_token": torch.zeros(1, model.embed_dim)}


def features(model, images):
    """timm's tokens without registers."""
    tokens = model.forward_features(images)
    return torch.cat([tokens[:, :1], tokens[:, model.num_prefix_tokens :]], dim=1)


def save(path, state):
    safetensors.torch.save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": 56}),
        ("vit_giant_patch14_reg4_dinov2", {**WIDE, "img_size": 56}),
        ("vit_giant_patch14_dinov2", {**WIDE, "img_size": 56}),
    ],
)
def test_dinov2_beyond_a_plain_vit(tmp_path, name, options):
    model = randomised(timm.create_model(name, **options))
    path = save(tmp_path / "dinov2.safetensors", raw_dinov2(model))
    teacher = load_teacher(path, student_patch=14)
    images = torch.randn(2, 3, 56, 28)
    torch.testing.assert_close(teacher(images), features(model, images), rtol=1e-5, atol=1e-5)
    passport = teacher.passport
    assert passport.family == "DINOv2 ViT, as released by Meta"
    assert (passport.licence, passport.keys_matched, passport.depth) == ("apache-2.0", 1.0, 2)
    by_name = load_teacher(f"{path}?layer=1", student_patch=14)(images)
    model.blocks = model.blocks[:1]
    torch.testing.assert_close(by_name, features(model, images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dinov2_without_registers_is_a_plain_vit(tmp_path):
    model = randomised(timm.create_model("vit_small_patch14_dinov2", **WIDE, img_size=56))
    path = save(tmp_path / "dinov2.safetensors", raw_dinov2(model))
    teacher = load_teacher(path, student_patch=14)
    assert isinstance(teacher.encoder.network, VisionTransformer)
    images = torch.randn(2, 3, 56, 56)  # as stored: elsewhere timm resizes positions in another way than DINOv2
    torch.testing.assert_close(teacher(images), features(model, images), rtol=1e-5, atol=1e-5)
    assert teacher.passport.family == "DINOv2 ViT, as released by Meta"
    wrapped = {"teacher": {f"backbone.{key}": value for key, value in raw_dinov2(model).items()}}
    torch.save({**wrapped, "student": {"backbone.cls_token": torch.ones(1)}}, tmp_path / "training.pth")
    again = load_teacher(str(tmp_path / "training.pth"), student_patch=14)
    assert torch.equal(again(images), teacher(images))
    assert again.passport.entry == "teacher"


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "vit_small_patch16_dinov3_qkvb",
        "vit_small_plus_patch16_dinov3",
        "vit_7b_patch16_dinov3",
    ],
)
def test_dinov3(tmp_path, name):
    model = randomised(timm.create_model(name, **WIDE))
    path = save(tmp_path / "dinov3.safetensors", raw_dinov3(model))
    teacher = load_teacher(path)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(teacher(images), features(model, images), rtol=1e-5, atol=1e-5)
    assert teacher.passport.licence == "dinov3-license"
    assert "DINOv3 licence" in teacher.passport.limits
    assert teacher.passport.keys_matched == 1.0
    assert teacher.heads is None
    with pytest.raises(ConfigError, match=r"Eva has no plain attention .* TinyMIM and --recipe attn need a ViT"):
        teacher.attend(images)


def test_dinov3_by_name_is_translated_too(tmp_path):
    model = randomised(timm.create_model("vit_tiny_patch16_dinov3_qkvb", depth=12, num_classes=0))
    path = save(tmp_path / "dinov3.safetensors", raw_dinov3(model))
    teacher = load_teacher(f"timm:vit_tiny_patch16_dinov3_qkvb@{path}")
    images = torch.randn(1, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), features(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_7b_patch16_dinov3", "vit_base_patch16_dinov3_qkvb", "vit_giant_patch14_dinov2"])
def test_published_sizes_are_told_from_the_weights(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        weights = recognise((raw_dinov3 if "dinov3" in name else raw_dinov2)(model), parse_spec("weights.pth"))
        found = timm.create_model(weights.timm, num_classes=0, dynamic_img_size=True, **weights.fields)
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert str(found.blocks[0]) == str(model.blocks[0])  # norms and activations
    assert found.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def vit_state(**options):
    fields = {"size": (64, 64), "width": 64, "depth": 2, "heads": 1, "last_heads": 1, **options}
    return randomised(VisionTransformer(ViTConfig(**fields))).state_dict()


def passport(path, state, options="", *, pickled=False):
    if pickled:
        torch.save(state, path)
    else:
        save(path, state)
    return load_teacher(f"{path}{options}").passport


def test_sapiens2_is_refused_by_its_licence(tmp_path):
    state = {**vit_state(), "blocks.0.attn.wq.weight": torch.ones(64, 64), "storage_tokens": torch.ones(1, 8, 64)}
    with pytest.raises(ModelFileError, match=r"Sapiens2 is not supported .* bars surveillance, biometric .*re-id"):
        passport(tmp_path / "sapiens2.safetensors", state)


@torch.no_grad()
@pytest.mark.parametrize("mark", ["inter_norm.weight", "adapter.pattern_queries", "rows"])
def test_dpal_students_have_6_and_12_heads_and_positions_resized_in_one_row(tmp_path, mark):
    size, width = ((256, 128), 192) if mark == "rows" else ((64, 32), 48)
    config = ViTConfig(size=size, width=width, depth=2, heads=6, last_heads=12, pos_interp="1d")
    vit = randomised(VisionTransformer(config))
    state = vit.state_dict()
    if mark == "rows":
        content = state
    else:
        state = {f"module.backbone.{key}": value for key, value in state.items()}
        prefix = "module.backbone." if mark.startswith("inter") else "module."
        content = {"student": {**state, f"{prefix}{mark}": torch.ones(width)}, "teacher": {}}
    torch.save(content, tmp_path / "student.pth")
    teacher = load_teacher(str(tmp_path / "student.pth"))
    assert teacher.passport.family == "DPAL student, as released by its authors"
    assert teacher.passport.licence.startswith("apache-2.0")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(teacher(images), vit(images))
    assert (teacher.passport.heads, teacher.passport.resize) == ("6+12", "1d")
    assert ("by its 129 positions alone; if it is another ViT of 256x128, give heads=3&resize=2d" in
            teacher.passport.note) == (mark == "rows")  # fmt: skip
    plain = load_teacher(f"{tmp_path / 'student.pth'}?heads=3&resize=2d")
    assert not torch.allclose(plain(images), vit(images))
    assert plain.passport.licence.startswith("unknown" if mark == "rows" else "apache-2.0")
    assert (plain.passport.heads, plain.passport.resize) == ("3", "2d")


def test_a_plain_vit_has_no_known_licence(tmp_path):
    plain = passport(tmp_path / "a.safetensors", vit_state())
    assert (plain.family, plain.licence, plain.limits) == ("plain ViT in timm's names", "unknown", "")
    assert "compare with layer=1" in plain.note
    scaled = passport(tmp_path / "b.safetensors", vit_state(layer_scale=True))
    assert (scaled.family, scaled.licence, scaled.note) == ("ViT with layer scale in timm's names", "unknown", "")


def test_entry_of_a_file_with_several_networks(tmp_path):
    solider = {f"backbone.{key}": value for key, value in swin_state(modulated=True).items()}
    both = {"student": {f"module.{k}": v + 1 for k, v in solider.items()}, "teacher": solider, "epoch": 3}
    path = tmp_path / "both.pth"
    assert passport(path, both, pickled=True).entry == "teacher"
    assert passport(path, both, "?entry=student", pickled=True).entry == "student"
    with pytest.raises(ModelFileError, match=r"has no entry 'ema'; its dictionaries are student, teacher"):
        passport(path, both, "?entry=ema", pickled=True)


def swin_state(*, modulated):
    """A Swin in the authors' names."""
    config = SwinConfig(width=64, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), modulated=modulated)
    names = {"patch_embed.proj.": "patch_embed.projection.", ".attn.": ".attn.w_msa.", ".mlp.fc1.": ".ffn.layers.0.0.",
             ".mlp.fc2.": ".ffn.layers.1."}  # fmt: skip
    state = {}
    for key, value in randomised(SwinTransformer(config)).state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state["norm3." + key.removeprefix("norm.") if key.startswith("norm.") else key] = value
    found = {key: value for key, value in state.items() if not key.startswith("semantic")}
    if modulated:
        for i, width in enumerate((16, 32, 64)):
            for which in "wb":
                found[f"semantic_embed_{which}.{i}.weight"] = torch.randn(width, 2)
                found[f"semantic_embed_{which}.{i}.bias"] = torch.randn(width)
    return found


def test_a_swin_is_modulated_only_where_that_is_soliders(tmp_path):
    wrapped = {f"backbone.{key}": value for key, value in swin_state(modulated=True).items()}
    solider = passport(tmp_path / "a.safetensors", wrapped)
    assert (solider.semantic_weight, solider.family) == (0.2, "SOLIDER Swin, as released by Alibaba")
    assert (solider.patch_size, solider.width, solider.depth, solider.global_target) == (32, 64, 4, "pooled")
    bare = passport(tmp_path / "b.safetensors", swin_state(modulated=True))
    assert (bare.semantic_weight, bare.licence) == (None, "unknown")
    assert "for SOLIDER give semantic=W" in bare.note
    assert passport(tmp_path / "b.safetensors", swin_state(modulated=True), "?semantic=0.8").semantic_weight == 0.8
    with pytest.raises(ConfigError, match=r"semantic=0.5 needs SOLIDER's semantic_embed, which it lacks"):
        passport(tmp_path / "c.safetensors", swin_state(modulated=False), "?semantic=0.5")


@pytest.mark.parametrize(
    ("rows", "stored", "size"),
    [
        (196, None, (224, 224)),
        (128, None, (256, 128)),
        (3072, "1024x768", (1024, 768)),
        (192, "384x128", (384, 128)),
        (192, "256x192", (256, 192)),
        (54, None, (144, 96)),
        (24, "96x64", (96, 64)),
    ],
)
def test_the_grid_of_positions(rows, stored, size):
    state = {**vit_state(), "pos_embed": torch.zeros(1, rows + 1, 64)}
    fields = recognise(state, parse_spec("a.pth" + (f"?stored={stored}" if stored else ""))).fields
    assert fields["size"] == size


@pytest.mark.parametrize(
    ("rows", "stored", "message"),
    [
        (192, "", r"192 positions are 16x12 or 24x8; give the image size .*a\.pth\?stored=256x128"),
        (46, "", "46 positions are no grid of a usual shape; give the image size"),
        (24, "", "25 positions may have one of the class token among them or not; give the image size"),
        (128, "?stored=256x192", r"128 positions do not fit stored=256x192, whose patches of 16 are 16x12"),
    ],
)
def test_a_grid_that_is_open_is_asked_for(rows, stored, message):
    state = {**vit_state(), "pos_embed": torch.zeros(1, rows + 1, 64)}
    with pytest.raises(ModelFileError, match=message):
        recognise(state, parse_spec(f"a.pth{stored}"))


@pytest.mark.parametrize(("width", "heads"), [(1024, None), (1280, None), (1536, (24, 24)), (1920, (32, 32))])
def test_heads_of_sapiens(width, heads):
    with torch.device("meta"):
        state = {"layers.0.ln1.weight": torch.ones(width), "pos_embed": torch.ones(1, 4096, width),
                 "patch_embed.projection.weight": torch.ones(width, 3, 16, 16)}  # fmt: skip
    assert recognise(state, parse_spec("a.pth")).heads == heads


def test_a_class_token_without_a_position_is_not_used():
    state = {**vit_state(), "pos_embed": torch.zeros(1, 196, 64)}
    weights = recognise(state, parse_spec("a.pth"))
    assert "cls_token" not in weights.state
    assert weights.family.name.startswith("PATH")
    state["pos_embed"] = torch.zeros(1, 289, 64)  # 17x17, or 24x12 and a class token
    assert "cls_token" in recognise(state, parse_spec("a.pth")).state
    assert "cls_token" not in recognise(state, parse_spec("a.pth?stored=272x272")).state


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"layers.0.ln1.weight": torch.ones(8)}, "?semantic=0.2", "semantic means nothing for a Sapiens ViT"),
        ({"storage_tokens": torch.ones(1)}, "?heads=3", "heads means nothing for a DINOv3 ViT; it takes .*entry"),
        ({"register_tokens": torch.ones(1)}, "?resize=2d", "resize means nothing for a DINOv2 ViT with registers"),
        ({"stages.0.blocks.0.norm1.weight": torch.ones(8)}, "?cls=no", "cls means nothing for a Swin"),
        ({"pos_embed": torch.ones(1)}, "?padding=2", "padding means nothing for a plain ViT"),
    ],
)
def test_options_of_another_layout_are_refused(state, options, message):
    with pytest.raises(ConfigError, match=message):
        recognise(state, parse_spec(f"a.pth{options}"))


@pytest.mark.parametrize(
    "state",
    [
        {"storage_tokens": torch.ones(1)},
        {"register_tokens": torch.ones(64)},
        {"blocks.0.mlp.w12.weight": torch.ones(64)},
        {"stages.0.blocks.0.norm1.weight": torch.ones(64)},
        {"layers.0.ln1.weight": torch.ones(64)},
        {**dict.fromkeys(("layers.0.ln1.weight", "pos_embed", "patch_embed.projection.weight"), torch.ones(3))},
        {"pos_embed": torch.ones(3), "patch_embed.proj.weight": torch.ones(3)},
        {"cls_token_pos_embed": torch.ones(1)},
    ],
    ids=lambda state: next(iter(state)),
)
def test_half_a_layout_is_refused_in_one_line(tmp_path, state):
    with pytest.raises(ModelFileError, match=r"half\.safetensors: ") as refused:
        passport(tmp_path / "half.safetensors", state)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("licence", "limits"),
    [
        ("apache-2.0", ""),
        ("cc-by-nc-4.0", "Non-commercial use only."),
        ("fair-noncommercial-research-license", "Non-commercial use only."),
        ("sapiens2-license", "The Sapiens2 licence bars surveillance, biometric identification and re-identification."),
    ],
)
def test_limits_of_licences(licence, limits):
    assert licence_limits(licence) == limits
