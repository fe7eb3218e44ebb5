"""The baselines and recipe attn against numbers of their authors' own code, from images and weights to gradients.

Further sets, or folders of sets, come by DPAL_EDGE_GOLDEN_METHODS.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpal_edge.models.checkpoint import decoder_name, split_dpal
from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION, DynamicPatternDecoder
from dpal_edge.models.encoders import VitEncoder
from dpal_edge.models.layouts import PLAIN
from dpal_edge.models.teacher import Origin, Teachers, make_teacher
from dpal_edge.models.teacher_spec import parse_spec
from dpal_edge.models.vit import VisionTransformer, ViTConfig
from dpal_edge.train.losses import attention_logits, attention_losses
from dpal_edge.train.method import Views
from dpal_edge.train.methods import dpal, proteus, tinymim

VALUES, GRADIENTS = 1e-5, 1e-4  # relative to the largest entry
SHARED = {"proteus": [""], "tinymim": [""], "dpal_attn": ["", "_multires"]}
FOLDERS = [Path(folder) for folder in os.environ.get("DPAL_EDGE_GOLDEN_METHODS", "").split(os.pathsep) if folder]


def golden_sets(method):
    """Folder (a name in the shared data, or a path) and suffix of every set of a method."""
    sets = [(method, suffix) for suffix in SHARED[method]]
    for folder in FOLDERS:
        for path in sorted({*folder.glob("tensors*.safetensors"), *folder.glob("*/tensors*.safetensors")}):
            suffix = path.stem.removeprefix("tensors")
            if json.loads((path.parent / f"config{suffix}.json").read_text())["method"] == method:
                sets.append((path.parent, suffix))
    return sets


@dataclass
class Golden:
    """A set: what it was made of, and how far we are from it."""

    folder: Path
    suffix: str
    record: Any

    def __post_init__(self):
        self.config = json.loads((self.folder / f"config{self.suffix}.json").read_text())
        self.tensors = load_file(self.folder / f"tensors{self.suffix}.safetensors")
        self.student, self.teacher = (load_file(self.folder / f"{who}.safetensors") for who in ("student", "teacher"))

    def __getitem__(self, name):
        return self.tensors[name]

    def deviation(self, name, found):
        expected = self.tensors[name]
        return ((found.detach().reshape(expected.shape) - expected).abs().max() / expected.abs().max()).item()

    def close(self, name, found, tolerance=VALUES):
        """Compare, relative to the largest value; the deviation goes into the report that bench/golden.py reads."""
        deviation = self.deviation(name, found)
        self.record(f"{self.folder.name}{self.suffix}: {name}", deviation)
        assert deviation <= tolerance, (name, deviation)

    def close_gradients(self, method, rename):
        """Compare ``grad.*``, and the norm of every parameter's gradient, after a backward pass of the total."""
        parameters = dict(method.named_parameters())
        norms = json.loads((self.folder / f"grad_norms{self.suffix}.json").read_text())
        names = [name for name in self.tensors if name.startswith("grad.")]
        assert names
        for name in names:
            self.close(name, parameters[rename(name.removeprefix("grad."))].grad, GRADIENTS)
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        assert trained == {rename(name) for name in norms}
        largest = max(norms.values())
        found = {name: parameters[rename(name)].grad.norm().item() for name in norms}
        deviation = max(abs(found[name] - norm) / max(norm, 1e-3 * largest) for name, norm in norms.items())
        self.record(f"{self.folder.name}{self.suffix}: worst norm of a parameter's gradient", deviation)
        assert deviation <= GRADIENTS
        self.close("gradnorm.total", norm_of([parameters[name].grad for name in trained]), GRADIENTS)

    def close_norms(self, method, terms):
        """Compare the norm that the gradient of each term alone has."""
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for name, term in terms.items():
            gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
            self.close(
                f"gradnorm.{name}", norm_of([gradient for gradient in gradients if gradient is not None]), GRADIENTS
            )


@pytest.fixture
def golden(request, shared, record_property):
    folder, suffix = request.param
    return Golden(shared / "golden" / "methods" / folder, suffix, record_property)


def each(method):
    return pytest.mark.parametrize("golden", golden_sets(method), indirect=True, ids="{0[0]}{0[1]}".format)


