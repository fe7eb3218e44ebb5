"""Heads: shapes, and that what a head is told to look at is what it uses."""

import pytest
import torch

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.checkpoint import write_checkpoint
from dpal_edge.models.head_config import HeadConfig, Place
from dpal_edge.models.heads import KINDS, build_head, patch_map
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.students import build_student, config_to_dict
from dpal_edge.models.vit import VisionTransformer, ViTConfig
from dpal_edge.tasks.decoding import decode_joints

PLACE = Place(width=24, grid=(8, 4), size=(64, 32))
LABELS = ("a", "b", "c")
SHAPES = {
    ("pose", "simcc"): (3, 2 * 32 + 2 * 64),
    ("pose", "heatmap"): (3, 32, 16),
    ("parsing", "upsample"): (3, 32, 16),
    ("parsing", "linear"): (3, 8, 4),
    ("attributes", "query"): (3,),
    ("attributes", "linear"): (3,),
    ("reid", "bnneck"): (10,),
    ("reid", "linear"): (10,),
    ("reid", "strips"): (10,),
}


def head(task, kind, channels=10):
    labels = () if task == "reid" else LABELS
    return build_head(HeadConfig(task=task, kind=kind, labels=labels, channels=channels), PLACE)


@pytest.mark.parametrize(("task", "kind"), SHAPES)
def test_shapes(task, kind):
    assert head(task, kind)(torch.randn(2, 33, 24)).shape == (2, *SHAPES[task, kind])


def test_every_crop_head_is_tested():
    assert {(task, kind) for task, kinds in KINDS.items() for kind in kinds if task != "detection"} == set(SHAPES)


@pytest.mark.parametrize(("task", "kind"), SHAPES)
def test_every_weight_gets_a_gradient(task, kind):
    module = head(task, kind)
    if kind == "simcc":  # what joints tell of each other begins at zero and lets nothing through
        torch.nn.init.normal_(module.context.weight)
    (module(torch.randn(4, 33, 24)) ** 2).sum().backward()
    idle = [name for name, p in module.named_parameters() if p.requires_grad and not (p.grad.abs() > 0).any()]
    assert idle == []


def test_the_patch_map_is_in_row_order():
    tokens = torch.arange(33.0).view(1, 33, 1)
    assert torch.equal(patch_map(tokens, (8, 4))[0, 0], torch.arange(1, 33.0).view(8, 4))


@pytest.mark.parametrize(("rows", "of_third"), [(8, [0, 1 / 2, 0, 0]), (6, [0, 2 / 3, 0, 0]), (3, [0, 0, 1 / 3, 1])])
def test_strips_are_quarters_of_the_height(rows, of_third):
    """The third row of patches lies in the second of four strips, or where the rows are few in parts of two."""
    module = build_head(HeadConfig(task="reid", kind="strips", channels=10), Place(24, (rows, 4), (16 * rows, 64)))
    assert torch.allclose(module.shares.sum(1), torch.ones(4))
    torch.testing.assert_close(module.shares.view(4, rows, 4)[:, 2].sum(-1), torch.tensor(of_third, dtype=torch.float))


def hand_on(module, factor):
    """Make every convolution of a simcc head hand the first channel on, the last one ``factor`` times as large."""
    module.maps.bias.zero_()
    for convolution in (m for m in module.modules() if isinstance(m, torch.nn.Conv2d)):
        middle = convolution.kernel_size[0] // 2
        convolution.weight.zero_()
        convolution.weight[:, 0, middle, middle] = factor if convolution is module.maps else 1.0


@pytest.mark.parametrize("channels", [0, 10])
def test_simcc_begins_by_saying_where_its_map_is_high(channels):
    """A hot patch (5, 2), handed on by every convolution: its pixels are found without any training."""
    module = head("pose", "simcc", channels).eval()
    with torch.no_grad():
        hand_on(module, 30.0)
        tokens = torch.zeros(1, 33, 24)
        tokens[0, 1 + 5 * 4 + 2, 0] = 1.0
        places, _ = decode_joints(module(tokens).numpy(), "simcc", (64, 32))
    assert abs(places[0, :, 0] - (2 * 8 + 4)).max() <= 1.5
    assert abs(places[0, :, 1] - (5 * 8 + 4)).max() <= 1.5


