"""A run folder: settings, passport, metrics and checkpoints; start, stop and resume."""

import hashlib
import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError, ModelFileError
from dpal_edge.files import find_images, write_text
from dpal_edge.models.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    list_checkpoints,
    read_newest,
    write_checkpoint,
)
from dpal_edge.models.teacher import check_features, load_teacher, passport_fields
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import PersonBatches, split_validation
from dpal_edge.train.loop import (
    State,
    TimedLoader,
    build_state,
    choose_device,
    learning_rate,
    to_images,
    train,
    validate,
)

MAY_CHANGE = frozenset(
    {"steps", "workers", "device", "log_every", "save_every", "keep", "base_lr", "clip", "precision"}
)  # between start and resume
_CALLS = ("global", "local", "relation")


@dataclass(frozen=True)
class Record:
    """What one logging interval measured: a line of ``metrics.jsonl``."""

    step: int  # updates done
    images_per_s: float
    data_wait: float  # share of the interval spent waiting for data, 0..1
    lr: float
    values: dict[str, float]  # means over the interval: loss terms, gradient norm, usage/<call>/<expert>


@dataclass
class Summary:
    """How a run ended."""

    checkpoint: Path
    step: int
    interrupted: bool
    device: str
    precision: str
    seconds: float  # in the loop, this session
    images_per_s: float
    data_wait: float  # share of the loop's time, 0..1
    last: Record | None
    validation: dict[str, float]  # loss of backbone and ema on held-out images; empty without any
    skipped: dict[str, str] = field(default_factory=dict)  # unreadable files and why


class Watcher:
    """Told how a run goes; this one says nothing."""

    def started(self, facts: dict[str, Any]) -> None:
        """Receive what will be trained on what, before the first update."""

    def updated(self, step: int) -> None:
        """Receive the number of updates done."""

    def recorded(self, record: Record) -> None:
        """Receive each logging interval."""

    def stopping(self) -> None:
        """Hear that a signal came; what follows is saving."""