def norm_of(gradients):
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def build_vit(sizes, size, state, pos_interp):
    config = ViTConfig(
        size=tuple(size),
        width=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        last_heads=sizes.get("heads_last_block", sizes["heads"]),
        mlp_ratio=sizes["mlp_ratio"],
        layer_scale=sizes.get("layer_scale", False),
        pos_interp=pos_interp,
    )
    vit = VisionTransformer(config)
    vit.load_state_dict(state)
    return vit


def build_teachers(vit, size, layer=None):
    origin = Origin(family=PLAIN, sha256="")
    return Teachers([make_teacher(VitEncoder(vit, layer), parse_spec("golden"), origin, size=tuple(size))])


def without(state, prefix, *dropped):
    """The tensors under ``prefix``, without it, but for some."""
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in inner.items() if key not in dropped}


def watch(module):
    """The list of outputs that ``module`` will give, their gradients kept; ``forget`` drops those of single terms."""
    seen = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            seen.append(output)

    module.register_forward_hook(keep)
    return seen


def forget(*lists):
    for output in (output for seen in lists for output in seen):
        output.grad = None


# Proteus


PROTEUS_TERMS = {"token": "token", "feature": "fea", "patch": "patch"}
_PROTEUS_NAMES = {
    "token_head.": "heads.token.",
    "fea_head.": "heads.feature.",
    "patch_head.": "heads.patch.",
    "student.backbone.mask_token": "mask_token",
    "student.backbone.": "backbone.",
}


def proteus_name(key):
    theirs = next(prefix for prefix in _PROTEUS_NAMES if key.startswith(prefix))
    return _PROTEUS_NAMES[theirs] + key.removeprefix(theirs)


def build_proteus(golden):
    config, size = golden.config, golden.config["image"]
    student = without(golden.student, "student.backbone.", "mask_token")
    teacher = without(golden.teacher, "teacher.backbone.", "mask_token")
    weights = {f"{ours}_weight": config[f"lambda_{theirs}"] for ours, theirs in PROTEUS_TERMS.items()}
    method = proteus.Proteus(
        build_vit(config["student"], size, student, "2d"),
        build_teachers(build_vit(config["teacher"], size, teacher, "2d"), size),
        proteus.Options(**weights),
    )
    state = {proteus_name(key): value for key, value in golden.student.items()}
    state["mask_token"] = state["mask_token"][None]
    missing, unexpected = method.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("teachers.") for name in missing)
    return method


