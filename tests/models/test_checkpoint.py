import argparse
import contextlib
import json
import os
import random
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from dpal_edge.errors import ModelFileError
from dpal_edge.inspection import describe
from dpal_edge.models.checkpoint import (
    CHECKPOINTS,
    decoder_name,
    flatten_published,
    infer_student,
    infer_vit,
    is_ours,
    limits_of,
    list_checkpoints,
    load_backbone,
    load_matching,
    read_checkpoint,
    read_newest,
    read_tensors,
    split_dpal,
    write_checkpoint,
)
from dpal_edge.models.students import build_student, config_to_dict, init_student_weights
from dpal_edge.models.swin import SwinConfig
from dpal_edge.models.vit import VisionTransformer, ViTConfig
from tests.models.test_swin import authors_layout

TINY = ViTConfig(size=(32, 16), width=12, depth=2, heads=1, last_heads=2)
TINY_SWIN = SwinConfig(size=(64, 32), width=16, depths=(1, 1, 1, 2), heads=(1, 1, 1, 2), window=3)


def tiny_vit(seed=0, config=TINY):
    student = build_student(config)
    init_student_weights(student, torch.Generator().manual_seed(seed))
    return student.eval()


@pytest.fixture
def parts():
    return saved_parts(TINY)


def saved_parts(config):
    states = {
        "backbone": tiny_vit(0, config).state_dict(),
        "ema": tiny_vit(1, config).state_dict(),
        "decoder": {"w": torch.ones(3)},
        "heads": {"token.weight": torch.ones(2, 2)},
        "optimizer": {"decoder.w.exp_avg": torch.ones(3)},
    }
    tensors = {f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}
    return {**tensors, "mask_token": torch.ones(1, 1, 12)}


@pytest.fixture
def metadata():
    return {
        "student": "vit_tiny",
        "architecture": config_to_dict(TINY),
        "teachers": [{"spec": "a.pth", "parameters": 7}, {"spec": "b.pth", "parameters": 4}],
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 1.0, 1.0],
        "best": "ema",
        "note": 'quotes " and größer',
    }


@pytest.fixture
def written(tmp_path, parts, metadata):
    path = tmp_path / "step-00000001.safetensors"
    write_checkpoint(path, parts, metadata)
    return path


def test_round_trip(written, parts, metadata):
    checkpoint = read_checkpoint(written)
    assert checkpoint.metadata == metadata
    assert checkpoint.tensors.keys() == parts.keys()
    for key, value in parts.items():
        assert torch.equal(checkpoint.tensors[key], value)
    assert checkpoint.part("decoder").keys() == {"w"}
    assert checkpoint.parts["decoder"] == 3
    assert checkpoint.parts["ema"] == sum(p.numel() for p in tiny_vit().parameters())
    assert safetensors.torch.load_file(written).keys() == parts.keys()  # any reader of safetensors can read it


@pytest.mark.parametrize("attempt", range(8))  # the format's writer shuffles the fields of the header
def test_hashes_in_the_metadata_are_not_taken_for_its_own(tmp_path, attempt):
    metadata = {"teacher": {"sha256": "0" * 64}, "text": f'"sha256":"{"0" * 64}"'}
    write_checkpoint(tmp_path / "x.safetensors", {"a.b": torch.ones(3)}, metadata)
    assert read_checkpoint(tmp_path / "x.safetensors").metadata == metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_round_trip_of_types_and_shapes(tmp_path, dtype):
    tensors = {"a.scalar": torch.ones((), dtype=dtype), "a.empty": torch.zeros(0, 3, dtype=dtype)}
    tensors["a.transposed"] = torch.arange(6).view(2, 3).T.to(dtype)
    write_checkpoint(tmp_path / "x.safetensors", tensors, {})
    found = read_checkpoint(tmp_path / "x.safetensors").tensors
    for key, value in tensors.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], value)


