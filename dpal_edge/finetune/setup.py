"""What a run starts from: the backbone, the tasks' data, and the heads that fit both."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.files import find_images
from dpal_edge.finetune.attribute_teacher import AttributeTeacher
from dpal_edge.finetune.config import FinetuneConfig
from dpal_edge.finetune.detection_teacher import DetectionTeacher
from dpal_edge.finetune.embedding_teacher import EmbeddingTeacher
from dpal_edge.finetune.objective import Objective
from dpal_edge.finetune.objectives.attributes import AttributeObjective, TaughtAttributeObjective
from dpal_edge.finetune.objectives.parsing import ParsingObjective
from dpal_edge.finetune.objectives.pose import PoseObjective
from dpal_edge.finetune.objectives.reid import EmbeddingObjective, IdentityObjective
from dpal_edge.models.checkpoint import is_ours, load_backbone, read_newest
from dpal_edge.models.encoders import SwinEncoder, VitEncoder
from dpal_edge.models.heads import SimCCHead
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.opening import open_teacher
from dpal_edge.models.students import (
    STUDENTS,
    Student,
    StudentConfig,
    build_student,
    init_student_weights,
    resize_student,
    student_config,
)
from dpal_edge.models.teacher_spec import parse_spec
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from dpal_edge.tasks.sample import Sample, Split
from dpal_edge.tasks.table import TASKS, parse_tasks

_GRID = (16, 8)  # patches of a person crop, unless a size is given
_RANDOM = "random:"


@dataclass(frozen=True)
class Start:
    """A backbone to begin with."""

    backbone: Student
    name: str  # architecture, for example vit_tiny
    facts: dict[str, Any]  # mean, std, teachers (passports of what it was distilled from) and what else is known
    trained: HumanModel | None = None  # with its heads, where it has some


def open_init(config: FinetuneConfig) -> Start:
    """Open what ``config.init`` names.

    Raises:
        ConfigError, ModelFileError: it is unknown, missing or damaged, or not a ViT or Swin of this project.
    """
    name = config.init
    if name.startswith(_RANDOM):
        student = name.removeprefix(_RANDOM)
        if student not in STUDENTS:
            raise ConfigError(f"init {name!r}: no student {student!r}, expected one of: {', '.join(STUDENTS)}")
        backbone = build_student(student_config(student, STUDENTS[student].size))
        init_student_weights(backbone, torch.Generator().manual_seed(config.seed))
        return Start(backbone, student, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "teachers": []})
    path = Path(name)
    path = read_newest(path)[0] if path.is_dir() else path
    if path.suffix == ".safetensors" and path.is_file() and is_ours(path):
        backbone, facts = load_backbone(path)
        return Start(backbone, facts["student"], facts, load_human(path)[0] if facts.get("heads") else None)
    encoder, origin = open_teacher(parse_spec(name))
    if not isinstance(encoder, VitEncoder | SwinEncoder):
        raise ConfigError(f"init {name!r}: timm's own models cannot be fine-tuned here; give the weights as FILE")
    backbone = encoder.vit if isinstance(encoder, VitEncoder) else encoder.swin
    family = origin.family
    facts = {"mean": family.mean, "std": family.std, "teachers": [], "origin": {"file": name, "sha256": origin.sha256}}
    facts["origin"] |= {"family": family.name, "licence": family.licence, "limits": family.limits}
    return Start(backbone, f"{config_family(backbone)} of width {backbone.config.width}", facts)


def config_family(backbone: Student) -> str:
    """Name the family of a backbone."""
    return "vit" if isinstance(backbone, VisionTransformer) else "swin"


def open_objectives(
    config: FinetuneConfig, size: tuple[int, int], student: StudentConfig
) -> tuple[dict[str, Objective], dict[str, Objective]]:
    """Read the tasks' data; return the objectives to train, and those of the held-out images.

    Args:
        size: height, width of person crops in pixels.
        student: the backbone, of which teachers ask the width and the patches.

    Raises:
        DataError: a folder is of no known layout, or more of its annotations are bad than is tolerated.
    """
    train: dict[str, Objective] = {}
    held: dict[str, Objective] = {}
    plain = replace(config, paste=None, backgrounds=None, detection_teacher=None)  # only their examples are used
    for task, folder in parse_tasks(config.task).items():
        split = _read(task, folder, config)
        kept, out = _hold_out(split, config.validation_images, config.seed)
        train[task] = _objective(task, kept, config, size, student)
        if out.samples:
            held[task] = _objective(task, out, plain, size, student)
    return train, held


def _read(task: str, folder: Path, config: FinetuneConfig) -> Split[Any]:
    if task in config.unlabelled:
        return Split(tuple(Sample(path, None) for path in find_images((str(folder),)).paths))
    return TASKS[task].read(folder, "train")


def _hold_out(split: Split[Any], count: int, seed: int) -> tuple[Split[Any], Split[Any]]:
    """Hold up to ``count`` samples out, at most a tenth, none of whose images is learned from.

    An image can hold several samples (its people, or itself where a data set repeats it): they go together, and what is
    more than is still to be held out is learned from. Labelled identities stay whole, since they need their batches.
    """
    if split.samples and hasattr(split.samples[0].target, "person"):
        return split, replace(split, samples=())
    number = Counter(sample.image for sample in split.samples)
    images = list(number)
    left = min(count, len(split.samples) // 10)
    held = set()
    for i in torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist():
        if number[images[i]] <= left:
            held.add(images[i])
            left -= number[images[i]]
    parts = [tuple(s for s in split.samples if (s.image in held) == out) for out in (False, True)]
    return replace(split, samples=parts[0]), replace(split, samples=parts[1])


def _objective(
    task: str, split: Split[Any], config: FinetuneConfig, size: tuple[int, int], student: StudentConfig
) -> Objective:
    augmentation = config.augmentation(task)
    if task == "pose":
        return PoseObjective(split, size, augmentation, config.pose_head, config.pose_channels)
    if task == "parsing":
        return ParsingObjective(split, size, augmentation, config.parsing_head, config.parsing_channels)
    if task == "attributes" and config.attribute_teacher:
        answers = AttributeTeacher.open(Path(config.attribute_teacher))
        images = [sample.image for sample in split.samples]
        return TaughtAttributeObjective(images, size, augmentation, answers, kind=config.attribute_head, mix=config.mix)
    if task == "attributes":
        return AttributeObjective(split, size, augmentation, config.attribute_head, config.attribute_loss)
    if task == "reid" and config.reid_teacher:
        teacher = EmbeddingTeacher.open(config.reid_teacher)
        images = [sample.image for sample in split.samples]
        kind, mix = config.embedding_head, config.mix
        return EmbeddingObjective(images, size, augmentation, teacher, kind=kind, mix=mix, width=student.width)
    if task == "reid":
        return IdentityObjective(split, size, augmentation, config.embedding_channels)
    return _detection_objective(split, config, student)


def _detection_objective(split: Split[Any], config: FinetuneConfig, student: StudentConfig) -> Objective:
    # Imported here: it needs torchvision, which takes its time, and no other task does.
    detection = import_module("dpal_edge.finetune.objectives.detection")
    teacher = None
    if config.detection_teacher:
        path = Path(config.detection_teacher)
        teacher = DetectionTeacher.open(path, size=config.detection_size, patch=student.patch_size)
    objective: Objective = detection.DetectionObjective(
        split,
        config.detection_size,
        paste=Path(config.paste) if config.paste else None,
        backgrounds=Path(config.backgrounds) if config.backgrounds else None,
        paste_share=config.paste_share,
        mosaic=config.mosaic,
        teacher=teacher,
        width=student.width,
    )
    return objective


def build_model(
    start: Start,
    objectives: Mapping[str, Objective],
    config: FinetuneConfig,
    *,
    earlier: Mapping[str, Any] | None = None,
) -> HumanModel:
    """Put a head for each task on the backbone; heads that the init has of the same config keep what they learned.

    Args:
        earlier: architecture that the run had, where it goes on.

    Raises:
        ConfigError: the tasks' images are of different sizes, or not of whole patches.
    """
    sizes = {objective.size for objective in objectives.values()}
    if len(sizes) > 1:
        raise ConfigError(
            "detection sees whole frames and the other tasks person crops: one model has one input size, so train "
            "detection in a run of its own"
        )
    [size] = sizes
    torch.manual_seed(config.seed)  # of the new heads
    window = config.window or _own_window(start.backbone, size)
    if earlier is not None:
        window = tuple(earlier["window"]) if earlier.get("window") else None
    backbone = resize_student(start.backbone, size, window=window)
    if isinstance(backbone, VisionTransformer):
        backbone.set_drop_path(config.drop_path)
    model = HumanModel(backbone, {task: objective.head for task, objective in objectives.items()})
    for task, head in (start.trained.heads if start.trained else nn.ModuleDict()).items():
        if start.trained and start.trained.configs[task] == model.configs.get(task):
            own = model.heads[task]
            if isinstance(own, SimCCHead) and isinstance(head, SimCCHead):  # has weights for each place
                own.adopt(head)
            else:
                own.load_state_dict(head.state_dict())
    _freeze(model, config)
    return model


def _own_window(backbone: Student, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the window that a ViT has learned to attend within, where it divides the patches of ``size``."""
    if not isinstance(backbone, VisionTransformer) or (window := backbone.config.window) is None:
        return None
    grid = [side // backbone.config.patch_size for side in size]
    return window if all(patches % rows == 0 for patches, rows in zip(grid, window, strict=True)) else None


def _freeze(model: HumanModel, config: FinetuneConfig) -> None:
    backbone = model.backbone
    if config.freeze_backbone:
        backbone.requires_grad_(False)
        return
    if not config.freeze_blocks:
        return
    if not isinstance(backbone, VisionTransformer) or config.freeze_blocks > len(backbone.blocks):
        raise ConfigError(f"freeze_blocks is {config.freeze_blocks}, expected blocks of a ViT, at most its depth")
    for name, parameter in backbone.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if name != "norm.weight" and name != "norm.bias" and (block is None or block < config.freeze_blocks):
            parameter.requires_grad_(False)


def crop_size(config: FinetuneConfig, start: Start) -> tuple[int, int]:
    """Return height and width of person crops: as set, the init's own, or 16x8 patches of what never saw any."""
    patch = start.backbone.config.patch_size
    if config.size is not None:
        if any(side <= 0 or side % patch for side in config.size):
            raise ConfigError(f"size is {config.size}, expected positive multiples of the patch size {patch}")
        return config.size
    detector = set(start.facts.get("heads") or ()) == {"detection"}
    foreign = "student" not in start.facts
    return (_GRID[0] * patch, _GRID[1] * patch) if detector or foreign else start.backbone.config.size


def digest(objectives: Mapping[str, Objective]) -> str:
    """Return a hash of the files to train on, in order."""
    files = (str(objective.file(i)) for objective in objectives.values() for i in range(len(objective)))
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def check_counts(objectives: Mapping[str, Objective], counts: Mapping[str, int]) -> None:
    """Refuse a head with batch norm over people that would see one person per update.

    Raises:
        ConfigError: there is one.
    """
    for task, objective in objectives.items():
        if objective.head.kind == "linear" and task == "attributes" and counts[task] < 2:
            raise ConfigError(
                f"{task} gets 1 image of each update, and its linear head normalises over several: raise batch, or its "
                f"share"
            )


def check_examples(objectives: Sequence[Objective]) -> None:
    """Refuse a task without an example.

    Raises:
        DataError: it has none.
    """
    for objective in objectives:
        if not len(objective):
            raise DataError(f"{objective.task}: no example to train on")
