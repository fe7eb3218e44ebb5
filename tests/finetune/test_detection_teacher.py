"""What a larger detector tells a student, beside the boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.files import read_lines, write_text
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.detection_teacher import DetectionTeacher
from dpal_edge.finetune.expert import Expert
from dpal_edge.finetune.objectives.detection import DetectionObjective
from dpal_edge.finetune.run import run_finetuning
from dpal_edge.models.checkpoint import read_newest, write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.human import HumanModel, resize_model
from dpal_edge.models.vit import VisionTransformer, ViTConfig, normalize
from dpal_edge.tasks.sample import Split

SIZE, PATCH = (64, 96), 16  # of the student: 4 rows, 6 columns
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
HEAD = HeadConfig(task="detection", kind="pyramid", labels=("person",), channels=8)


def detector(*, patch=14, width=24, size=(28, 42)):
    torch.manual_seed(3)
    config = ViTConfig(size=size, patch_size=patch, depth=1, width=width, heads=2, last_heads=2)
    return HumanModel(VisionTransformer(config), {"detection": HEAD}).eval()


def frames(count=2):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), np.uint8))


def nobody(images):
    return {"image": images, "boxes": torch.zeros(len(images), 1, 4), "kind": torch.zeros(len(images), 1)}


class Says(nn.Module):
    """A head that says what it is told to, at the locations of a student's."""

    def __init__(self, raw):
        super().__init__()
        like = HumanModel(VisionTransformer(ViTConfig(size=SIZE, depth=1)), {"detection": HEAD}).heads["detection"]
        for name in ("centres", "strides"):
            self.register_buffer(name, like.get_buffer(name))
        self.raw = nn.Parameter(raw.clone())

    def forward(self, tokens):
        return self.raw


def test_answers_are_of_the_students_places_in_its_pixels():
    model = detector()
    teacher = DetectionTeacher(Expert(model, MEAN, STD), size=SIZE, patch=PATCH)
    resized = F.interpolate(frames().permute(0, 3, 1, 2).float(), (56, 84), mode="bilinear", antialias=True)
    with torch.no_grad():
        fitting = resize_model(model, (56, 84))
        tokens = fitting.backbone(normalize(resized, MEAN, STD))
        found = fitting.heads["detection"](tokens)
    seen = teacher(frames())
    torch.testing.assert_close(seen.patches, tokens[:, 1:])
    torch.testing.assert_close(seen.found[..., :4], found[..., :4] * 16 / 14)
    torch.testing.assert_close(seen.found[..., 4], found[..., 4])
    assert seen.patches.shape == (2, 4 * 6, 24)
    assert teacher.channels == 24


def test_the_loss_by_hand():
    teacher = DetectionTeacher(Expert(detector(), MEAN, STD), size=SIZE, patch=PATCH)
    objective = DetectionObjective(Split(()), SIZE, paste=None, backgrounds=None, teacher=teacher, width=12)
    images, tokens = frames(), torch.randn(2, 25, 12)
    seen = teacher(images)
    scores = seen.found[..., 4].sigmoid()

    alike = objective(Says(seen.found), tokens, nobody(images))
    assert alike["told_quality"].item() == pytest.approx(0, abs=1e-6)
    assert alike["told_box"].item() == pytest.approx(0, abs=1e-5)

    surer = seen.found.clone()
    surer[..., 4] += 1.0
    told = objective(Says(surer), tokens, nobody(images))["told_quality"].item()
    chance = surer[..., 4].sigmoid()
    entropy = -(scores * chance.log() + (1 - scores) * (1 - chance).log())
    wanted = (entropy * (chance - scores) ** 2).sum() / max(scores.sum().item(), 1)
    assert told == pytest.approx(wanted.item(), rel=1e-4)

    known = objective.locate(tokens[:, 1:])
    wanted = ((known - seen.patches) ** 2 / seen.patches.flatten(0, 1).var(0)).mean()
    assert alike["patches"].item() == pytest.approx(wanted.item(), rel=1e-4)
    parts = alike["quality"] + 2 * alike["box"] + alike["told_quality"] + 2 * alike["told_box"] + alike["patches"]
    assert alike["loss"].item() == pytest.approx(parts.item())


def test_boxes_count_where_the_teacher_finds_somebody():
    teacher = DetectionTeacher(Expert(detector(), MEAN, STD), size=SIZE, patch=PATCH)
    objective = DetectionObjective(Split(()), SIZE, paste=None, backgrounds=None, teacher=teacher, width=12)
    seen = teacher(frames()).found
    seen[..., 4] = -9.0
    seen[0, 5, 4] = 2.0
    teacher_says = type(teacher(frames()))(torch.randn(2, 24, 24), seen)
    objective._teacher = lambda images: teacher_says
    head = Says(seen)
    with torch.no_grad():
        head.raw[..., :4] += 3.0
    objective(head, torch.randn(2, 25, 12), nobody(frames()))["told_box"].backward()
    touched = head.raw.grad[..., :4].abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 5]]


def write_run(root: Path, settings, **changes):
    """Fine-tune a detector of a few frames, as ``settings`` and ``changes`` say."""
    if not (root / "frames").exists():
        folder = root / "frames"
        (folder / "train").mkdir(parents=True)
        rng, images, annotations = np.random.default_rng(0), [], []
        for i in range(6):
            picture = rng.integers(0, 60, (*SIZE, 3), np.uint8)
            picture[10:60, 20 + 5 * i : 40 + 5 * i] = 220
            Image.fromarray(picture).save(folder / "train" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [20 + 5 * i, 10, 20, 50],
                                "area": 1000, "iscrowd": 0})  # fmt: skip
        document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
        write_text(folder / "annotations" / "instances_train.json", json.dumps(document))
    plain = {"task": [f"detection={root / 'frames'}"], "share": [], "size": None, "detection_size": list(SIZE)}
    return run_finetuning(build_config({**settings, **plain, "batch": 4, **changes}), root / str(changes["seed"]))


def test_a_student_learns_from_it(settings, tmp_path):
    write_run(tmp_path, settings, seed=0)
    saved = read_newest(tmp_path / "0")[1]
    limited = str(tmp_path / "limited.safetensors")
    write_checkpoint(Path(limited), saved.tensors, {**saved.metadata, "limits": "indoors only"})
    changes = {"detection_teacher": limited, "steps": 30, "log_every": 10, "save_every": 30}
    write_run(tmp_path, settings, seed=1, **changes)
    course = [line["detection/patches"] for line in read_lines(tmp_path / "1" / "metrics.jsonl")]
    assert course[-1] < 0.9 * course[0]
    metadata = read_newest(tmp_path / "1")[1].metadata
    assert metadata["limits"] == "indoors only"
    assert set(metadata["taught_by"]["detection"]) == {"limited.safetensors"}
    assert not any("locate" in name for name in read_newest(tmp_path / "1")[1].part("heads"))


def test_what_cannot_teach(settings, folders, tmp_path):
    run_finetuning(build_config({**settings, "task": [f"pose={folders['pose']}"], "share": []}), tmp_path / "pose")
    with pytest.raises(ModelFileError, match="has heads for pose, expected one for detection"):
        DetectionTeacher.open(tmp_path / "pose", size=SIZE, patch=PATCH)
    with pytest.raises(ConfigError, match="detection_teacher is given, but no frames to learn from"):
        build_config({**settings, "detection_teacher": "t"})
