"""Attributes that a fine-tuned model tells a student, without labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpal_edge.errors import ModelFileError
from dpal_edge.files import read_lines
from dpal_edge.finetune.attribute_teacher import AttributeTeacher
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.expert import Expert
from dpal_edge.finetune.objectives.attributes import TaughtAttributeObjective
from dpal_edge.finetune.run import run_finetuning
from dpal_edge.models.checkpoint import read_newest, write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import VisionTransformer, ViTConfig, normalize

LABELS = ("hat", "left_glove", "right_glove")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def write_teacher():
    torch.manual_seed(3)
    backbone = VisionTransformer(ViTConfig(size=(48, 32), depth=1, width=32, heads=2, last_heads=2))
    return HumanModel(backbone, {"attributes": HeadConfig(task="attributes", kind="linear", labels=LABELS)}).eval()


def test_answers_are_those_of_the_model_on_the_resized_view_and_its_mirror_image():
    model = write_teacher()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 64, 32, 3), np.uint8))
    resized = F.interpolate(images.permute(0, 3, 1, 2).float(), (48, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        one, other = (model(normalize(pixels, MEAN, STD))["attributes"] for pixels in (resized, resized.flip(3)))
    wanted = (one + other[:, [0, 2, 1]]) / 2
    teacher = AttributeTeacher(Expert(model, MEAN, STD))
    torch.testing.assert_close(teacher(images), wanted)
    assert teacher.labels == LABELS


def test_the_loss_is_least_where_the_student_answers_alike():
    class Says(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, tokens):
            return self.logits

    teacher = AttributeTeacher(Expert(write_teacher(), MEAN, STD))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 48, 32, 3), np.uint8))
    objective = TaughtAttributeObjective([Path("a.png")], (48, 32), Augmentation(), teacher, kind="linear", mix=0.0)
    assert not list(objective.parameters())
    seen = teacher(images)
    alike, above, below = (
        objective(Says(seen + shift), torch.zeros(4, 7, 8), {"image": images})["loss"].item()
        for shift in (0, 0.5, -0.5)
    )
    chance = seen.sigmoid()
    entropy = -(chance * chance.log() + (1 - chance) * (1 - chance).log())
    assert alike == pytest.approx(entropy.sum(1).mean().item(), rel=1e-5)
    assert alike < min(above, below)


def test_a_student_learns_them_from_images_alone(settings, folders, tmp_path):
    images = str(folders["reid"] / "bounding_box_train")
    labelled = {"task": [f"attributes={folders['attributes']}"], "share": []}
    run_finetuning(build_config({**settings, **labelled}), tmp_path / "teacher")
    teacher, saved = load_human(tmp_path / "teacher")[0], read_newest(tmp_path / "teacher")[1]
    limited = str(tmp_path / "limited.safetensors")
    write_checkpoint(Path(limited), saved.tensors, {**saved.metadata, "limits": "indoors only"})
    changes = {"task": [f"attributes={images}"], "share": [], "attribute_teacher": limited}
    changes |= {"steps": 40, "log_every": 10, "save_every": 40, "evaluate_every": 40, "attribute_head": "linear"}
    run_finetuning(build_config({**settings, **changes}), tmp_path / "run")
    course = [line["attributes"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert course[-1] < course[0]
    student, metadata = load_human(tmp_path / "run")
    assert student.configs["attributes"].labels == teacher.configs["attributes"].labels
    assert metadata["config"]["attribute_teacher"] == limited
    assert metadata["limits"] == "indoors only"


def test_a_model_without_attributes_teaches_none(settings, folders, tmp_path):
    run_finetuning(build_config({**settings, "task": [f"pose={folders['pose']}"], "share": []}), tmp_path / "pose")
    with pytest.raises(ModelFileError, match="has heads for pose, expected one for attributes"):
        AttributeTeacher.open(tmp_path / "pose")