def refused(path):
    """Read a damaged checkpoint in both ways; return the message."""
    with pytest.raises(ModelFileError) as first:
        read_checkpoint(path)
    with pytest.raises(ModelFileError):
        load_backbone(path)
    message = str(first.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def region(content, place):
    """Return an offset in one region of a checkpoint."""
    header = int.from_bytes(content[:8], "little")
    return {
        "length": 0,
        "length, high byte": 7,
        "opening brace": 8,
        "format": content.index(b"dpal-edge checkpoint"),
        "hash": content.index(b'"sha256":"') + 20,
        "metadata": content.index(b"vit_tiny"),
        "key": content.index(b"patch_embed"),
        "offsets": content.index(b"data_offsets") + 16,
        "first data": 8 + header,
        "last data": len(content) - 1,
    }[place]


@pytest.mark.parametrize(
    "place",
    [
        "length",
        "length, high byte",
        "opening brace",
        "format",
        "hash",
        "metadata",
        "key",
        "offsets",
        "first data",
        "last data",
    ],
)
def test_one_changed_byte_is_refused(written, place):
    content = bytearray(written.read_bytes())
    content[region(content, place)] ^= 1
    written.write_bytes(content)
    assert re.search("damaged|not a dpal-edge checkpoint", refused(written))


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.3, 0.99])
def test_cut_file_is_refused(written, share):
    content = written.read_bytes()
    written.write_bytes(content[: int(share * len(content))])
    assert "damaged" in refused(written)


def test_lengthened_file_is_refused(written):
    with written.open("ab") as file:
        file.write(b"\0")
    assert "damaged: its sha256" in refused(written)


