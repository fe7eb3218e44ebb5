"""The settings of fine-tuning: one frozen dataclass, checked once, saved whole in every checkpoint."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dpal_edge.errors import ConfigError
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.tasks.table import TASKS, TEACHERS, parse_tasks, unlabelled_tasks
from dpal_edge.train.config import check_fields, coerce

_POSITIVE = ("steps", "batch", "lr", "log_every", "save_every", "keep", "parsing_channels", "embedding_channels",
             "evaluate_images")  # fmt: skip
_SHARES = ("warmup", "layer_decay", "ema_decay", "drop_path", "mix", "paste_share", "mosaic")
_PEOPLE, PER_PERSON = 2, 4  # people at least, and images of each, in an update that learns labelled identities
_WEIGHTS = {"attributes": 0.1}  # a sum over attributes would drown the others
_FAR_SHARE = 0.5  # of views that a teacher of embeddings sees, reduced as if the person were far away
_GENTLE_TURN = 10.0  # degrees: people who are recognised stand upright


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run."""

    # What is trained on what
    init: str = ""  # checkpoint, run folder, published weights or teacher FILE; random:STUDENT learns from nothing
    task: tuple[str, ...] = ()  # NAME=DIR each
    size: tuple[int, int] | None = None  # height, width of crops in pixels; None: the init's own, or 16x8 patches
    detection_size: tuple[int, int] = (384, 512)  # height, width of whole frames
    pose_head: Literal["simcc", "heatmap"] = "simcc"
    parsing_head: Literal["upsample", "linear"] = "upsample"
    attribute_head: Literal["query", "linear"] = "query"
    attribute_loss: Literal["weighted", "adjusted"] = (
        "weighted"  # of labels; adjusted: a score of 0.5 balances recall, not odds
    )
    parsing_channels: int = 128  # of the convolutions of the upsampling head
    pose_channels: int = 128  # of those of the simcc head; 0: it has one convolution alone
    embedding_head: Literal["strips", "linear"] = "strips"  # of an embedding learned from a teacher
    embedding_channels: int = 256  # of an embedding learned from identities; a teacher's has the teacher's
    reid_teacher: str | None = None  # FILE[?color=bgr]: embeddings to learn from, on the unlabelled images of reid=DIR
    attribute_teacher: str | None = None  # checkpoint with a head for attributes: learned, on those of attributes=DIR
    detection_teacher: str | None = None  # checkpoint with a head for detection: learned beside the boxes
    freeze_backbone: bool = False  # train heads alone
    freeze_blocks: int = 0  # of a ViT: the embedding and so many blocks stay as they are, which also saves time
    window: tuple[int, int] | None = None  # rows, columns of patches that most blocks of a detector attend within;
    # None: the init's own where it fits, else all

    # Which images an update sees
    batch: int = 64  # images per update, over all tasks
    share: tuple[str, ...] = ()  # TASK=NUMBER: its part of the batch; by default the square root of its images
    weight: tuple[str, ...] = ()  # TASK=NUMBER: its loss is multiplied by; 0.1 for attributes by default, 1 for others
    mix: float = 0.3  # share of unlabelled views that join the halves of two people
    paste: str | None = None  # folder of masked people (LIP layout): they become synthetic crowds for detection
    backgrounds: str | None = None  # folder of images without people, for those crowds
    paste_share: float = 0.5  # share of a detector's images that are such crowds
    mosaic: float = 0.0  # share of its other images that join views of several frames

    # Augmentation of person crops (finetune/augment.py); views of whole frames have their own (finetune/frames.py)
    flip: float = 0.5
    scale: float = 0.25
    rotate: float = 30.0  # of pose and parsing; the others turn by 10 degrees at most
    rotate_share: float = 0.6
    shift: float = 0.08
    colour: float = 0.3
    hue: float = 0.3  # of unlabelled views alone: the teacher sees what became of the clothes, a label does not
    grey: float = 0.05
    muted: float = 0.0  # of unlabelled views alone, as hue
    low_resolution: float = 0.2
    erase: float = 0.0

    # Optimisation
    steps: int = 2000  # optimizer updates
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of blocks
    lr: float = 5e-4  # peak learning rate of the heads, for this batch
    layer_decay: float = 0.8  # factor from each block to the one before it
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the run with a linearly rising learning rate
    drop_path: float = 0.0  # stochastic depth of the last block of a ViT
    clip: float = 1.0  # greatest gradient norm; 0 is none
    ema_decay: float = 0.999  # of the model's running mean, per update, reached after a warm-up
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it fast

    # The machine and the run folder
    device: str = "auto"
    workers: int | None = None  # processes that decode and augment; None chooses
    seed: int = 0
    log_every: int = 20  # updates between lines of metrics.jsonl
    save_every: int = 500  # updates between checkpoints
    keep: int = 2  # newest checkpoints that stay
    evaluate_every: int | None = None  # updates between evaluations on the tasks' evaluation parts; None or 0: never
    evaluate_images: int = 200  # of each, at most
    validation_images: int = 64  # of each task, held out to choose between the weights and their running mean
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        check_fields(self, positive=_POSITIVE, shares=_SHARES)
        for name in ("clip", "weight_decay", "validation_images", "workers", "seed", "freeze_blocks", "pose_channels",
                     "evaluate_every"):  # fmt: skip
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        self.augmentation("pose")  # checks its fields
        self._check_tasks()

    def _check_tasks(self) -> None:
        if not self.task:
            raise ConfigError("no task to train: give --task NAME=DIR")
        tasks = parse_tasks(self.task)
        for name in ("share", "weight"):
            numbers = self._numbers(name)
            if unknown := numbers.keys() - tasks.keys():
                raise ConfigError(f"{name} names {', '.join(unknown)}, expected tasks of this run: {', '.join(tasks)}")
        for task in sorted(self.unlabelled - tasks.keys()):
            setting = TEACHERS[task]
            raise ConfigError(f"{setting} is given, but no unlabelled images to learn from: give --task {task}=DIR")
        if self.detection_teacher and "detection" not in tasks:
            raise ConfigError("detection_teacher is given, but no frames to learn from: give --task detection=DIR")
        least = sum(self._least(task) for task in tasks)
        if self.batch < least:
            people = f", of labelled reid {PER_PERSON} of each of {_PEOPLE} people" if least > len(tasks) else ""
            raise ConfigError(f"batch is {self.batch}, expected at least {least}: an image of each task{people}")

    def _least(self, task: str) -> int:
        """Return how few images of a task an update can learn from: identities are told from each other."""
        return _PEOPLE * PER_PERSON if task == "reid" and task not in self.unlabelled else 1

    def _numbers(self, name: str) -> dict[str, float]:
        """Parse ``TASK=NUMBER`` settings."""
        found = {}
        for text in getattr(self, name):
            task, _, value = text.partition("=")
            if "," in value:
                raise ConfigError(f"{name} {text!r}: one TASK=NUMBER; repeat --set {name}=TASK=NUMBER for each task")
            number = coerce(float, value, f"{name} {text!r}")
            if task not in TASKS or number <= 0:
                raise ConfigError(f"{name} {text!r}: expected TASK=NUMBER, for example pose=2, the number above 0")
            found[task] = number
        return found

    def counts(self, examples: dict[str, int]) -> dict[str, int]:
        """Divide the batch by ``share``, or by the square root of ``examples``; each task gets at least one image.

        Labelled re-identification gets 4 images of each of two people or more, and alone may not fill the batch.
        """
        given = self._numbers("share")
        parts = {task: given.get(task, float(count) ** 0.5 if not given else 1.0) for task, count in examples.items()}
        total, counts = sum(parts.values()), {task: self._least(task) for task in parts}
        steps = {task: PER_PERSON if count > 1 else 1 for task, count in counts.items()}
        while fitting := [task for task in parts if sum(counts.values()) + steps[task] <= self.batch]:
            lacking = {task: (self.batch * parts[task] / total - counts[task]) / steps[task] for task in fitting}
            task = max(lacking, key=lacking.__getitem__)
            counts[task] += steps[task]
        return counts

    def loss_weight(self, task: str) -> float:
        """Return the factor of a task's loss."""
        return self._numbers("weight").get(task, _WEIGHTS.get(task, 1.0))

    def augmentation(self, task: str) -> Augmentation:
        """Return how views for ``task`` are made."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Augmentation)}
        if task not in ("pose", "parsing"):
            fields["rotate"] = min(self.rotate, _GENTLE_TURN)
        if task in self.unlabelled:
            # The teacher is shown the view itself, so it may differ as much as cameras and lamps do.
            fields["colour"] = min(2 * self.colour, 0.9)
            fields["low_resolution"] = max(self.low_resolution, _FAR_SHARE)
        else:
            fields["hue"] = fields["muted"] = 0.0
        return Augmentation(**fields)

    @property
    def unlabelled(self) -> frozenset[str]:
        """The tasks that a teacher answers for: their folders hold images and nothing else."""
        return unlabelled_tasks(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def build_config(fields: dict[str, Any]) -> FinetuneConfig:
    """Build a config from parsed JSON, TOML or YAML values, lists standing for tuples.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one out of range.
    """
    hints = typing.get_type_hints(FinetuneConfig)
    if unknown := fields.keys() - hints.keys():
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(sorted(hints))}")
    return FinetuneConfig(**{name: coerce(hints[name], value, name) for name, value in fields.items()})