def proteus_views(golden):
    """The views with masked images at even places, where our data have them, and the authors' number of each image."""
    masks = golden["masks"]
    masked, plain = masks.any(1).nonzero().flatten().tolist(), (~masks.any(1)).nonzero().flatten().tolist()
    assert len(masked) <= -(-len(masks) // 2)
    order = [masked.pop(0) if (i % 2 == 0 and masked) or not plain else plain.pop(0) for i in range(len(masks))]
    return Views(golden["images"][order], masked=masks[order]), torch.tensor(order)


@torch.no_grad()
@each("proteus")
def test_proteus_tokens(golden):
    method = build_proteus(golden)
    backbone, images, masks = method.backbone, golden["images"], golden["masks"]
    targets = method.targets(Views(images, masked=masks))
    golden.close("teacher.cls", targets["global"])
    golden.close("teacher.patch", targets["local"])
    golden.close("teacher.patch_masked", targets["local"][masks])
    vit = method.teachers.teacher("local").encoder.vit
    golden.close("teacher.x_prenorm", vit.run_blocks(vit.embed(images)))
    clean = backbone.run_blocks(backbone.embed(images))
    hidden = backbone.finish(backbone.run_blocks(backbone.embed(images, masks, method.mask_token)))
    golden.close("student.x_prenorm", clean)
    clean = backbone.finish(clean)
    for view, tokens in (("student", clean), ("student_maskedview", hidden)):
        golden.close(f"{view}.cls", tokens[:, 0])
        golden.close(f"{view}.patch", tokens[:, 1:])
    golden.close("student_maskedview.patch_masked", hidden[:, 1:][masks])
    golden.close("head.token", method.heads["token"](clean[:, 0]))
    golden.close("head.fea", method.heads["feature"](clean[:, 1:]))
    golden.close("head.patch", method.heads["patch"](hidden[:, 1:][masks]))


@each("proteus")
def test_proteus_losses_and_gradients(golden):
    method, (views, order) = build_proteus(golden), proteus_views(golden)
    seen = {name: watch(head) for name, head in method.heads.items()}
    tokens = watch(method.backbone.norm)
    losses = method(views, method.targets(views), 0.0)
    terms = {
        theirs: getattr(method.settings, f"{ours}_weight") * losses[ours] for ours, theirs in PROTEUS_TERMS.items()
    }
    for name, term in {**terms, "total": losses["loss"]}.items():
        golden.close(f"loss.{name}", term)
    golden.close_norms(method, terms)
    forget(tokens, *seen.values())
    losses["loss"].backward()
    golden.close_gradients(method, proteus_name)

    back = order.argsort()  # to the authors' order
    [hidden, clean] = [output.grad for output in tokens]
    golden.close("dtotal.head.token", seen["token"][0].grad[back], GRADIENTS)
    golden.close("dtotal.head.fea", seen["feature"][0].grad[back], GRADIENTS)
    patches = torch.zeros_like(golden["dtotal.student_maskedview.patch"])
    patches[order[::2]] = hidden[:, 1:]
    golden.close("dtotal.student_maskedview.patch", patches, GRADIENTS)
    heads = torch.zeros(*golden["masks"].shape, seen["patch"][0].shape[-1])
    heads[order[::2]] = seen["patch"][0].grad
    golden.close("dtotal.head.patch", heads[golden["masks"]], GRADIENTS)
    golden.close("dtotal.student.cls", clean[back, 0], GRADIENTS)
    golden.close("dtotal.student.patch", clean[back, 1:], GRADIENTS)


@torch.no_grad()
@each("proteus")
def test_proteus_mistakes_are_seen(golden):
    method, (views, _) = build_proteus(golden), proteus_views(golden)
    targets = method.targets(views)
    everywhere = Views(views.base, masked=torch.ones_like(views.masked))
    assert golden.deviation("loss.patch", method(everywhere, targets, 0.0)["patch"]) > 1e-3
    method.heads["token"] = method.heads["feature"]  # which the class row must not go through
    assert golden.deviation("loss.fea", method(views, targets, 0.0)["feature"]) > 1e-3


# TinyMIM


def build_tinymim(golden):
    config, size = golden.config, golden.config["image"]
    teacher = build_vit(config["teacher"], size, golden.teacher, "2d")
    backbone = build_vit(config["student"], size, golden.student, "2d")
    backbone.pos_embed.requires_grad_(config["pos_embed_trained"])
    weights = {f"{name}_weight": weight for name, weight in config["loss_weights"].items()}
    teachers = build_teachers(teacher, size, config["teacher"]["relation_block"])
    return tinymim.TinyMim(backbone, teachers, tinymim.Options(**weights))


def close_attention(golden, names, qkv, heads):
    """Compare ``names`` of a qkv output, its parts and its maps, by the names' kinds."""
    split = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    maps = [logits.softmax(-1) for logits in attention_logits(qkv, heads)]
    for kind, value in zip(("qkv", "q", "k", "v", "qk", "vv"), (qkv, *split, *maps), strict=True):
        if kind in names:
            golden.close(names[kind], value)


@torch.no_grad()
@each("tinymim")
def test_tinymim_maps(golden):
    method, config = build_tinymim(golden), golden.config
    views = Views(golden["images_student"], clean=golden["images_teacher"])
    vit, layer = method.teachers.teacher("relation").encoder.vit, config["teacher"]["relation_block"]
    golden.close("teacher.block_input", vit.run_blocks(vit.embed(views.clean), layer - 1))
    backbone = method.backbone
    last = config["student"]["relation_block"] - 1
    golden.close("student.block_input", backbone.run_blocks(backbone.embed(views.base), last))
    for who, qkv in (("teacher", method.targets(views)["qkv"]), ("student", backbone.qkv(views.base))):
        names = {kind: f"{who}.{kind}" for kind in ("qkv", "q", "k", "v", "qk", "vv")}
        close_attention(golden, names, qkv, method.heads)


@each("tinymim")
def test_tinymim_losses_and_gradients(golden):
    method = build_tinymim(golden)
    views = Views(golden["images_student"], clean=golden["images_teacher"])
    last = method.backbone.blocks[-1]
    qkv, entering = watch(last.attn.qkv), watch(method.backbone.blocks[-2])
    losses = method(views, method.targets(views), 0.0)
    terms = {name: weight * losses[name] for name, weight in golden.config["loss_weights"].items()}
    for name, term in {**terms, "total": losses["loss"]}.items():
        golden.close(f"loss.{name}", term)
    golden.close_norms(method, terms)
    forget(qkv, entering)
    losses["loss"].backward()
    golden.close_gradients(method, "backbone.{}".format)
    golden.close("dtotal.student.qkv", qkv[0].grad, GRADIENTS)
    golden.close("dtotal.student.block_input", entering[0].grad, GRADIENTS)
    untrained = {name for name, p in method.backbone.named_parameters() if not p.requires_grad}
    assert untrained - {"pos_embed"} == set(golden.config["parameters_without_gradient"])


@torch.no_grad()
@each("tinymim")
def test_tinymim_mistakes_are_seen(golden):
    ours, theirs, heads = golden["student.qkv"], golden["teacher.qkv"], golden.config["teacher"]["heads"]
    mistakes = {
        "reversed": attention_losses(theirs, ours, heads),
        "class token left out": attention_losses(ours[:, 1:], theirs[:, 1:], heads),
        "half the heads": attention_losses(ours, theirs, heads // 2),
    }
    for name, found in {**mistakes, "none": attention_losses(ours, theirs, heads)}.items():
        deviations = [golden.deviation(f"loss.{term}", loss) for term, loss in zip(("qk", "vv"), found, strict=True)]
        assert all(d > 1e-3 for d in deviations) if name != "none" else max(deviations) < VALUES, (name, deviations)


# DPAL, recipe attn


DPAL_TERMS = {
    "align_rep": "global",
    "align_patch_x0.1": "local",
    "align_att_x0.1": "relation",
    "moe_raw": "router",
    "experts": "penalty",
}


def build_dpal(golden, **changed):
    config, adapter, size = golden.config, golden.config["adapter"], golden.config["image_base"]
    backbone, decoder = split_dpal(golden.student)
    weights = config["loss_weights"]
    options = {
        "recipe": "attn",
        "mix_divisor": 0,
        "global_weight": weights["align_rep"],
        "local_weight": weights["align_patch"],
        "relation_weight": weights["align_att"],
        "penalty_weight": weights["experts"],
        **changed,
    }
    method = dpal.Dpal(
        build_vit(config["student"], size, backbone, "1d"),
        build_teachers(build_vit(config["teacher"], size, golden.teacher, "2d-dino"), size),
        dpal.Options(**options),
    )
    [width] = method.decoder
    method.decoder[width] = DynamicPatternDecoder(
        config["student"]["width"],
        adapter["out_dim"],
        inner_width=adapter["inter_dim"],
        heads=adapter["heads"],
        mix_divisor=options["mix_divisor"],
    )
    method.decoder[width].load_state_dict(decoder)
    return method


def dpal_views(golden):
    local = [golden[f"images_local{i}"] for i in range(golden.config["n_local"])]
    return Views(golden["images_base"], torch.cat(local), golden["images_crowd"])


def dpal_name(golden, method):
    """What translates the authors' names of parameters that get a gradient."""
    [width], narrowed = method.decoder, golden.config["adapter"]["inter_dim"] is not None

    def rename(key):
        part, _, name = key.partition(".")
        return key if part == "backbone" else f"decoder.{width}.{decoder_name(name, narrowed=narrowed)}"

    return rename


@torch.no_grad()
@each("dpal_attn")
def test_dpal_attn_tokens(golden):
    method, views = build_dpal(golden), dpal_views(golden)
    [decoder] = method.decoder.values()
    logits = []
    decoder.router.register_forward_hook(lambda module, inputs, output: logits.append(output))
    targets = method.targets(views)
    golden.close("teacher.cls.base", targets["global"])
    tokens = {}
    for kind, images, prefix in (("base", views.base, ""), ("crowd", views.crowd, "crowd_")):
        golden.close(f"teacher.patch.{kind}", targets[f"{prefix}local"])
        tokens[kind], qkv = method.backbone.attend(images)
        for who, found in (("teacher", targets[f"{prefix}qkv"]), ("student", qkv)):
            close_attention(golden, {name: f"{who}.{name}.{kind}" for name in ("qkv", "qk", "vv")}, found, method.heads)
    for i, crops in enumerate(views.local.chunk(golden.config["n_local"])):
        tokens[f"local{i}"] = method.backbone(crops)
    for kind, found in tokens.items():
        golden.close(f"student.tokens.{kind}", found)
        parts = {f"cls.{kind}": (found[:, :1], GLOBAL)} if kind != "crowd" else {}
        if not kind.startswith("local"):
            parts[f"patch.{kind}"] = (found[:, 1:], LOCAL if kind == "base" else RELATION)
        for call, (part, expert) in parts.items():
            decoded = decoder(part, expert)
            golden.close(f"adapter.{call}", decoded.tokens)
            golden.close(f"gate_ce.{call}", decoded.terms["router"])
            golden.close(f"gate_scores.{call}", logits[-1].softmax(-1))


@each("dpal_attn")
def test_dpal_attn_losses_and_gradients(golden):
    method, views = build_dpal(golden), dpal_views(golden)
    [decoder] = method.decoder.values()
    tokens, qkv = watch(method.backbone.norm), watch(method.backbone.blocks[-1].attn.qkv)
    adapted = watch(decoder.out_norm)
    targets = method.targets(views)
    with torch.no_grad():
        golden.close("loss.total_epoch20", method(views, targets, 0.5)["loss"])
    losses = method(views, targets, 0.0)
    settings = method.settings
    weights = {"global": settings.global_weight, "local": settings.local_weight, "relation": settings.relation_weight}
    terms = {theirs: weights.get(ours, 1.0) * losses[ours] for theirs, ours in DPAL_TERMS.items()}
    for name, term in {**terms, "total": losses["loss"]}.items():
        golden.close(f"loss.{name}", term)
    golden.close_norms(method, terms)
    forget(tokens, qkv, adapted)
    losses["loss"].backward()
    golden.close_gradients(method, dpal_name(golden, method))

    crops = golden.config["n_local"]
    base, crowd, local = (output.grad for output in tokens)
    classes, patches, many = (output.grad for output in adapted)
    views = {"base": base, "crowd": crowd, **{f"local{i}": part for i, part in enumerate(local.chunk(crops))}}
    for name, gradient in views.items():
        golden.close(f"dtotal.student.tokens.{name}", gradient, GRADIENTS)
    names = ["base", *(f"local{i}" for i in range(crops))]
    for name, gradient in zip(names, classes.chunk(1 + crops), strict=True):
        golden.close(f"dtotal.adapter.cls.{name}", gradient, GRADIENTS)
    golden.close("dtotal.adapter.patch.base", patches, GRADIENTS)
    golden.close("dtotal.adapter.patch.crowd", many, GRADIENTS)
    # Of each view the qkv layer runs twice, for the tokens and for the maps; the authors' runs once for both.
    for i, name in enumerate(("base", "crowd")):
        golden.close(f"dtotal.student.qkv.{name}", qkv[2 * i].grad + qkv[2 * i + 1].grad, GRADIENTS)


@torch.no_grad()
@each("dpal_attn")
def test_dpal_attn_mistakes_are_seen(golden):
    method, views = build_dpal(golden), dpal_views(golden)
    targets = method.targets(views)
    for divisor in (256, len(views.base) + len(views.local)):  # of later code; of all class-token calls taken as one
        losses = build_dpal(golden, mix_divisor=divisor)(views, targets, 0.0)
        assert golden.deviation("loss.experts", losses["penalty"]) > 0.1
    others = Views(views.base, views.local.roll(1, 0), views.crowd)  # crops of other images
    found = method(others, targets, 0.0)["global"] * method.settings.global_weight
    assert golden.deviation("loss.align_rep", found) > 10 * VALUES
    ours, theirs = ([golden[f"{who}.qkv.{kind}"] for kind in ("base", "crowd")] for who in ("student", "teacher"))
    pairs = zip(theirs, ours, strict=True)  # the divergence reversed
    found = sum(sum(attention_losses(*pair, method.heads)) for pair in pairs) / 2 * method.settings.relation_weight
    assert golden.deviation("loss.align_att_x0.1", found) > 1e-3
