"""Teachers against tokens of their authors' own code (shared data; further sets by DPAL_EDGE_GOLDEN_TEACHERS)."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpal_edge.models.teacher import load_teacher
from dpal_edge.models.teacher_spec import NORMS
from dpal_edge.models.vit import normalize

ROOTS = [Path(root) for root in os.environ.get("DPAL_EDGE_GOLDEN_TEACHERS", "").split(os.pathsep) if root]
FURTHER = [path.parent for root in ROOTS for path in sorted((*root.glob("config.json"), *root.glob("*/config.json")))]
FAMILIES = {
    "path_vit": "PATH / HumanBench ViT",
    "sapiens_vit": "Sapiens v1 ViT",
    "solider_swin": "SOLIDER Swin",
    "dpal_swin_student": "DPAL Swin student",
}
TOLERANCE = 1e-5  # the largest gap to any value

PATH_WITH = ("raw_with_cls.pth.tar", "converted_with_cls.pth", "flat_backbone.pth")
PATH_WITHOUT = ("raw_without_cls.pth.tar", "converted_without_cls.pth")
PRETRAINED = ("pretrain_clean.pth", "pretrain_full.pth")


@pytest.fixture(params=[None, *FURTHER], ids=str)
def golden(request, record_property):
    """Open a set; ``close`` compares with its tensors and notes the deviation in the JUnit report."""

    def open_set(name):
        folder = request.param or request.getfixturevalue("shared") / "golden" / "teachers" / name
        config = json.loads((folder / "config.json").read_text())
        if config["family"] != FAMILIES[name]:
            pytest.skip(f"{folder} is a set of {config['family']}")
        tensors = load_file(folder / "tensors.safetensors")

        def close(key, found):
            deviation = (found - tensors[key]).abs().max().item()
            record_property(f"{folder.name}: {key}", deviation)
            assert deviation <= TOLERANCE, (key, deviation)

        return SimpleNamespace(folder=folder, t=tensors, close=close, config=config, shared=request.param is None)

    return open_set


def sizes(golden, prefix):
    """Image sizes that the set has final tokens for under ``prefix``."""
    found = {key.split(".")[1] for key in golden.t if key.startswith(prefix) and key.split(".")[1][0].isdigit()}
    assert found
    return sorted(found)


def images(golden, size):
    """Images as the training loop passes them, made from the pixels of the set's input."""
    return normalize(golden.t[f"input.{size}.uint8"])


def load_vit(golden, file, *options, stored="img_size"):
    """Load a ViT of a set; its heads are told, and the size of its positions where it may be an unusual one."""
    network = golden.config["network"]
    options = (f"heads={network['num_heads']}", *options)
    if not golden.shared:
        options = (*options, "stored={}x{}".format(*network[stored]))
    return load_teacher(f"{golden.folder / file}?{'&'.join(options)}", student_patch=network["patch_size"])


def check_vit(golden, teacher, prefix, size):
    """Compare the contract's tokens, and those before the final norm, with the set's; return the former."""
    tokens, seen = teacher(images(golden, size)), golden.t[f"input.{size}"]
    network, depth, patch = teacher.encoder.network, teacher.passport.depth, teacher.passport.patch_size
    first = 0 if network.config.class_token else 1  # without a class token the set has patches alone
    golden.close(f"{prefix}.{size}.after_final_norm", tokens[:, first:])
    golden.close(f"{prefix}.{size}.after_block_depth", network.run_blocks(network.embed(seen)))
    golden.close(f"{prefix}.{size}.after_block_depth_minus_1", network.run_blocks(network.embed(seen), depth - 1))
    before_last = load_teacher(teacher.passport.spec, layer=depth - 1, student_patch=patch)
    expected = network.norm(golden.t[f"{prefix}.{size}.after_block_depth_minus_1"])
    assert (before_last(images(golden, size))[:, first:] - expected).abs().max() <= TOLERANCE
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("file", PATH_WITH)
@pytest.mark.parametrize(("prefix", "resize"), [("with_cls", "2d"), ("dpal_expert", "2d-dino")])
def test_path_with_a_class_token(golden, file, prefix, resize):
    g = golden("path_vit")
    teacher = load_vit(g, file, f"resize={resize}")
    network = teacher.encoder.network
    for size in sizes(g, f"{prefix}."):
        check_vit(g, teacher, prefix, size)
        middle = [key for key in g.t if key.startswith(f"{prefix}.{size}.authors_mid_features.")]
        assert len(middle) == (teacher.passport.depth if prefix == "with_cls" else 0)
        for key in middle:
            g.close(key, network.run_blocks(network.embed(g.t[f"input.{size}"]), int(key.rpartition(".")[2])))
    assert teacher.passport.global_target == "cls"


@torch.no_grad()
@pytest.mark.parametrize("file", PATH_WITHOUT)
def test_path_without_a_class_token(golden, file):
    g = golden("path_vit")
    teacher = load_vit(g, file, "resize=2d")
    for size in sizes(g, "without_cls."):
        tokens = check_vit(g, teacher, "without_cls", size)
        torch.testing.assert_close(tokens[:, 0], g.t[f"without_cls.{size}.after_final_norm"].mean(1))
    assert teacher.passport.global_target == "mean"


