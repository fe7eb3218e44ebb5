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
    load_backbone,
    load_matching,
    read_tensors,
    split_dpal,
)
from dpal_edge.models.decoder import GLOBAL, LOCAL, RELATION, DynamicPatternDecoder
from dpal_edge.models.teacher import load_teachers
from dpal_edge.train.losses import ShapeMask, relations
from dpal_edge.train.method import Views
from dpal_edge.train.methods.dpal import Dpal, Options

# Each a set, or a folder of sets.
FOLDERS = [Path(folder) for folder in os.environ.get("DPAL_EDGE_GOLDEN", "").split(os.pathsep) if folder]
EXTRA = [
    path.parent for folder in FOLDERS for path in sorted({*folder.glob("config.json"), *folder.glob("*/config.json")})
]
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
    backbone, _ = load_backbone(
        folder / "student_checkpoint.pth",
        heads=student["num_heads"],
        last_heads=student["num_heads_in_last_block"],
    )
    height, width = teacher["img_size"]
    spec = f"{folder / 'teacher_checkpoint.pth'}?heads={teacher['num_heads']}&stored={height}x{width}&resize=2d-dino"
    options = Options(mask="published", relation="softmax", inner_width=student.get("inter_dim"))
    method = Dpal(backbone, load_teachers([spec], size=(height, width)), options)
    decoder = DynamicPatternDecoder(
        student["embed_dim"], student["out_dim"], inner_width=options.inner_width, heads=student["align_num_heads"]
    )
    state = split_dpal(flatten_published(read_tensors(folder / "student_checkpoint.pth")))[1]
    load_matching(decoder, state, folder, least=1.0)
    assert decoder_of(method).state_dict().keys() == decoder.state_dict().keys()
    method.decoder[method.widths[0]] = decoder
    return method


def decoder_of(method):
    [decoder] = method.decoder.values()
    return decoder


def teach(method, images):
    """Return the teacher's tokens of ``images``."""
    return method.teachers(images, ("relation",))["relation"]


@pytest.fixture
def close(golden, record_property):
    """Compare with the golden tensor of a name, relative to its largest value.

    The deviation goes into the JUnit report (``--junitxml``), from which ``bench/golden.py`` makes a table.
    """

    def compare(name, found, tolerance=VALUES):
        expected = golden[2][name]
        deviation = ((found - expected).abs().max() / expected.abs().max()).item()
        record_property(f"{golden[0].name}: {name}", deviation)
        assert deviation <= tolerance, (name, deviation)

    return compare


@torch.no_grad()
def test_tokens(golden, method, close):
    t = golden[2]
    tokens = teach(method, t["input.base"])
    close("teacher.tokens", tokens)
    close("teacher.global", tokens[:, :1])
    close("teacher.crowd_tokens", teach(method, t["input.crowd"]))
    close("student.tokens", method.backbone(t["input.base"]))
    close("student.region0_tokens_pos1d", method.backbone(t["input.region0"]))
    close("student.crowd_tokens_pos1d", method.backbone(t["input.crowd"]))


@torch.no_grad()
@pytest.mark.parametrize(("name", "expert"), [("global", GLOBAL), ("local", LOCAL), ("relation", RELATION)])
def test_decoder(golden, method, close, name, expert):
    decoded = decoder_of(method)(golden[2][f"dpade.{name}.input"], expert)
    close(f"dpade.{name}.output", decoded.tokens)
    close(f"dpade.{name}.router_loss", decoded.terms["router"])
    close(f"dpade.{name}.expert_penalty", decoded.terms["penalty"])


@torch.no_grad()
def test_shape_mask_and_relations(golden, close):
    t = golden[2]
    patches, expected = t["teacher.tokens"][:, 1:], t["teacher.shape_mask"]
    rows, columns = (side // golden[1]["teacher"]["patch_size"] for side in t["input.base"].shape[-2:])
    mask = ShapeMask(patches.shape[-1], published=True)(patches, (rows, columns))
    same_sign = (mask - expected).abs().max() < (1 - mask - expected).abs().max()
    close("teacher.shape_mask", mask if same_sign else 1 - mask, MASK)
    close("teacher.relation", relations(t["teacher.crowd_tokens"]))


@torch.no_grad()
def test_aligned_features(golden, method, close):
    t = golden[2]
    decode = decoder_of(method)
    first, last = method.backbone(t["input.base"]), method.backbone(t["input.crowd"])
    regions = [method.backbone(t[f"input.region{i}"])[:, :1] for i in range(2)]
    for i, tokens in enumerate([first[:, :1], *regions]):
        close(f"student.aligned_global_feats.{i}", decode(tokens, GLOBAL).tokens)
    patches = decode(first[:, 1:], LOCAL).tokens
    close("student.aligned_local_feats.0", t["teacher.shape_mask"] * patches)
    close("teacher.local_masked", t["teacher.shape_mask"] * teach(method, t["input.base"])[:, 1:])
    close("student.relations.0", relations(decode(last, RELATION).tokens))


def test_losses_and_gradients(golden, method, close):
    t = golden[2]
    expected_mask = t["teacher.shape_mask"]
    rows_columns = tuple(side // golden[1]["teacher"]["patch_size"] for side in t["input.base"].shape[-2:])
    found_mask = method.mask(t["teacher.tokens"][:, 1:], rows_columns)
    if (found_mask - expected_mask).abs().max() > MASK:  # the sign is arbitrary: take the authors'

        class Flipped(ShapeMask):
            def forward(self, patches, grid):
                return 1 - super().forward(patches, grid)

        method.mask = Flipped(expected_mask.shape[-1], published=True)
    views = Views(t["input.base"], torch.cat([t["input.region0"], t["input.region1"]]), t["input.crowd"])
    losses = method(views, method.targets(views), 0.0)
    names = {
        "global": "align_global_loss",
        "local": "align_local_loss",
        "relation": "align_relation_loss",
        "router": "router",
        "penalty": "expert_penalty",
        "loss": "total_epoch0",
    }
    for ours, theirs in names.items():
        close(f"loss.{theirs}", losses[ours].detach())
    losses["loss"].backward()
    parameters = dict(method.named_parameters())
    prefix = f"decoder.{method.widths[0]}"
    checked = 0
    for name in t:
        if not name.startswith("grad.") or name == "grad.global_norm":
            continue
        part, _, key = name.removeprefix("grad.").partition(".")
        ours = f"{prefix}.{decoder_name(key, narrowed=True)}" if part == "adapter" else f"backbone.{key}"
        close(name, parameters[ours].grad, GRADIENTS)
        checked += 1
    assert checked
    norm = torch.stack([p.grad.square().sum() for p in parameters.values() if p.grad is not None]).sum().sqrt()
    close("grad.global_norm", norm, GRADIENTS)


def test_checkpoint_holds_what_they_call_teacher(golden):
    folder, config, _ = golden
    heads = {"heads": config["student"]["num_heads"], "last_heads": config["student"]["num_heads_in_last_block"]}
    student, metadata = load_backbone(folder / "student_checkpoint.pth", **heads)
    ema, _ = load_backbone(folder / "student_checkpoint.pth", weights="ema", **heads)
    assert student.config == ema.config
    assert metadata["parameters"]["decoder"] > 0
