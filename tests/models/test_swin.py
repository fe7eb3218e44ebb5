import argparse
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from dpal_edge.errors import ModelFileError
from dpal_edge.models.checkpoint import flatten_published, load_backbone, read_tensors, split_dpal
from dpal_edge.models.swin import (
    PatchMerging,
    PositionBias,
    SwinConfig,
    SwinTransformer,
    WindowAttention,
    infer_swin,
    init_swin,
    rename_swin,
)

TINY = SwinConfig(size=(64, 32), width=32, depths=(1, 1, 2, 2), heads=(1, 1, 2, 2), window=3, modulated=True)
FOLDERS = ["shared", *filter(None, [os.environ.get("DPAL_EDGE_GOLDEN_TEACHERS")])]


def build(config=TINY, seed=0):
    swin = SwinTransformer(config)
    init_swin(swin, torch.Generator().manual_seed(seed))
    return swin.eval()


@pytest.fixture(params=FOLDERS)
def golden(request):
    """A folder laid out like golden/teachers."""
    return (
        request.getfixturevalue("shared") / "golden" / "teachers" if request.param == "shared" else Path(request.param)
    )


def golden_swin(file, entry):
    state = rename_swin(split_dpal(flatten_published(read_tensors(file), entry))[0])
    swin = SwinTransformer(infer_swin(state))
    swin.load_state_dict({key: value for key, value in state.items() if key in swin.state_dict()})
    return swin.eval()


def found(swin, name, image, weight):
    """Compute what the golden tensor ``name`` holds, and apply the final norm to what it holds without."""
    layer = swin.config.depth - 1 if "block0" in name else None
    tokens = swin(image, layer, weight)
    if name in ("pooled", "tokens_with_pooled_first"):
        return tokens[:, 0] if name == "pooled" else tokens
    return tokens[:, 1:]


def expected(swin, name, value):
    if name == "map4":
        return value.flatten(2).mT
    return swin.norm(value) if name.startswith("stage4") else value


def check(swin, tensors, prefix):
    """Compare every golden tensor of the final map under ``prefix`` and return how many there were."""
    names = ("tokens", "map4", "pooled", "tokens_with_pooled_first", "stage4.block0_tokens", "stage4.block1_tokens")
    compared = 0
    for key, value in tensors.items():
        size, _, name = key.removeprefix(f"{prefix}.").partition(".")
        weight = None
        if name.startswith("w0"):  # w0.2.map4
            weight, name = float(name[1:4]), name[5:]
        name = name.removeprefix("no_modulation.")
        if key.startswith(f"{prefix}.") and name in names:
            ours = found(swin, name, tensors[f"input.{size}"], weight)
            torch.testing.assert_close(ours, expected(swin, name, value), rtol=0, atol=1e-5, msg=lambda m, k=key: k + m)
            compared += 1
    return compared


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "entry", "prefix"),
    [
        ("checkpoint.pth", "teacher", "teacher"),
        ("checkpoint.pth", "student", "student"),
        ("checkpoint_tea.pth", None, "teacher"),
    ],
)
def test_solider_golden(golden, file, entry, prefix):
    folder = golden / "solider_swin"
    swin = golden_swin(folder / file, entry)
    assert swin.config.modulated
    tensors = safetensors.torch.load_file(folder / "tensors.safetensors")
    # Two sizes, two semantic weights, five tensors of each; the teacher's also at weight 0 and without modulation.
    assert check(swin, tensors, prefix) >= (24 if prefix == "teacher" else 20)


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "weights", "prefix"),
    [
        ("student_checkpoint.pth", "backbone", "student"),
        ("student_checkpoint.pth", "ema", "ema"),
        ("backbone_only.pth", "best", "student"),
    ],
)
def test_dpal_student_golden(golden, file, weights, prefix):
    folder = golden / "dpal_swin_student"
    swin, metadata = load_backbone(folder / file, weights=weights)
    assert isinstance(swin, SwinTransformer)
    assert not swin.config.modulated  # though the file has the layers
    assert check(swin, safetensors.torch.load_file(folder / "tensors.safetensors"), prefix) >= 4
    assert metadata["parameters"]["backbone"] == sum(p.numel() for p in swin.parameters())
    assert (metadata["parameters"]["decoder"] > 0) == (file == "student_checkpoint.pth")


