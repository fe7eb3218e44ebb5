import json

import pytest
import torch

from dpal_edge.errors import ModelFileError
from dpal_edge.models.students import (
    STUDENTS,
    build_student,
    config_from_dict,
    config_to_dict,
    init_student_weights,
    student_config,
)
from dpal_edge.models.swin import SwinConfig
from dpal_edge.models.vit import ViTConfig

TINY = {
    "vit": ViTConfig(size=(64, 32), width=24, depth=2, heads=2, last_heads=4, class_token=False),
    "swin": SwinConfig(size=(64, 32), width=32, depths=(1, 1, 2, 2), heads=(1, 1, 2, 2), window=3),
}


def test_parameters_of_the_students():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in build_student(c).parameters()) for name, c in STUDENTS.items()}
    # timm's count without a classifier; its ViTs have 68 more positions, for 224x224
    assert count["vit_tiny"] == 5_524_416 - 68 * 192
    assert count["vit_small"] == 21_665_664 - 68 * 384
    assert count["swin_tiny"] == 27_519_354


def test_student_config_keeps_what_is_not_given():
    vit = student_config("vit_small", (384, 128), heads=(3, 3), pos_interp="1d")
    assert (vit.grid, vit.width, vit.heads, vit.last_heads) == ((24, 8), 384, 3, 3)
    swin = student_config("swin_tiny", (160, 72), heads=(3, 3))  # which has heads of its own
    assert (swin.grid, swin.width, swin.heads, swin.depth) == ((5, 3), 768, (3, 6, 12, 24), 12)


@pytest.mark.parametrize("config", [*TINY.values(), *STUDENTS.values()])
def test_config_survives_json(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_config_without_a_family_is_a_vit():
    assert config_from_dict(TINY["vit"].to_dict()) == TINY["vit"]


@pytest.mark.parametrize("change", [{"family": "mamba"}, {"experts": 3}])
def test_unknown_architecture_is_refused(change):
    with pytest.raises(ModelFileError, match=r"is not known here .*; it may come from a newer dpal-edge"):
        config_from_dict({**config_to_dict(TINY["vit"]), **change})


@pytest.mark.parametrize("family", TINY)
def test_weights_follow_the_generator(family):
    states = []
    for seed in (0, 0, 1):
        student = build_student(TINY[family])
        init_student_weights(student, torch.Generator().manual_seed(seed))
        states.append(student.state_dict())
    first, same, other = states
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    changed = [key for key, value in first.items() if not torch.equal(value, other[key])]
    assert set(changed) == {key for key in first if key.endswith("weight") and "norm" not in key} | {
        key for key in first if key.endswith(("pos_embed", "table"))
    }