@pytest.mark.parametrize(
    "content",
    [
        b"just some text, long enough for a header to be looked for in it",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (19).to_bytes(8, "little") + b'{"__metadata__":[]}',
        (19).to_bytes(8, "little") + b'{"__metadata__": 3}',
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=["text", "ones", "list", "null", "metadata list", "metadata number", "deep"],
)
def test_other_content_is_refused(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    assert "not a dpal-edge checkpoint" in refused(path)


def test_random_damage_never_raises_anything_else(written):
    content, rng = written.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little")
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(rng.choice([header, len(content)]))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        if bytes(damaged) == content:
            continue
        written.write_bytes(damaged)
        with pytest.raises(ModelFileError):
            read_checkpoint(written)


def test_missing_checkpoint_and_folder_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.safetensors: cannot be read \(No such file"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match="No such file"):
        load_backbone(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match="Is a directory"):
        read_checkpoint(tmp_path)


def test_foreign_safetensors_are_not_ours(tmp_path, written):
    safetensors.torch.save_file(tiny_vit().state_dict(), tmp_path / "foreign.safetensors")
    assert not is_ours(tmp_path / "foreign.safetensors")
    assert is_ours(written)
    with pytest.raises(ModelFileError, match="its header cannot be read"):
        read_checkpoint(tmp_path / "foreign.safetensors")


def test_read_newest_is_by_step(tmp_path):
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    with pytest.raises(ModelFileError, match=r"no checkpoint in .*; expected a training run that has saved one"):
        read_newest(tmp_path)
    for step in (200, 1000, 99):
        write_checkpoint(folder / f"step-{step:08d}.safetensors", {"backbone.w": torch.ones(2)}, {"step": step})
    (folder / ".step-00002000.1.partial.safetensors").touch()
    path, newest = read_newest(tmp_path)
    assert path.name == "step-00001000.safetensors"
    assert newest.metadata["step"] == 1000
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"damaged.*step-00000200.safetensors, is intact: remove step-00001000"):
        read_newest(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 3


@torch.no_grad()
@pytest.mark.parametrize(("weights", "seed"), [("best", 1), ("ema", 1), ("backbone", 0)])
def test_load_backbone_of_ours(written, weights, seed):
    backbone, metadata = load_backbone(written, weights=weights)
    images = torch.randn(1, 3, 32, 16)
    assert torch.equal(backbone(images), tiny_vit(seed)(images))
    assert not backbone.training
    assert metadata["weights"] == ("backbone" if seed == 0 else "ema")
    assert metadata["mean"] == [0.1, 0.2, 0.3]
    size = sum(p.numel() for p in backbone.parameters())
    assert metadata["parameters"] == {"backbone": size, "decoder": 3, "heads": 4, "mask_token": 12, "teacher": 11}
    assert [passport["spec"] for passport in metadata["teachers"]] == ["a.pth", "b.pth"]


@torch.no_grad()
def test_load_backbone_of_a_swin(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, saved_parts(TINY_SWIN), {**metadata, "architecture": config_to_dict(TINY_SWIN)})
    backbone, facts = load_backbone(path)
    images = torch.randn(1, 3, 64, 32)
    assert torch.equal(backbone(images), tiny_vit(1, TINY_SWIN)(images))
    assert facts["parameters"]["backbone"] == sum(p.numel() for p in backbone.parameters())


def test_checkpoint_of_the_first_format(tmp_path, parts, metadata):
    del metadata["teachers"]
    old = {**metadata, "architecture": TINY.to_dict(), "teacher": {"spec": "t.pth", "parameters": 7}}
    for later in ("class_token", "patch_padding"):  # fields that its architecture had not
        del old["architecture"][later]
    write_checkpoint(tmp_path / "x.safetensors", parts, old)
    backbone, facts = load_backbone(tmp_path / "x.safetensors")
    assert backbone.config == TINY
    assert facts["parameters"]["teacher"] == 7
    assert facts["teachers"] == [old["teacher"]]


def test_best_without_validation_is_the_backbone(tmp_path, parts, metadata):
    del metadata["best"]
    write_checkpoint(tmp_path / "x.safetensors", parts, metadata)
    assert load_backbone(tmp_path / "x.safetensors")[1]["weights"] == "backbone"


def test_absent_weights_are_named(tmp_path, parts, metadata):
    write_checkpoint(tmp_path / "x.safetensors", {k: v for k, v in parts.items() if not k.startswith("ema.")}, metadata)
    with pytest.raises(ModelFileError, match="holds no 'ema' weights; it has backbone, decoder, heads, mask_token"):
        load_backbone(tmp_path / "x.safetensors", weights="ema")


def save_published(path, content, **options):
    torch.save(content, path, **options)
    return path


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_released_backbone(tmp_path, suffix, prefix):
    config = ViTConfig(size=(256, 128), width=48, depth=2, heads=6, last_heads=12, pos_interp="1d")
    vit = tiny_vit(config=config)
    assert vit.pos_embed.shape[1] == 129
    state = {f"{prefix}{key}": value for key, value in vit.state_dict().items()}
    state[f"{prefix}inter_norm.weight"] = torch.ones(48)
    path = tmp_path / f"released{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    backbone, metadata = load_backbone(path)
    assert backbone.config == config
    images = torch.randn(1, 3, 128, 96)  # another grid: positions are resized as published
    assert torch.equal(backbone(images), vit(images))
    assert metadata["parameters"] == {"backbone": sum(p.numel() for p in vit.parameters()), "decoder": 0}
    with pytest.raises(ModelFileError, match="holds no 'ema' weights; its entries are "):
        load_backbone(path, weights="ema")


def published_training_checkpoint(path, **options):
    """Write the authors' layout: DDP prefixes, an adapter, the EMA under "teacher", and their arguments."""

    def layout(seed):
        state = {f"module.backbone.{key}": value for key, value in tiny_vit(seed).state_dict().items()}
        state["module.backbone.inter_norm.weight"] = torch.ones(12)
        state["module.adapter.pattern_queries"] = torch.ones(1, 3, 12)
        state["module.adapter.gate.moe_tokens"] = torch.ones(1, 1, 12)
        state["module.adapter.norm1.weight"] = torch.ones(12)
        return state

    content = {
        "student": layout(0),
        "teacher": {key.removeprefix("module."): value for key, value in layout(1).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(height=32, width=16, data_path="/data"),
    }
    return save_published(path, content, **options)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("weights", "seed"), [("best", 0), ("backbone", 0), ("ema", 1)])
def test_published_training_checkpoint(tmp_path, zipped, weights, seed):
    path = published_training_checkpoint(tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    backbone, metadata = load_backbone(path, weights=weights, heads=1, last_heads=2)
    assert backbone.config.size == (32, 16)  # from their arguments
    assert torch.equal(backbone.pos_embed, tiny_vit(seed).pos_embed)
    assert metadata["parameters"]["decoder"] == 48


@pytest.mark.parametrize("size", [{}, {"height": "64", "width": 32}, {"height": 64}])
def test_arguments_that_do_not_tell_the_size(tmp_path, size):
    content = {"student": tiny_vit().state_dict(), "args": argparse.Namespace(**size)}
    backbone, _ = load_backbone(save_published(tmp_path / "x.pth", content), heads=1, last_heads=2)
    assert backbone.config.size == (32, 16)  # from the positions


def test_published_decoder_names():
    assert decoder_name("gate.moe_tokens", narrowed=False) == "router.token"
    assert decoder_name("mlp.0.weight", narrowed=False) == "expert.weight"
    assert decoder_name("norm1.weight", narrowed=False) is None
    assert decoder_name("norm1.weight", narrowed=True) == "narrow_norm.weight"
    assert decoder_name("norm3.weight", narrowed=True) is None
    assert decoder_name("attn.qkv.weight", narrowed=True) == "attn.qkv.weight"


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder / 'executed'}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("place", ["beside", "in student", "in arguments", "alone", "as key"])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, place, family, zipped):
    evil = Evil(tmp_path)
    state = tiny_vit().state_dict() if family == "vit" else authors_layout(tiny_vit(config=TINY_SWIN))
    state = {f"module.backbone.{key}": value for key, value in state.items()}
    content = {
        "beside": {"student": state, "epoch": evil},
        "in student": {"student": {**state, "module.backbone.extra": [{"deep": evil}]}},
        "in arguments": {"student": state, "args": argparse.Namespace(height=32, width=evil)},
        "alone": evil,
        "as key": {"student": {**state, evil: torch.ones(1)}},
    }[place]
    path = save_published(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=zipped)
    for read in (load_backbone, read_tensors, describe):
        with pytest.raises(
            ModelFileError, match=r"evil\.pth: cannot be read as weights: .*code that is never run here"
        ):
            read(path)
    assert not (tmp_path / "executed").exists()


def test_evil_is_evil(tmp_path):
    torch.load(save_published(tmp_path / "evil.pth", Evil(tmp_path)), weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut short"),
        (b"text, not weights", "damaged"),
        (b"PK\x03\x04 not really", "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar"])
def test_files_that_are_no_weights(tmp_path, suffix, content, message):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_tensors(path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch, on its way to an error
@pytest.mark.parametrize("zipped", [True, False])
def test_random_damage_of_published_files_never_raises_anything_else(tmp_path, zipped):
    path = published_training_checkpoint(tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    content, rng, accepted = path.read_bytes(), random.Random(0), 0
    for i in range(300):
        damaged = bytearray(content)
        if i % 4:  # most of a file is values, which its readers cannot check: aim at the rest
            damaged[rng.randrange(min(len(content), 6000))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(content)) :]
        path.write_bytes(damaged)
        with contextlib.suppress(ModelFileError):
            load_backbone(path, heads=1, last_heads=2)
            accepted += 1
    assert accepted < 225  # none that was cut


def test_missing_file_and_wrong_content(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.pth: no such file; expected weights as"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(ModelFileError, match="holds a Tensor, expected a dictionary"):
        read_tensors(save_published(tmp_path / "tensor.pth", torch.ones(3)))
    with pytest.raises(ModelFileError, match=r"swin\.pth: not a ViT: .* is missing; the keys begin layers\.0\.w"):
        load_backbone(save_published(tmp_path / "swin.pth", {"layers.0.w": torch.ones(3)}))
    with pytest.raises(ModelFileError, match="holds no 'backbone' weights; its entries are epoch"):
        load_backbone(save_published(tmp_path / "none.pth", {"epoch": 3}))


def test_wrong_keys_are_counted_and_named():
    vit = tiny_vit()
    state = {key: value for key, value in vit.state_dict().items() if not key.startswith("blocks.1.mlp")}
    assert load_matching(vit, state, "x.pth", least=0.8) == pytest.approx(1 - 4 / len(vit.state_dict()))
    with pytest.raises(ModelFileError, match=r"x\.pth: 8\d\.\d % of the model's \d+ tensors .* blocks\.1\.mlp\.fc1"):
        load_matching(vit, state, "x.pth", least=0.95)


def test_tensor_of_another_shape_is_refused():
    vit = tiny_vit()
    state = {**vit.state_dict(), "pos_embed": torch.zeros(1, 197, 12)}
    with pytest.raises(ModelFileError, match=r"pos_embed has shape \(1, 197, 12\), the model's is \(1, 3, 12\)"):
        load_matching(vit, state, "x.pth", least=0.1)


@pytest.mark.parametrize(
    ("count", "size"), [(128, (256, 128)), (256, (256, 256)), (196, (224, 224)), (2, (32, 16)), (4, (32, 32))]
)
def test_size_is_read_off_the_positions(count, size):
    state = {**tiny_vit().state_dict(), "pos_embed": torch.zeros(1, 1 + count, 12)}
    assert infer_vit(state).size == size


def test_architecture_is_read_off_the_weights():
    config = ViTConfig(size=(28, 14), patch_size=14, width=24, depth=3, mlp_ratio=2.5, layer_scale=True)
    state = VisionTransformer(config).state_dict()
    assert infer_vit(state, heads=config.heads, last_heads=config.last_heads) == config
    assert infer_student(state) == (replace(config, pos_interp="1d"), state)
    with pytest.raises(ModelFileError, match="2 positions do not fit 64x32 pixels in patches of 14; give the size"):
        infer_vit(state, size=(64, 32))
    for key in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        with pytest.raises(ModelFileError, match="not a ViT on images"):
            infer_vit({**state, key: torch.zeros(3)})
    with pytest.raises(ModelFileError, match="not a ViT on images"):
        infer_vit({**state, "blocks.0.mlp.fc1.weight": torch.zeros(4, 0)})


def test_positions_of_a_vit_without_class_token():
    config = ViTConfig(size=(64, 32), width=12, depth=1, heads=1, last_heads=1, class_token=False)
    state = tiny_vit(config=config).state_dict()
    assert state["pos_embed"].shape[1] == 8
    assert infer_vit(state, heads=1, last_heads=1) == config


def test_heads_that_do_not_divide_are_refused(tmp_path):
    vit = tiny_vit(config=ViTConfig(width=32, depth=1, heads=2, last_heads=2))
    path = save_published(tmp_path / "x.pth", vit.state_dict())
    with pytest.raises(
        ModelFileError, match=r"x\.pth: tokens of 32 channels do not divide into 6 heads, 12 in the last"
    ):
        load_backbone(path)
    assert load_backbone(path, heads=2, last_heads=2)[0].config.heads == 2


def test_published_swin_is_inferred_and_renamed():
    swin = tiny_vit(config=TINY_SWIN)
    config, state = infer_student(authors_layout(swin), size=TINY_SWIN.size)
    assert config == TINY_SWIN
    assert state.keys() == swin.state_dict().keys()


def test_flatten_and_split():
    weight = torch.ones(1)
    assert flatten_published({"model": {"module.backbone_module.a": weight}, "epoch": 1}) == {"a": weight}
    assert flatten_published({"a": weight, "epoch": 1}) == {"a": weight}
    assert flatten_published({"a": weight}, "teacher") == {}
    backbone, decoder = split_dpal({"backbone.a": weight, "adapter.norm2.weight": weight, "head.b": weight})
    assert backbone == {"a": weight}
    assert decoder == {"attn_norm.weight": weight}


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "x.safetensors", {}, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(TINY.to_dict())


def test_limits_are_a_models_own_its_origins_and_its_teachers():
    facts = {"limits": "Mine.", "origin": {"limits": "No trade."}, "teachers": [{"limits": "Research."}, {}]}
    assert limits_of(facts) == "Mine. No trade. Its teacher's: Research."
    assert limits_of({"origin": None}) == ""