def test_layouts_of_path(golden):
    g = golden("path_vit")
    passports = {file: load_vit(g, file).passport for file in (*PATH_WITH, *PATH_WITHOUT)}
    told = {file for file, passport in passports.items() if passport.licence == "code MIT, weights openrail"}
    assert told == {*passports} - {"converted_with_cls.pth"}  # which looks like any ViT of timm's
    assert all(f"layer={passport.depth - 1}" in passport.note for passport in passports.values())
    assert {passport.entry for passport in passports.values()} == {"state_dict", "model", ""}
    assert {passport.keys_matched for passport in passports.values()} == {1.0}


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "prefix", "options"),
    [
        *((file, "pretrain", ()) for file in PRETRAINED),
        *((file, "pad2_cls", ("padding=2",)) for file in PRETRAINED),
        *((file, "pad2_nocls", ("padding=2", "cls=no")) for file in PRETRAINED),
        ("downstream_pose.pth", "pad2_nocls", ()),
    ],
)
def test_sapiens(golden, file, prefix, options):
    g = golden("sapiens_vit")
    stored = "downstream_img_size" if file.startswith("downstream") else "pretrain_img_size"
    teacher = load_vit(g, file, *options, stored=stored)
    mean = load_vit(g, file, *options, "global=mean", stored=stored)
    for size in sizes(g, f"{prefix}."):
        tokens = check_vit(g, teacher, prefix, size)
        featmap = g.t[f"{prefix}.{size}.featmap"]
        g.close(f"{prefix}.{size}.featmap", tokens[:, 1:].mT.reshape(featmap.shape))
        g.close(f"{prefix}.{size}.patch_mean", mean(images(g, size))[:, 0])
        if prefix != "pad2_nocls":
            g.close(f"{prefix}.{size}.cls", tokens[:, 0])
    passport = teacher.passport
    assert (passport.mean, passport.std) == NORMS["sapiens"]
    assert [255 * value for value in passport.mean] == pytest.approx(g.config["pixel_mean"])
    assert [255 * value for value in passport.std] == pytest.approx(g.config["pixel_std"])
    assert (passport.licence, passport.limits) == ("cc-by-nc-4.0", "Non-commercial use only.")


def check_swin(golden, teacher, name):
    """Compare pooled vector and final map; through the contract where the map is on the student's grid."""
    size = name.split(".")[1]
    seen, expected = images(golden, size), golden.t[f"{name}.map4"]
    tokens = teacher.encoder(seen)
    golden.close(f"{name}.map4", tokens[:, 1:].mT.reshape(expected.shape))
    golden.close(f"{name}.pooled", tokens[:, 0])
    assert (seen - golden.t[f"input.{size}"]).abs().max() < TOLERANCE
    if not any(side % 32 for side in seen.shape[-2:]):
        assert torch.equal(teacher(seen), tokens)


def maps(golden, prefix):
    """Names of what the set has a final map of, under ``prefix``."""
    found = [key.removesuffix(".map4") for key in golden.t if key.startswith(prefix) and key.endswith(".map4")]
    assert found
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "entry"),
    [("checkpoint.pth", "teacher"), ("checkpoint.pth?entry=student", "student"), ("checkpoint_tea.pth", "teacher")],
)
def test_solider(golden, file, entry):
    g = golden("solider_swin")
    joint = "&" if "?" in file else "?"
    for name in maps(g, f"{entry}."):
        weight = name.split(".", 2)[2]  # as in w0.2
        option = "none" if weight == "no_modulation" else weight.removeprefix("w")
        teacher = load_teacher(f"{g.folder / file}{joint}semantic={option}", student_patch=32)
        check_swin(g, teacher, name)
        assert teacher.passport.semantic_weight == (None if option == "none" else float(option))
    passport = load_teacher(str(g.folder / file)).passport
    assert (passport.semantic_weight, passport.licence) == (0.2, "apache-2.0")
    assert passport.entry == ("" if file == "checkpoint_tea.pth" else entry)


@torch.no_grad()
def test_solider_before_the_last_block(golden):
    g = golden("solider_swin")
    depths = g.config["network"]["depths"]
    ending = f".stage4.block{depths[-1] - 2}_tokens"
    for key in (key for key in g.t if key.endswith(ending)):
        entry, size, weight = key.removesuffix(ending).split(".", 2)
        spec = f"{g.folder / 'checkpoint.pth'}?entry={entry}&semantic={weight[1:]}&layer={sum(depths) - 1}"
        encoder = load_teacher(spec).encoder
        expected = encoder.network.norm(g.t[key])
        assert (encoder(images(g, size))[:, 1:] - expected).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("student_checkpoint.pth", "student."),
        ("student_checkpoint.pth?entry=teacher", "ema."),
        ("backbone_only.pth", "student."),
    ],
)
def test_dpal_swin_student(golden, file, prefix):
    g = golden("dpal_swin_student")
    teacher = load_teacher(str(g.folder / file), student_patch=32)
    for name in maps(g, prefix):
        check_swin(g, teacher, name)
        if prefix == "student.":
            size = name.split(".")[1]
            g.close(f"{name}.tokens_with_pooled_first", teacher.encoder(images(g, size)))
    assert teacher.passport.semantic_weight is None
