"""A student that begins as the principal part of its teacher."""

import pytest
import torch
from safetensors.torch import save_file

from dpal_edge.errors import ConfigError
from dpal_edge.models.checkpoint import list_checkpoints, load_backbone
from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student
from dpal_edge.train.config import build_config
from dpal_edge.train.panel import opening
from dpal_edge.train.run import run_training
from tests.train.test_run import Recorder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A teacher from which ViT-Ti can be sliced: wider, as deep."""
    path = tmp_path_factory.mktemp("large") / "teacher.safetensors"
    vit = VisionTransformer(ViTConfig(size=(64, 32), width=256, depth=12, heads=4, last_heads=4))
    init_student(vit, torch.Generator().manual_seed(0))
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def fields(settings, large):
    return {**settings, "teacher": f"{large}?heads=4", "start": "sliced", "heads": "4", "steps": 1, "base_lr": 1e-9}


def test_run_begins_with_the_teacher_s_principal_part(fields, tmp_path):
    watcher = Recorder()
    run_training(build_config(fields), tmp_path / "run", watcher=watcher)
    share = watcher.facts["explained"]
    assert share > 0.5
    assert f"          sliced from the teacher: explains {100 * share:.1f} % of its variance" in opening(watcher.facts)

    student, _ = load_backbone(list_checkpoints(tmp_path / "run")[-1])
    crops = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert student.run_blocks(student.embed(crops)).mean(-1).abs().max() < 1e-3  # as no other start has it


def test_resumed_run_is_not_sliced_again(fields, tmp_path):
    run_training(build_config(fields), tmp_path / "run")
    watcher = Recorder()
    run_training(build_config({**fields, "steps": 2}), tmp_path / "run", resume=True, watcher=watcher)
    assert watcher.facts["explained"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "swin_tiny"}, "start=sliced needs a ViT as student"),
        ({"heads": "6"}, "a block of 6 heads cannot be sliced from one of 4"),
        ({"teacher_layer": 8}, "12 blocks of 192 channels cannot be sliced from 8 blocks of 256"),
    ],
)
def test_what_cannot_be_sliced_is_said_before_anything_is_written(fields, change, message, tmp_path):
    changed = {**fields, "size": [64, 64], "local_size": [64, 32], "crowd_size": [96, 96], **change}
    with pytest.raises(ConfigError, match=message):
        run_training(build_config(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