def blob(rows, columns):
    """A smooth bump at three quarters of the height and a third of the width, in the first channel of tokens."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
    bump = torch.exp(-(((y - 0.75) / 0.15) ** 2)[:, None] - ((x - 1 / 3) / 0.2) ** 2)
    return torch.nn.functional.pad(bump.view(1, -1, 1), (0, 23, 1, 0))


@pytest.mark.parametrize("channels", [0, 10])
def test_a_simcc_head_of_another_size_finds_the_same_places(channels):
    small = head("pose", "simcc", channels).eval()
    large = build_head(HeadConfig(task="pose", kind="simcc", labels=LABELS, channels=channels),
                       Place(width=24, grid=(12, 6), size=(96, 48))).eval()  # fmt: skip
    with torch.no_grad():
        hand_on(small, 20.0)
        small.y.bias[:] = torch.linspace(0, 40, 128)  # something learned: joints lie lower than their maps say
        torch.nn.init.normal_(small.context.weight, std=0.02)
        large.adopt(small)
        one, _ = decode_joints(small(blob(8, 4)).numpy(), "simcc", (64, 32))
        two, _ = decode_joints(large(blob(12, 6)).numpy(), "simcc", (96, 48))
    assert abs(one / (32, 64) - two / (48, 96)).max() < 0.08  # a third of a patch of the smaller
    assert abs(one[..., 1] - 0.75 * 64).max() > 2  # what was learned shows
    same = head("pose", "simcc", channels)
    same.adopt(small)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value)


def test_bnneck_separates_what_is_pulled_from_what_is_classified():
    module = head("reid", "bnneck").train()
    tokens = torch.randn(16, 33, 24) * 5 + 3
    embedding = module(tokens)
    torch.testing.assert_close(embedding.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    assert module.feature(tokens).mean(0).abs().max() > 0.1
    assert not module.neck.bias.requires_grad


def test_unknown_heads():
    with pytest.raises(ConfigError, match=r"no 'cubic' head for 'pose'; known are pose: simcc, heatmap"):
        build_head(HeadConfig(task="pose", kind="cubic"), PLACE)
    with pytest.raises(ModelFileError, match="is not known here"):
        HeadConfig.from_dict({"task": "pose", "kind": "simcc", "labels": [], "depth": 3})


CONFIG = ViTConfig(size=(64, 32), width=24, depth=2, heads=2, last_heads=2)


def write_model(path, *, half=False, **changes):
    model = HumanModel(VisionTransformer(CONFIG), {"pose": HeadConfig(task="pose", kind="simcc", labels=LABELS)})
    tensors = {name: value.half() if half else value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{n}": v + 1 for n, v in model.backbone.state_dict().items()}
    tensors |= {f"ema_heads.{n}": v + 1 for n, v in model.heads.state_dict().items()}
    heads = {task: config.to_dict() for task, config in model.configs.items()}
    metadata = {"architecture": config_to_dict(CONFIG), "heads": heads, "mean": [0, 0, 0], "std": [1, 1, 1], **changes}
    write_checkpoint(path, tensors, metadata)
    return model


def test_a_model_comes_back_from_its_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    model = write_model(path).eval()
    found, metadata = load_human(path)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(found(images)["pose"], model(images)["pose"])
    assert metadata["weights"] == "backbone"
    means, _ = load_human(path, weights="ema")
    torch.testing.assert_close(means.heads["pose"].x.bias, model.heads["pose"].x.bias + 1)


def test_half_the_bytes_become_float32(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, half=True)
    assert {p.dtype for p in load_human(path)[0].parameters()} == {torch.float32}


def test_the_better_weights_are_taken(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, best="ema")
    assert load_human(path)[1]["weights"] == "ema"


def test_a_backbone_alone_has_no_heads(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, heads={})
    with pytest.raises(ModelFileError, match="a backbone without heads; give it some with: dpal-edge finetune --init"):
        load_human(path)


def test_the_backbone_runs_once_for_all_heads():
    model = HumanModel(
        build_student(CONFIG),
        {
            "pose": HeadConfig(task="pose", kind="simcc", labels=LABELS),
            "reid": HeadConfig(task="reid", kind="linear", channels=5),
        },
    )
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert set(model(torch.randn(1, 3, 64, 32))) == {"pose", "reid"}
    assert set(model(torch.randn(1, 3, 64, 32), ["reid"])) == {"reid"}
    assert len(calls) == 2
