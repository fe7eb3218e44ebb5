"""The method against numbers of the authors' own code (shared data; further folders by DPAL_EDGE_GOLDEN)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpal_edge.models.checkpoint import (
    decoder_name,
    flatten_published,
    infer_vit,
    load_backbone,
    load_matching,
    read_tensors,
    split_dpal,
)
from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION, DynamicPatternDecoder
from dpal_edge.models.teacher import load_teacher
from dpal_edge.train.config import build_config
from dpal_edge.train.dpal import Dpal, Images
from dpal_edge.train.losses import ShapeMask, relations

EXTRA = [Path(folder) for folder in os.environ.get("DPAL_EDGE_GOLDEN", "").split(":") if folder]
VALUES, GRADIENTS, MASK = 1e-5, 1e-4, 1e-3  # relative tolerances


@pytest.fixture(params=["dpal", "dpal_inter_dim", *EXTRA], ids=str)
def golden(request):
    """Folder, configuration and tensors of one golden set."""
    folder = request.param
    if isinstance(folder, str):
        folder = request.getfixturevalue("shared") / "golden" / folder
    return folder, json.loads((folder / "config.json").read_text()), load_file(folder / "tensors.safetensors")


@pytest.fixture
def method(golden):
    """The published method, with all weights from the golden checkpoints."""
    folder, config, _ = golden
    student, teacher = config["student"], config["teacher"]
    settings = build_config({"mask": "published", "relation": "softmax", "inner_width": student.get("inter_dim")})
    backbone, _ = load_backbone(
        folder / "student_checkpoint.pth",
        heads=student["num_heads"],
        last_heads=student["num_heads_in_last_block"],
    )
    decoder = DynamicPatternDecoder(
        student["embed_dim"],
        student["out_dim"],
        inner_width=settings.inner_width,
        heads=student["align_num_heads"],
    )
    state = split_dpal(flatten_published(read_tensors(folder / "student_checkpoint.pth")))[1]
    load_matching(decoder, state, folder, least=1.0)
    loaded = load_teacher(
        str(folder / "teacher_checkpoint.pth"), heads=teacher["num_heads"], size=tuple(teacher["img_size"])
    )
    return Dpal(backbone, decoder, loaded, settings)


def close(found, expected, tolerance=VALUES):
    """Compare relative to the largest expected value; print the deviation, for the record."""
    deviation = ((found - expected).abs().max() / expected.abs().max()).item()
    assert deviation <= tolerance, deviation


@torch.no_grad()
def test_tokens(golden, method):
    t = golden[2]
    close(method.teacher(t["input.base"]), t["teacher.tokens"])
    close(method.teacher(t["input.crowd"]), t["teacher.crowd_tokens"])
    close(method.backbone(t["input.base"]), t["student.tokens"])
    close(method.backbone(t["input.region0"]), t["student.region0_tokens_pos1d"])
    close(method.backbone(t["input.crowd"]), t["student.crowd_tokens_pos1d"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "expert"), [("global", GLOBAL), ("local", LOCAL), ("relation", RELATION)])
def test_decoder(golden, method, name, expert):
    t = golden[2]
    decoded = method.decoder(t[f"dpade.{name}.input"], expert)
    close(decoded.tokens, t[f"dpade.{name}.output"])
    close(decoded.router_loss, t[f"dpade.{name}.router_loss"])
    close(decoded.penalty, t[f"dpade.{name}.expert_penalty"])


@torch.no_grad()
def test_shape_mask_and_relations(golden):
    t = golden[2]
    patches, expected = t["teacher.tokens"][:, 1:], t["teacher.shape_mask"]
    rows, columns = (side // 16 for side in t["input.base"].shape[-2:])
    mask = ShapeMask(patches.shape[-1], published=True)(patches, (rows, columns))
    assert min((mask - sign).abs().max().item() for sign in (expected, 1 - expected)) <= MASK
    close(relations(t["teacher.crowd_tokens"]), t["teacher.relation"])


@torch.no_grad()
def test_aligned_features(golden, method):
    t = golden[2]
    first, last = method.backbone(t["input.base"]), method.backbone(t["input.crowd"])
    regions = [method.backbone(t[f"input.region{i}"])[:, :1] for i in range(2)]
    for i, tokens in enumerate([first[:, :1], *regions]):
        close(method.decoder(tokens, GLOBAL).tokens, t[f"student.aligned_global_feats.{i}"])
    patches = method.decoder(first[:, 1:], LOCAL).tokens
    close(t["teacher.shape_mask"] * patches, t["student.aligned_local_feats.0"])
    close(t["teacher.shape_mask"] * t["teacher.tokens"][:, 1:], t["teacher.local_masked"])
    close(relations(method.decoder(last, RELATION).tokens), t["student.relations.0"])


def test_losses_and_gradients(golden, method):
    t = golden[2]
    expected_mask = t["teacher.shape_mask"]
    rows_columns = tuple(side // 16 for side in t["input.base"].shape[-2:])
    found_mask = method.mask(t["teacher.tokens"][:, 1:], rows_columns)
    if (found_mask - expected_mask).abs().max() > MASK:  # the sign is arbitrary: take the authors'
        class Flipped(ShapeMask):
            def forward(self, patches, grid):
                return 1 - super().forward(patches, grid)

        method.mask = Flipped(expected_mask.shape[-1], published=True)
    images = Images(t["input.base"], torch.cat([t["input.region0"], t["input.region1"]]), t["input.crowd"])
    losses = method(images, progress=0.0)
    names = {
        "global": "align_global_loss",
        "local": "align_local_loss",
        "relation": "align_relation_loss",
        "router": "router",
        "penalty": "expert_penalty",
        "loss": "total_epoch0",
    }
    for ours, theirs in names.items():
        close(losses[ours].detach(), t[f"loss.{theirs}"])
    losses["loss"].backward()
    parameters = dict(method.named_parameters())
    checked = 0
    for name, expected in t.items():
        if not name.startswith("grad.") or name == "grad.global_norm":
            continue
        part, _, key = name.removeprefix("grad.").partition(".")
        ours = f"decoder.{decoder_name(key, narrowed=True)}" if part == "adapter" else f"backbone.{key}"
        close(parameters[ours].grad, expected, GRADIENTS)
        checked += 1
    assert checked == 9
    norm = torch.stack([p.grad.square().sum() for p in parameters.values() if p.grad is not None]).sum().sqrt()
    close(norm, t["grad.global_norm"], GRADIENTS)


def test_checkpoint_holds_what_they_call_teacher(golden):
    folder, config, _ = golden
    heads = {"heads": config["student"]["num_heads"], "last_heads": config["student"]["num_heads_in_last_block"]}
    student, metadata = load_backbone(folder / "student_checkpoint.pth", **heads)
    ema, _ = load_backbone(folder / "student_checkpoint.pth", weights="ema", **heads)
    assert student.config == ema.config
    assert metadata["parameters"]["decoder"] > 0
