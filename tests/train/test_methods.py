"""Every method on tiny models: what it is built of, what its targets and losses are, what it refuses."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dpal_edge.errors import ConfigError
from dpal_edge.models.decoder import StaticDecoder
from dpal_edge.models.encoders import VitEncoder
from dpal_edge.models.layouts import PLAIN
from dpal_edge.models.students import STUDENTS
from dpal_edge.models.swin import SwinConfig
from dpal_edge.models.teacher import Origin, Teachers, make_teacher
from dpal_edge.models.teacher_spec import parse_spec
from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student
from dpal_edge.train.config import build_config
from dpal_edge.train.method import Views
from dpal_edge.train.methods import METHODS, dpal, find_method, proteus, tinymim

SIZE, LOCAL, CROWD = (64, 32), (32, 32), (64, 96)
TINY = {
    "vit_tiny": ViTConfig(width=48, depth=2),
    "swin_tiny": SwinConfig(width=96, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), window=2),
}


@pytest.fixture(autouse=True)
def _tiny_students(monkeypatch):
    for name, config in TINY.items():
        monkeypatch.setitem(STUDENTS, name, config)


def make_vit(*, width=24, heads=12, seed=0, **fields):
    config = ViTConfig(size=SIZE, width=width, depth=2, heads=heads, last_heads=heads, **fields)
    vit = VisionTransformer(config)
    init_student(vit, torch.Generator().manual_seed(seed))
    return vit


def make_teachers(*vits, roles=("",), layer=None):
    """Teachers that play ``roles``, such as global,local; an empty string is all of them."""
    specs = [f"tiny?for={names}" if names else "tiny" for names in roles]
    origin = Origin(family=PLAIN, sha256="")
    pairs = zip(vits, specs, strict=True)
    return Teachers([make_teacher(VitEncoder(vit, layer), parse_spec(spec), origin, size=SIZE) for vit, spec in pairs])


def build(method="dpal", teachers=None, **settings):
    config = build_config({"method": method, "size": SIZE, "local_size": LOCAL, "crowd_size": CROWD, **settings})
    return find_method(method).build(config, teachers or make_teachers(make_vit()))


def make_views(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def images(count, size):
        return torch.randn(count, 3, *size, generator=generator)

    masked = torch.zeros(batch, 8, dtype=torch.bool)
    masked[::2, :4] = True
    return Views(
        base=images(batch, SIZE),
        local=images(2 * batch, LOCAL),
        crowd=images(batch, CROWD),
        clean=images(batch, SIZE),
        masked=masked,
    )


def run(method, views=None, progress=0.0):
    views = views or make_views()
    return method(views, method.targets(views), progress)


def two_teachers():
    return make_teachers(make_vit(), make_vit(width=36, seed=1), roles=("global,relation", "local"))


ALIGNED = {"global", "local", "relation"}
ROUTED = {"router", "penalty", "usage/global", "usage/local", "usage/relation"}
VARIANTS = {
    "paper": ({}, ALIGNED | ROUTED),
    "published": ({"mask": "published", "relation": "softmax", "query_init": "zeros"}, ALIGNED | ROUTED),
    "unmasked": ({"mask": "none"}, ALIGNED | ROUTED),
    "narrow": ({"inner_width": 96, "mix_divisor": 0}, ALIGNED | ROUTED),
    "chunked": ({"decoder_chunk": 1}, ALIGNED | ROUTED),
    "oracle": ({"router": "oracle"}, ALIGNED | {"penalty"}),
    "static": ({"decoder": "static"}, ALIGNED),
    "shared": ({"decoder": "shared"}, ALIGNED),
    "attn": ({"recipe": "attn"}, ALIGNED | ROUTED),
    "attn static": ({"recipe": "attn", "decoder": "static"}, ALIGNED),
    "two teachers": ({"teachers": two_teachers}, ALIGNED | ROUTED),
    "two teachers, oracle": ({"teachers": two_teachers, "router": "oracle"}, ALIGNED | {"penalty"}),
    "two teachers, static": ({"teachers": two_teachers, "decoder": "static"}, ALIGNED),
    "two teachers, attn": ({"teachers": two_teachers, "recipe": "attn"}, ALIGNED | ROUTED),
    "swin": ({"student": "swin_tiny"}, ALIGNED | ROUTED),
    "swin attn": ({"student": "swin_tiny", "recipe": "attn"}, ALIGNED - {"relation"} | ROUTED),
    "proteus": ({"method": "proteus"}, {"token", "feature", "patch"}),
    "proteus, two teachers": ({"method": "proteus", "teachers": two_teachers}, {"token", "feature", "patch"}),
    "tinymim": ({"method": "tinymim"}, {"qk", "vv"}),
    "tinymim, sincos": ({"method": "tinymim", "positions": "sincos"}, {"qk", "vv"}),
}


def build_variant(name):
    settings = {**VARIANTS[name][0]}
    return build(teachers=settings.pop("teachers", make_teachers)() if "teachers" in settings else None, **settings)


def test_there_is_a_variant_of_every_method():
    assert {settings.get("method", "dpal") for settings, _ in VARIANTS.values()} == set(METHODS)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_all_that_trains_and_nothing_else(name):
    method = build_variant(name)
    losses = run(method.train())
    assert losses.keys() == {"loss"} | VARIANTS[name][1]
    assert all(value.ndim <= 1 and value.dtype == torch.float32 and value.isfinite().all() for value in losses.values())
    losses["loss"].backward()
    for key, parameter in method.named_parameters():  # else data-parallel training would wait for a gradient
        assert (parameter.grad is not None) == parameter.requires_grad, key
    assert not [key for key, p in method.named_parameters() if key.startswith("teachers.") and p.requires_grad]
    assert {key.partition(".")[0] for key in method.student_state()} <= {
        "backbone", "decoder", "mask", "heads", "mask_token"
    }  # fmt: skip
    assert method.spared_from_decay() - {"backbone.pos_embed", "backbone.cls_token"} <= {
        key for key, _ in method.named_parameters()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_targets_are_a_function_of_each_image(name):
    method, views = build_variant(name), make_views(4)
    targets = method.targets(views)
    half = method.targets(Views(views.base[2:], crowd=views.crowd[2:], clean=views.clean[2:]))
    assert targets.keys() == half.keys()
    for key, value in targets.items():
        assert len(value) == 4
        assert not value.requires_grad
        torch.testing.assert_close(value[2:], half[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "published"])  # eigh tells the host if it failed
def test_nothing_waits_for_the_device(name):
    method, views = build_variant(name).train(), make_views()
    targets = method.targets(views)
    state = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    with FakeTensorMode() as mode:  # tensors without values: whatever asks for one raises
        fake, fake_views, fake_targets = pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, (state, dict(vars(views)), targets)
        )
        losses = torch.func.functional_call(method, fake, (Views(**fake_views), fake_targets, 0.0))
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            losses["loss"].item()


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_changes_little_and_losses_stay_float32(name):
    method, views = build_variant(name).eval(), make_views()
    targets = method.targets(views)
    expected = method(views, targets, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(views, targets, 0.0)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.03)


@pytest.mark.parametrize("name", ["paper", "swin", "static", "proteus", "tinymim"])
def test_the_seed_decides_the_initial_weights(name):
    settings = VARIANTS[name][0]
    one, same, other = (build(seed=seed, **settings).student_state() for seed in (3, 3, 4))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["backbone.patch_embed.proj.weight"], other["backbone.patch_embed.proj.weight"])
    if name != "tinymim":
        beside = [key for key in one if key.endswith(("expert.weight", "maps.local.1.weight", "heads.patch.1.weight"))]
        assert beside
        assert not any(torch.equal(one[key], other[key]) for key in beside)


def test_every_method_starts_from_the_same_student():
    states = [build(name).backbone.state_dict() for name in METHODS]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())


# DPAL


@pytest.mark.parametrize(("recipe", "weight"), [("paper", 1.0), ("attn", 0.1)])
@torch.no_grad()
def test_total_is_the_weighted_sum(recipe, weight):
    losses = run(build(recipe=recipe))
    plain = losses["global"] + weight * (losses["local"] + losses["relation"]) + losses["penalty"]
    torch.testing.assert_close(losses["loss"], plain + 0.1 * losses["router"])
    late = run(build(recipe=recipe), progress=0.1)
    torch.testing.assert_close(late["loss"], plain + 0.01 * losses["router"])
    given = {
        "global_weight": 2.0,
        "local_weight": 3.0,
        "relation_weight": 5.0,
        "router_weight": 7.0,
        "penalty_weight": 0.0,
    }
    found = run(build(recipe=recipe, **given))
    terms = zip(("global", "local", "relation", "router"), (2, 3, 5, 7), strict=True)
    torch.testing.assert_close(found["loss"], sum(factor * found[name] for name, factor in terms))


@torch.no_grad()
def test_class_token_calls_of_all_views_count_alike():
    method, views = build(decoder="static"), make_views()
    targets, [decoder] = method.targets(views), method.decoder.values()
    crops = views.local.chunk(2)
    decoded = [decoder(method.backbone(images)[:, :1], 0).tokens for images in (views.base, *crops)]
    expected = sum((tokens - targets["global"]).square().mean() for tokens in decoded) / 3
    torch.testing.assert_close(method(views, targets, 0.0)["global"], expected)


@torch.no_grad()
def test_decoder_chunk_changes_no_loss():
    views = make_views(5)
    for settings in ({}, {"mix_divisor": 0}, {"recipe": "attn"}):
        expected, found = run(build(**settings), views), run(build(decoder_chunk=2, **settings), views)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_recipe_attn_masks_nothing_and_runs_a_teacher_once_per_view():
    method, views = build(recipe="attn"), make_views()
    assert method.mask is None
    calls = []
    vit = method.teachers.teacher("relation").encoder.vit
    vit.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    targets = method.targets(views)
    assert calls == [1 + 8, 1 + 24]  # tokens of base and crowd
    assert {name: tuple(value.shape) for name, value in targets.items()} == {
        "global": (2, 1, 24),
        "local": (2, 8, 24),
        "qkv": (2, 9, 72),
        "crowd_local": (2, 24, 24),
        "crowd_qkv": (2, 25, 72),
    }


@torch.no_grad()
def test_attention_of_a_student_that_is_its_teacher_agrees():
    student = build(recipe="attn").backbone
    losses = run(dpal.Dpal(student, make_teachers(copy.deepcopy(student)), dpal.Options(recipe="attn")))
    assert abs(losses["relation"].item()) < 1e-5
    assert losses["local"] > 0.01
    swapped = run(dpal.Dpal(student, make_teachers(make_vit(width=48, seed=1)), dpal.Options(recipe="attn")))
    assert swapped["relation"] > 1e-3


def test_teachers_of_several_widths_have_a_decoder_each():
    paper = build(teachers=two_teachers())
    assert paper.decoder.keys() == {"24", "36"}
    assert {name: value.shape[-1] for name, value in paper.targets(make_views()).items()} == {
        "global": 24,
        "local": 36,
        "relation": 24,
    }
    static = build(teachers=two_teachers(), decoder="static")
    assert {width: set(decoder.maps) for width, decoder in static.decoder.items()} == {
        "24": {"global", "relation"},
        "36": {"local"},
    }
    attn = build(teachers=two_teachers(), recipe="attn", decoder="static")  # crowd patches follow the local teacher's
    assert {width: set(decoder.maps) for width, decoder in attn.decoder.items()} == {
        "24": {"global"},
        "36": {"local", "relation"},
    }
    assert isinstance(attn.decoder["36"], StaticDecoder)


@torch.no_grad()
def test_swin_patches_come_to_the_grid_of_the_teacher():
    method = build(student="swin_tiny")
    assert method.decoder["24"].narrow.out_features == 192
    images = torch.zeros(1, 3, 64, 96)  # 2 x 3 patches of 32 pixels, 4 x 6 of 16
    rows = torch.arange(2.0).repeat_interleave(3).view(1, 6, 1)
    found = method._cut(rows, images, 16).view(4, 6)
    torch.testing.assert_close(found, found[:, :1].expand(-1, 6))
    assert (found[:, 0].diff() > 0).all()  # row after row, as the patches are
    assert found.mean().item() == pytest.approx(0.5)
    vit = build()
    assert vit._cut(rows, torch.zeros(1, 3, 32, 48), 16) is rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_width": 100}, "inner_width is 100, expected a multiple of 48"),
        ({"decoder_chunk": 0}, "decoder_chunk is 0, expected more than 0"),
        ({"mix_divisor": -1}, "mix_divisor is -1, expected 0 or more"),
        ({"local_weight": -1}, "local_weight is -1.0, expected 0 or more"),
        ({"relation_temperature": 0}, "relation_temperature is 0.0, expected more than 0"),
        ({"router_warmup": 2}, "router_warmup is 2.0, expected 0 to 1"),
        ({"recipe": "new"}, "recipe is 'new', expected one of paper, attn"),
        ({"decoder": "shared", "router": "oracle"}, "router is 'oracle', but decoder 'shared' has no use for it"),
        ({"decoder": "static", "inner_width": 96}, "inner_width is 96, but decoder 'static' has no use for it"),
        ({"method": "proteus", "patch_weight": -1}, "patch_weight is -1.0, expected 0 or more"),
        ({"method": "tinymim", "vv_weight": -1}, "vv_weight is -1.0, expected 0 or more"),
        ({"method": "tinymim", "positions": "none"}, "positions is 'none', expected one of learned, sincos"),
        ({"method": "proteus", "student": "swin_tiny"}, "method proteus hides patches of a ViT"),
        ({"method": "tinymim", "student": "swin_tiny"}, "method tinymim aligns the attention maps of a ViT"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(**settings)


@pytest.mark.parametrize("settings", [{"recipe": "attn"}, {"method": "tinymim"}])
def test_heads_that_cannot_be_paired_are_refused(settings):
    message = r"the student's last block has 12 heads and teacher tiny has 6; give --set heads=6\+6, or take a teacher"
    with pytest.raises(ConfigError, match=message):
        build(teachers=make_teachers(make_vit(heads=6)), **settings)
    with pytest.raises(ConfigError, match=r"has 3 heads and teacher tiny has 12; give --set heads=6\+12"):
        build(heads="3", **settings)
    without = make_teachers(make_vit())
    without.teacher("relation").encoder.heads = None
    with pytest.raises(ConfigError, match="teacher tiny has no attention maps over all its tokens"):
        build(teachers=without, **settings)


# Baselines


@torch.no_grad()
def test_proteus_patch_loss_is_the_mean_over_masked_patches():
    method, views = build("proteus"), make_views(3)
    views.masked[0] = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1])  # another number than in image 2
    torch.nn.init.normal_(method.mask_token)
    targets = method.targets(views)
    hidden = method.backbone.finish(
        method.backbone.run_blocks(method.backbone.embed(views.base, views.masked, method.mask_token))
    )[:, 1:]
    gaps = method.heads["patch"](hidden[views.masked]) - targets["local"][views.masked]
    losses = method(views, targets, 0.0)
    torch.testing.assert_close(losses["patch"], gaps.square().mean())
    views.masked[1] = True  # an odd image, which has no masked view
    torch.testing.assert_close(method(views, targets, 0.0)["patch"], losses["patch"])
    views.masked[:] = False
    assert method(views, targets, 0.0)["patch"] == 0


@torch.no_grad()
def test_proteus_class_token_counts_among_the_features_through_its_own_head():
    method, views = build("proteus"), make_views()
    targets, tokens = method.targets(views), method.backbone(views.base)
    decoded = torch.cat([method.heads["token"](tokens[:, :1]), method.heads["feature"](tokens[:, 1:])], dim=1)
    wanted = torch.cat([targets["global"], targets["local"]], dim=1)
    losses = method(views, targets, 0.0)
    torch.testing.assert_close(losses["feature"], (decoded - wanted).square().mean())
    torch.testing.assert_close(losses["loss"], losses["token"] + losses["feature"] + losses["patch"])


@torch.no_grad()
def test_proteus_student_that_is_its_teacher_has_no_gap_but_where_patches_are_hidden():
    student = build("proteus").backbone
    method = proteus.Proteus(student, make_teachers(copy.deepcopy(student)), proteus.Options())
    for head in method.heads.values():
        head[1].weight.copy_(torch.eye(48))
        head[1].bias.zero_()
    losses = run(method)
    assert max(losses["token"], losses["feature"]) < 1e-8  # the heads' norms repeat the final norm
    assert losses["patch"] > 0.1


@torch.no_grad()
def test_tinymim_student_that_is_its_teacher_agrees_on_the_same_view():
    student = build("tinymim").backbone
    method, views = tinymim.TinyMim(student, make_teachers(copy.deepcopy(student)), tinymim.Options()), make_views()
    assert run(method, views)["loss"] > 1e-3  # other colours
    same = Views(views.base, clean=views.base)
    assert abs(run(method, same)["loss"].item()) < 1e-5


def test_tinymim_trains_up_to_the_last_qkv():
    method = build("tinymim")
    frozen = {name for name, p in method.backbone.named_parameters() if not p.requires_grad}
    kinds = ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    last = {f"blocks.1.{kind}.{what}" for kind in kinds for what in ("weight", "bias")}
    assert frozen == last | {"norm.weight", "norm.bias"}


@torch.no_grad()
def test_tinymim_follows_the_layer_of_the_teacher():
    views = make_views()
    first, last = (build("tinymim", make_teachers(make_vit(), layer=layer)).targets(views)["qkv"] for layer in (1, 2))
    assert (first - last).abs().mean() > 0.01
    torch.testing.assert_close(make_vit().qkv(views.clean, 1), first)


@torch.no_grad()
def test_tinymim_teacher_without_class_token_pairs_patches_alone():
    method, views = build("tinymim", make_teachers(make_vit(class_token=False))), make_views()
    assert method.targets(views)["qkv"].shape == (2, 8, 72)
    assert run(method, views)["loss"] > 0


def test_sincos_positions_by_hand():
    table = tinymim.sincos_positions(8, (3, 2))
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()
    row, column = 2.0, 1.0
    angles = torch.tensor([column, column / 100, row, row / 100])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[0, 1 + 2 * 2 + 1], expected)


def test_sincos_positions_are_fixed():
    method = build("tinymim", positions="sincos")
    torch.testing.assert_close(method.backbone.pos_embed.detach(), tinymim.sincos_positions(48, (4, 2)))
    assert not method.backbone.pos_embed.requires_grad
    assert build("tinymim").backbone.pos_embed.requires_grad