def test_eps():
    norms = [module for module in build().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 6 + 3 + 1
    assert {norm.eps for norm in norms} == {1e-5}


@torch.no_grad()
@pytest.mark.parametrize(("size", "patches"), [((64, 32), 2), ((96, 72), 9), ((4, 4), 1)])
def test_first_token_is_the_mean_of_the_others(size, patches):
    tokens = build()(torch.randn(2, 3, *size))
    assert tokens.shape == (2, 1 + patches, TINY.width)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    assert math.prod(SwinConfig(size=size).grid) == patches


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    swin, images = build(), torch.randn(3, 3, 96, 72)
    torch.testing.assert_close(swin(images)[1:2], swin(images[1:2]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weight_zero_is_not_no_modulation():
    swin, images = build(), torch.randn(1, 3, 64, 32)
    without, zero, half, one = (swin(images, semantic_weight=weight) for weight in (None, 0.0, 0.5, 1.0))
    assert (zero - without).abs().max() > 1e-2
    assert (zero - one).abs().max() > 1e-3
    assert (half - one).abs().max() > 1e-3


@torch.no_grad()
def test_modulation_by_hand():
    [layer] = (swin_layer for swin_layer in build().semantic[:1])
    for linear, weight, bias in ((layer.scale, [1.0, 3.0], 0.5), (layer.shift, [10.0, 0.0], 1.0)):
        linear.weight.copy_(torch.tensor(weight).expand_as(linear.weight))
        linear.bias.fill_(bias)
    # Weights (0.2, 0.8): scale softplus(0.2 + 2.4 + 0.5), shift 2 + 1.
    modulated = layer(torch.full((1, 1, 1, 8), 2.0), 0.2)
    torch.testing.assert_close(modulated, torch.full((1, 1, 1, 8), 2 * math.log1p(math.exp(3.1)) + 3))


def test_wrong_calls():
    swin, images = build(), torch.zeros(1, 3, 64, 32)
    for layer in (-1, 0, 4, 7):
        with pytest.raises(ValueError, match=f"layer is {layer}, expected a block of the last stage, 5 to 6"):
            swin(images, layer)
    plain = build(SwinConfig(**{**TINY.__dict__, "modulated": False}))
    with pytest.raises(ValueError, match=r"semantic_weight is 0\.0, but this Swin has no semantic modulation"):
        plain(images, semantic_weight=0.0)


@torch.no_grad()
def test_shifted_windows_by_hand():
    """A line of tokens with windows of 2, shifted by 1: who is seen by whom, with uniform attention."""
    attention = WindowAttention(width=1, heads=1, window=2, shift=1)
    for linear, weight in ((attention.qkv, [[0.0], [0.0], [1.0]]), (attention.proj, [[1.0]])):
        linear.weight.copy_(torch.tensor(weight))
        linear.bias.zero_()
    seen = attention(torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)).flatten()
    # The windows hold columns 1 and 2, and columns 3 and 0, which wrapped round and are kept apart, as is the row of
    # zeros that pads each window.
    assert seen.tolist() == pytest.approx([1.0, 3.0, 3.0, 8.0])


@torch.no_grad()
def test_relative_positions_by_hand():
    bias = PositionBias(heads=1, window=2, shift=0)
    bias.table.copy_(torch.arange(9.0).view(9, 1))  # entry 3 * (rows + 1) + columns + 1 of a token minus another
    assert bias(5, 5).tolist() == [[[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]]


def test_merging_has_the_order_of_unfold():
    merging, x = PatchMerging(3), torch.randn(2, 4, 6, 3)
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    unfolded = nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).mT.view(2, 2, 3, 12)
    assert torch.equal(merging(x), unfolded)


def test_gradients_reach_every_parameter():
    swin = build()
    (swin(torch.randn(1, 3, 96, 64), semantic_weight=0.3) * torch.randn(TINY.width)).sum().backward()
    assert not [name for name, parameter in swin.named_parameters() if not parameter.grad.abs().max() > 0]


def authors_layout(swin):
    """Rename a state dict to the authors' layout, with what their files hold beside it."""
    state = {}
    for key, value in swin.state_dict().items():
        for ours, theirs in (
            ("patch_embed.proj.", "patch_embed.projection."),
            ("attn.position_bias.table", "attn.w_msa.relative_position_bias_table"),
            ("attn.qkv.", "attn.w_msa.qkv."),
            ("attn.proj.", "attn.w_msa.proj."),
            ("mlp.fc1.", "ffn.layers.0.0."),
            ("mlp.fc2.", "ffn.layers.1."),
        ):
            key = key.replace(ours, theirs)
        if key.startswith("semantic."):
            _, index, which, name = key.split(".")
            key = f"semantic_embed_{'w' if which == 'scale' else 'b'}.{index}.{name}"
        state["norm3." + key[5:] if key.startswith("norm.") else key] = value
    area = swin.config.window**2
    for key in [key for key in state if key.endswith("bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(area, area, dtype=torch.int64)
    for i in range(3):
        width = swin.config.width >> (3 - i)
        state |= {f"norm{i}.weight": torch.ones(width), f"norm{i}.bias": torch.ones(width)}
    return {**state, "semantic_embed_w.3.weight": torch.ones(swin.config.width, 2), "head.mlp.0.bias": torch.ones(3)}


def test_names_and_architecture_round_trip():
    swin = build()
    renamed = rename_swin(authors_layout(swin))
    assert renamed.keys() == swin.state_dict().keys()
    assert infer_swin(renamed) == SwinConfig(**{**TINY.__dict__, "size": (256, 128)})
    swin.load_state_dict(renamed)


@pytest.mark.parametrize(
    "change",
    [
        {"norm.weight": torch.ones(33)},
        {"norm.weight": torch.ones(2, 16)},
        {"patch_embed.proj.weight": torch.ones(4, 3, 16, 16)},
        {"stages.0.blocks.0.attn.position_bias.table": torch.ones(25)},
        {"stages.0.blocks.0.attn.position_bias.table": torch.ones(24, 1)},
        {"stages.3.blocks.0.attn.position_bias.table": torch.ones(25, 5)},
        {"stages.0.blocks.0.mlp.fc1.weight": torch.ones(3)},
    ],
)
def test_what_is_no_swin_is_refused(change):
    with pytest.raises(ModelFileError, match="not a Swin: ") as caught:
        infer_swin({**build().state_dict(), **change})
    assert "\n" not in str(caught.value)


def test_missing_stage_is_named():
    state = {key: value for key, value in build().state_dict().items() if not key.startswith("stages.3.")}
    with pytest.raises(ModelFileError, match=r"not a Swin: 'stages\.3\.blocks\.0\.attn\.position_bias\.table' is miss"):
        infer_swin(state)


def test_init_is_reproducible_and_small():
    one, same = build().state_dict(), build().state_dict()
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert one["stages.3.blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert one["stages.3.blocks.0.attn.position_bias.table"].std().item() == pytest.approx(0.02, rel=0.3)
    assert not one["stages.3.blocks.0.attn.qkv.bias"].any()


def test_published_size_and_wrapper(tmp_path):
    swin = build()
    state = {f"module.backbone.{key}": value for key, value in authors_layout(swin).items()}
    state |= {"module.adapter.pattern_queries": torch.ones(1, 3, 32)}
    args = argparse.Namespace(height=64, width=32)
    torch.save({"student": state, "args": args}, tmp_path / "x.pth")
    loaded, metadata = load_backbone(tmp_path / "x.pth")
    assert loaded.config == SwinConfig(**{**TINY.__dict__, "modulated": False})
    assert metadata["student"] == "swin"
    assert metadata["parameters"]["decoder"] == 96