def run_training(config: TrainConfig, run: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Summary:
    """Distil ``config.teacher`` into ``config.student`` in the run folder ``run``.

    Writes ``config.json``, ``teacher.json`` (the passport), ``metrics.jsonl``, TensorBoard events,
    ``checkpoints/step-N.safetensors``, and ``skipped.jsonl`` if files were unreadable. Ctrl-C and SIGTERM finish the
    update in hand, save, and return.

    Args:
        config: the settings; on resume only those in MAY_CHANGE may differ from the run's.
        run: the run folder; it must not hold a run yet unless ``resume``.
        resume: go on from the newest checkpoint; on a CPU the weights become bit-equal to those of a run that was never
            interrupted.
        watcher: told how it goes.

    Raises:
        ConfigError, DataError, ModelFileError: before anything is written, or with the last checkpoint intact.
    """
    watcher = watcher or Watcher()
    saved = _checkpoint_to_resume(run, config) if resume else None
    if saved is None:
        _refuse_used(run)
    found = find_images(config.data)
    train_paths, validation_paths = split_validation(found.paths, config.validation_images, config.seed)
    device, precision = choose_device(config, earlier=saved.metadata["written"]["precision"] if saved else None)
    teacher = load_teacher(config.teacher, layer=config.teacher_layer, heads=config.teacher_heads)
    teacher.to(device)
    state = build_state(config, teacher, device, precision)
    probe = to_images(PersonBatches(train_paths, config, batch=min(8, len(train_paths)))[0], device)
    passport = {**passport_fields(teacher.passport), "feature_check": check_features(teacher, probe.base)}
    images = {"count": len(found.paths), "sha256": _digest(found.paths)}
    if saved is not None:
        _restore(state, saved, passport, images)
    watcher.started(_facts(state, passport, len(train_paths), len(validation_paths), found.ignored, config))

    write_text(run / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    write_text(run / "teacher.json", json.dumps(passport, indent=2) + "\n")
    validation = PersonBatches(validation_paths, config) if validation_paths else None
    saver = _Saver(run, config, {"teacher": passport, "images": images}, validation)
    return _follow(state, PersonBatches(train_paths, config), saver, watcher)


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the settings that the run in folder ``run`` was started with.

    Raises:
        ModelFileError: there is no such run.
    """
    try:
        return dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{run}: no run to resume (its config.json cannot be read); start without --resume"
        ) from error


def _follow(state: State, batches: PersonBatches, saver: "_Saver", watcher: Watcher) -> Summary:
    """Run the loop to its end or to a stop signal, writing metrics and checkpoints."""
    config = saver.config
    workers = _workers(config, state.device)
    loader = TimedLoader(batches, range(state.step, config.steps), workers=workers, device=state.device)
    started, first_step = time.perf_counter(), state.step
    try:
        with _stop_signals() as stopped, loader, _Metrics(saver, state.step, loader) as metrics:
            for batch, values in train(state, loader, config):
                saver.skipped.update(batch.skipped)
                watcher.updated(state.step)
                if record := metrics.add(state.step, values):
                    watcher.recorded(record)
                if stopped:
                    watcher.stopping()
                    break
                if state.step % config.save_every == 0 and state.step < config.steps:
                    saver.save(state)
            seconds = time.perf_counter() - started - saver.seconds
            checkpoint = saver.save(state)
    finally:
        saver.write_skipped()
    return Summary(
        checkpoint=checkpoint,
        step=state.step,
        interrupted=state.step < config.steps,
        device=str(state.device),
        precision=state.precision,
        seconds=seconds,
        images_per_s=(state.step - first_step) * config.batch / seconds,
        data_wait=loader.waited_s / seconds,
        last=metrics.last,
        validation=saver.losses,
        skipped=saver.skipped,
    )


class _Saver:
    """Write checkpoints into a run folder, newest ``keep`` kept, and say which weights of the last are best."""

    def __init__(
        self, run: Path, config: TrainConfig, origin: dict[str, Any], validation: PersonBatches | None
    ) -> None:
        self.run, self.config = run, config
        self.losses: dict[str, float] = {}  # of the last checkpoint's weights on held-out images
        self.skipped: dict[str, str] = {}  # unreadable files and why
        self.seconds = 0.0  # spent here so far; not part of the training speed
        self._origin, self._validation = origin, validation

    def save(self, state: State) -> Path:
        """Validate, write ``step-N.safetensors`` unless it is there, drop old ones, and return its path.

        Raises:
            DataError: the weights are not finite, or the file cannot be written; earlier checkpoints stay.
        """
        path = self.run / CHECKPOINTS / f"step-{state.step:08d}.safetensors"
        if path.exists():
            return path  # resumed at the very end: nothing has changed since
        start = time.perf_counter()
        try:
            if not all(parameter.isfinite().all() for parameter in state.method.backbone.parameters()):
                raise DataError(f"the weights are not finite at update {state.step}, so they are not saved")
            if self._validation is not None:
                count = -(-len(self._validation.paths) // self.config.batch)
                self.losses, skipped = validate(state, self._validation, count)
                self.skipped.update(skipped)
            write_checkpoint(path, state_tensors(state), self._metadata(state))
        except DataError as error:
            raise DataError(f"{error}; {self.fallback()}") from error
        for old in list_checkpoints(self.run)[: -self.config.keep]:
            old.unlink()
        self.seconds += time.perf_counter() - start
        return path

    def fallback(self) -> str:
        """Say from where a run that failed can go on."""
        older = list_checkpoints(self.run)
        return f"{older[-1]} is intact, --resume goes on from there" if older else "no earlier checkpoint exists"

    def write_skipped(self) -> None:
        """Write ``skipped.jsonl``, with what earlier sessions of the run skipped."""
        path = self.run / "skipped.jsonl"
        if not self.skipped:
            return
        earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [json.dumps({"file": file, "reason": reason}) for file, reason in self.skipped.items()]
        write_text(path, "\n".join(sorted({*earlier, *lines})) + "\n")

    def _metadata(self, state: State) -> dict[str, Any]:
        best = min(self.losses, key=self.losses.__getitem__, default="backbone")
        return {
            **self._origin,
            "student": self.config.student,
            "architecture": state.method.backbone.config.to_dict(),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "step": state.step,
            "best": best,
            "validation": self.losses,
            "config": self.config.to_dict(),
            "scaler": state.scaler.state_dict(),
            "written": {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "dpal_edge": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": str(state.device),
                "precision": state.precision,
            },
        }


class _Metrics:
    """Average what the loop yields over each logging interval; write ``metrics.jsonl`` and TensorBoard events."""

    def __init__(self, saver: _Saver, step: int, loader: TimedLoader) -> None:
        self.last: Record | None = None
        self._saver, self._config, self._loader = saver, saver.config, loader
        path = saver.run / "metrics.jsonl"
        if path.exists():  # drop what came after the checkpoint that training goes on from
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(saver.run / "tensorboard", purge_step=step + 1)
        self._begin(step)

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in (self._file, self._board):
            with suppress(OSError):  # lines are flushed as they are written: what fails here has failed there
                stream.close()

    def add(self, step: int, values: dict[str, Tensor]) -> Record | None:
        """Take the values of update ``step``; at the end of an interval write and return its record.

        Raises:
            DataError: the loss is not finite. It is looked at here only, so that other updates need no sync.
        """
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if step % self._config.log_every and step < self._config.steps:
            return None
        updates, seconds = step - self._first_step, self._clock() - self._start
        record = Record(
            step=step,
            images_per_s=updates * self._config.batch / seconds,
            data_wait=(self._loader.waited_s - self._waited) / seconds,
            lr=learning_rate(step - 1, self._config),
            values=dict(_flatten(self._sums, updates)),
        )
        # The gradients of an update that fp16 skipped may overflow; losses may not.
        if not all(math.isfinite(value) for name, value in record.values.items() if name != "grad_norm"):
            raise DataError(
                f"the loss is not finite at update {step}; {self._saver.fallback()}, with a smaller --set base_lr or "
                f"with --set precision=float32"
            )
        try:
            self._write(record)
        except OSError as error:
            raise DataError(
                f"{self._file.name}: cannot be written ({error.strerror}); free some space; {self._saver.fallback()}"
            ) from error
        self._begin(step)
        return record

    def _begin(self, step: int) -> None:
        """Start an interval after update ``step``."""
        self._sums: dict[str, Tensor] = {}
        self._first_step, self._start, self._waited = step, self._clock(), self._loader.waited_s

    def _clock(self) -> float:
        """Seconds, without those that went into checkpoints."""
        return time.perf_counter() - self._saver.seconds

    def _write(self, record: Record) -> None:
        self.last = record
        numbers = {"images_per_s": record.images_per_s, "data_wait": record.data_wait, "lr": record.lr, **record.values}
        # JSON has no infinity, which the gradient norm of an update that fp16 skipped may be.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": record.step, **finite}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, record.step)


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return every tensor that an update changes, by the names of a checkpoint."""
    tensors = state.method.student_state()
    tensors |= {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    for name, parameter in state.method.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _restore(state: State, saved: Checkpoint, passport: dict[str, Any], images: dict[str, Any]) -> None:
    """Put ``state`` back to where ``saved`` was written.

    Raises:
        ModelFileError: the teacher or the list of images is another than the run began with.
    """
    if (first := saved.metadata["images"]) != images:
        raise ModelFileError(
            f"the images have changed since the run began ({first['count']} then, {images['count']} now, or other "
            f"names): put them back, or start a new run"
        )
    before = saved.metadata["teacher"]
    if before["sha256"] != passport["sha256"]:
        raise ModelFileError(
            f"the teacher {passport['spec']} has changed since the run began (sha256 {passport['sha256']}, was "
            f"{before['sha256']}); put the old file back, or start a new run"
        )
    student = {k: v for k, v in saved.tensors.items() if not k.startswith(("ema.", "optimizer."))}
    absent = state.method.student_state().keys() - student.keys()
    if absent:
        raise ModelFileError(f"the checkpoint of update {saved.metadata['step']} lacks {', '.join(sorted(absent)[:3])}")
    state.method.load_state_dict(student, strict=False)  # the teacher is not in it
    state.ema.load_state_dict(saved.part("ema"))
    moments = saved.part("optimizer")
    for name, parameter in state.method.named_parameters():
        if f"{name}.step" in moments:  # none yet where fp16 skipped every update so far
            found = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            state.optimizer.state[parameter] = {key: value.to(state.device) for key, value in found.items()}
    state.scaler.load_state_dict(saved.metadata["scaler"])
    state.step = saved.metadata["step"]


def _digest(paths: tuple[Path, ...]) -> str:
    return hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()


def _checkpoint_to_resume(run: Path, config: TrainConfig) -> Checkpoint:
    """Read the newest checkpoint of ``run``.

    Raises:
        ModelFileError: none is there, or it is damaged; then the newest intact one before it is named.
        ConfigError: the run was started with other settings, or is finished.
    """
    _, saved = read_newest(run)
    before = saved.metadata["config"]
    changed = [k for k, v in config.to_dict().items() if v != before.get(k) and k not in MAY_CHANGE]
    if changed:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in changed)
        raise ConfigError(f"{run}: cannot resume with other settings; the run has {was}; start a new run for others")
    if saved.metadata["step"] >= config.steps:
        raise ConfigError(
            f"{run}: all {config.steps} updates are done; to train longer give more --steps with --resume"
        )
    return saved


def _refuse_used(run: Path) -> None:
    if list_checkpoints(run):
        raise ConfigError(f"{run}: already holds a run; go on with it by --resume, or choose another --out")


def _facts(
    state: State, passport: dict[str, Any], images: int, validation: int, ignored: tuple[Path, ...], config: TrainConfig
) -> dict[str, Any]:
    count = {name: sum(p.numel() for p in getattr(state.method, name).parameters()) for name in ("backbone", "decoder")}
    return {
        "student": config.student,
        "parameters": {**count, "teacher": passport["parameters"]},
        "teacher": passport,
        "images": images,
        "validation_images": validation,
        "ignored": [str(path) for path in ignored],
        "device": str(state.device),
        "precision": state.precision,
        "from_step": state.step,
        "steps": config.steps,
        "batch": config.batch,
    }


def _workers(config: TrainConfig, device: torch.device) -> int:
    """Leave a CPU's cores to the computation; feed a GPU with up to 16 processes."""
    if config.workers is not None:
        return config.workers
    return 1 if device.type == "cpu" else min(16, os.cpu_count() or 1)


def _flatten(sums: dict[str, Tensor], updates: int) -> Iterator[tuple[str, float]]:
    """Turn sums over ``updates`` into named means; the only place where the loop waits for the device."""
    for name, value in sums.items():
        mean = value.float() / updates
        if name == "usage":
            for call, row in zip(_CALLS, mean.tolist(), strict=True):
                yield from ((f"usage/{call}/{i}", share) for i, share in enumerate(row))
        else:
            yield name, mean.item()


def _step_of(line: str) -> float:
    """Return the step of a line of ``metrics.jsonl``; of one cut short by a crash, infinity, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that a first SIGINT or SIGTERM fills; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
