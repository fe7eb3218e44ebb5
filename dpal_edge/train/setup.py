"""A run before its next update: data, teachers, state, and what an earlier session of it left."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.checkpoint import Checkpoint
from dpal_edge.models.encoders import VitEncoder
from dpal_edge.models.slicing import explained, slice_vit
from dpal_edge.models.teacher import Teacher, Teachers, check_features, load_teachers, passport_fields
from dpal_edge.models.vit import VisionTransformer
from dpal_edge.probe.command import read_splits
from dpal_edge.probe.probes import PROBES
from dpal_edge.tasks.table import parse_tasks
from dpal_edge.train.augment import resolve_augment, to_views
from dpal_edge.train.cache import TargetCache
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import PersonBatches, split_validation
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import State, TimedLoader, build_state, choose_device
from dpal_edge.train.memory import keep_freed_memory
from dpal_edge.train.methods.dpal import new_student
from dpal_edge.train.optimizer import restore_optimizer
from dpal_edge.train.resume import checkpoint_to_resume
from dpal_edge.train.sources import ImageSource, open_source
from dpal_edge.train.trackers import require_trackers

MAY_CHANGE = frozenset(
    {"steps", "accumulate", "base_lr", "clip", "precision", "device", "compile", "workers", "augment", "teacher_cache"}
    | {"log_every", "save_every", "keep", "probe", "probe_every", "probe_images", "trackers"}
)  # between start and resume; every change is recorded by name


_SLICED_TOKENS = 65536  # patches that a student is fitted to when it is sliced from its teacher
_SLICED_BATCH = 32  # images decoded at a time for that


@dataclass(frozen=True)
class Data:
    """The images of a run, split."""

    train: ImageSource
    validation: ImageSource
    digest: str  # of names and order, those of backgrounds and crowds among them
    count: int


@dataclass(frozen=True)
class Setup:
    """A run that is ready for its next update."""

    config: TrainConfig
    state: State
    data: Data
    passports: list[dict[str, Any]]
    changes: list[dict[str, Any]]  # settings that a resume changed: step, name, before, after
    losses: dict[str, float]  # of the restored weights on held-out images; empty at the start
    explained: float | None = None  # share of the teacher's variance that a student just sliced from it explains

    def batches(self, processes: int | None = None) -> PersonBatches:
        """Return this process's part of the batches to train on, among ``processes`` or those there are."""
        world, config = self.state.world, resolve_augment(self.config, self.state.device)
        size = processes or world.size
        return PersonBatches(self.data.train, config, self.state.method.views, rank=world.rank, world=size)

    def loader(self, stop: int) -> TimedLoader:
        """Return the passes of the next update up to update ``stop``."""
        return TimedLoader(
            self.batches(),
            range(self.state.step, stop),
            workers=worker_count(self.config, self.state.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            device=self.state.device,
            accumulate=self.config.accumulate,
        )

    def facts(self) -> dict[str, Any]:
        """Return what will be trained on what, to be shown."""
        config, state = self.config, self.state
        trainable = sum(p.numel() for p in state.method.parameters() if p.requires_grad)
        backbone = sum(p.numel() for p in state.method.backbone.parameters())
        in_backbone = sum(p.numel() for p in state.method.backbone.parameters() if p.requires_grad)
        teachers = sum(passport["parameters"] for passport in self.passports)
        return {
            "student": config.student,
            "explained": self.explained,
            "method": config.method,
            "parameters": {"backbone": backbone, "train_only": trainable - in_backbone, "teachers": teachers},
            "teachers": self.passports,
            "images": len(self.data.train.names),
            "validation_images": len(self.data.validation.names),
            "ignored": list(self.data.train.ignored),
            "device": str(state.device),
            "precision": state.precision,
            "processes": state.world.size,
            "from_step": state.step,
            "steps": config.steps,
            "batch": config.batch,
            "accumulate": config.accumulate,
            "changes": [change for change in self.changes if change["step"] == state.step],
        }


def prepare(config: TrainConfig, run: Path, world: World, *, resume: bool = False) -> Setup:
    """Read the newest checkpoint, find the data, load the teachers and build the state; write nothing.

    Raises:
        ConfigError, DataError, ModelFileError: as run_training.
    """
    check_batch(config, world.size)
    saved = checkpoint_to_resume(run, config, MAY_CHANGE, resume=resume)
    require_trackers(config.trackers)
    read_splits(parse_tasks(config.probe, PROBES), config.probe_images, 0)  # what a probe hours from now will need
    data = _open_data(config) if world.local_rank == 0 else None
    world.wait()  # one process of each machine lists the data; the others find what it has indexed
    data = data or _open_data(config)
    device, precision = choose_device(config, world, earlier=saved.metadata["written"]["precision"] if saved else None)
    teachers = load_teachers(config.teacher, layer=config.teacher_layer, size=config.size)
    if device.type == "cpu":
        keep_freed_memory()
    teachers.to(device)
    first, share = None, None
    if config.start == "sliced" and saved is None:
        first, share = _slice_student(teachers.teacher("local"), config, data.train, device)
    state = build_state(config, teachers, device, precision, world, first)
    passports = _checked_passports(teachers, data.train, config, device)
    changes = _restore(state, saved, config, passports, data) if saved is not None else []
    if len(set(world.gather((state.step, data.digest, *(passport["sha256"] for passport in passports))))) > 1:
        raise ConfigError(
            f"{run}: the processes do not see the same run, images and teachers; give all machines one shared --out, "
            f"and the same data and teachers"
        )
    state.cache = _open_cache(config, state, passports, data)
    losses = saved.metadata["validation"] if saved else {}
    return Setup(config, state, data, passports, changes, losses, share)


def check_batch(config: TrainConfig, processes: int) -> None:
    """Refuse a batch that ``processes`` cannot share equally.

    Raises:
        ConfigError: with one near it that they can.
    """
    parts = config.accumulate * processes
    if config.batch % parts:
        raise ConfigError(
            f"batch is {config.batch}, expected a multiple of {processes} processes times accumulate="
            f"{config.accumulate}; for example --set batch={max(config.batch // parts, 1) * parts}"
        )


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the settings that the run in the folder ``run`` began with; none if no run has begun there.

    Raises:
        ModelFileError: its config.json is damaged.
    """
    path = run / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read; give the run's settings again, beside --resume") from error


def _restore(
    state: State, saved: Checkpoint, config: TrainConfig, passports: list[dict[str, Any]], data: Data
) -> list[dict[str, Any]]:
    """Put ``state`` back to where ``saved`` was written; return all changes of settings since the run began.

    Raises:
        ModelFileError: a teacher or the list of images is another than the run began with.
    """
    metadata = saved.metadata
    if (first := metadata["images"]) != {"count": data.count, "sha256": data.digest}:
        raise ModelFileError(
            f"the images have changed since the run began ({first['count']} then, {data.count} now, or others of "
            f"them, or other backgrounds or crowds): put them back, or start a new run"
        )
    for before, now in zip(metadata["teachers"], passports, strict=True):
        if before["sha256"] != now["sha256"]:
            raise ModelFileError(
                f"the teacher {now['spec']} has changed since the run began (sha256 {now['sha256']}, was "
                f"{before['sha256']}); put the old file back, or start a new run"
            )
    student = {k: v for k, v in saved.tensors.items() if not k.startswith(("ema.", "optimizer."))}
    absent = state.method.student_state().keys() - student.keys()
    if absent:
        raise ModelFileError(f"the checkpoint of update {metadata['step']} lacks {', '.join(sorted(absent)[:3])}")
    state.method.load_state_dict(student, strict=False)  # the teachers are not in it
    state.ema.load_state_dict(saved.part("ema"))
    restore_optimizer(state.optimizer, dict(state.method.named_parameters()), saved.part("optimizer"))
    if state.scaler.is_enabled() and metadata["scaler"]:
        state.scaler.load_state_dict(metadata["scaler"])
    state.step = metadata["step"]
    return [*metadata["changes"], *_changes(metadata, config, state)]


def _changes(metadata: dict[str, Any], config: TrainConfig, state: State) -> list[dict[str, Any]]:
    """Return by name what differs from the session that wrote ``metadata``."""
    written = metadata["written"]
    machine = {
        "processes": state.world.size,
        "precision used": state.precision,
        "device used": state.device.type,
        "torch": torch.__version__,
    }
    earlier = {
        "processes": written["processes"],
        "precision used": written["precision"],
        "device used": written["device"].partition(":")[0],
        "torch": written["torch"],
    }
    before, after = {**metadata["config"], **earlier}, {**config.to_dict(), **machine}
    return [
        {"step": state.step, "name": name, "before": before.get(name), "after": value}
        for name, value in after.items()
        if before.get(name) != value
    ]


def _open_data(config: TrainConfig) -> Data:
    source = open_source(config.data)
    train, validation = split_validation(source, config.validation_images, config.order_seed)
    others = [open_source(specs).digest for specs in (config.backgrounds, config.crowd_data) if specs]
    digest = hashlib.sha256(" ".join([source.digest, *others]).encode()).hexdigest()
    return Data(train, validation, digest, len(source.names))


def _slice_student(
    teacher: Teacher, config: TrainConfig, source: ImageSource, device: torch.device
) -> tuple[VisionTransformer, float]:
    """Slice the student out of a teacher in float32; return it and what share of the teacher's variance it explains.

    Raises:
        ConfigError: student and teacher are no ViTs that fit each other.
    """
    encoder, student = teacher.encoder, new_student(config, torch.Generator()).to(device)
    if not (isinstance(encoder, VitEncoder) and isinstance(student, VisionTransformer)):
        raise ConfigError(
            "start=sliced needs a ViT as student and one of this project's ViTs as teacher; others take start=random"
        )
    count = min(_SLICED_TOKENS // math.prod(student.config.grid), len(source.names)) // _SLICED_BATCH
    crops = PersonBatches(source, config, ("base",), batch=_SLICED_BATCH)
    images = torch.cat([to_views(crops[i], device).base for i in range(max(count, 2))])
    with torch.no_grad():
        seen = teacher.prepare(images)
    held = max(len(images) // 16, 1)
    basis = slice_vit(student, encoder.vit, images[held:], seen[held:], layer=encoder.layer)
    return student, explained(student, encoder.vit, images[:held], seen[:held], basis, layer=encoder.layer)


def _checked_passports(
    teachers: Teachers, source: ImageSource, config: TrainConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Return the passports, each with the check of its teacher's features on real crops."""
    crops = PersonBatches(source, config, ("base",), batch=min(8, len(source.names)))[0]
    base = to_views(crops, device).base
    return [
        {**passport_fields(teacher.passport), "feature_check": check_features(teacher, base)}
        for teacher in teachers.each()
    ]


def _open_cache(config: TrainConfig, state: State, passports: list[dict[str, Any]], data: Data) -> TargetCache | None:
    """Open the teacher cache for exactly these teachers, images, views and this precision."""
    if config.teacher_cache is None or config.view_variants is None:
        return None
    views = ("size", "local_size", "crowd_size", "crowd", "crowd_source", "crowd_data", "backgrounds", "augment")
    settings = resolve_augment(config, state.device).to_dict()
    identity = {
        "teachers": [
            {key: value for key, value in passport.items() if key != "feature_check"} for passport in passports
        ],
        "images": data.digest,
        "held_out": len(data.validation.names),
        "seed": config.order_seed,
        "variants": config.view_variants,
        "method": f"{config.method} {settings.get('recipe', '')} {config.student}",  # who asks for what
        "precision": state.precision,
        "device": state.device.type,
        "views": {name: settings[name] for name in views},
    }
    rows = config.view_variants * len(data.train.names)
    return TargetCache(Path(config.teacher_cache), rows, identity)


def worker_count(config: TrainConfig, device: torch.device, processes: int) -> int:
    """Leave a CPU's cores to the computation; feed a GPU with up to 16 processes, an equal share of the machine's.

    ``processes`` is the number of training processes on this machine.
    """
    if config.workers is not None:
        return config.workers
    return 1 if device.type == "cpu" else max(1, min(16, (os.cpu_count() or 1) // processes))
