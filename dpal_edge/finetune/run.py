"""A run of fine-tuning from its start, or from where it was left, to its end or a stop."""

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge import __version__
from dpal_edge.errors import ConfigError, DataError, ModelFileError
from dpal_edge.evaluate.command import read_splits
from dpal_edge.evaluate.validation import evaluate_model
from dpal_edge.files import append_lines, read_lines, write_text
from dpal_edge.finetune.config import FinetuneConfig
from dpal_edge.finetune.data import Batch, Batches, TaskBatch, read_example, stack
from dpal_edge.finetune.loop import State, build_state, learning_rate, train, validate
from dpal_edge.finetune.objective import Objective, Values
from dpal_edge.finetune.setup import build_model, check_examples, crop_size, digest, open_init, open_objectives
from dpal_edge.models.checkpoint import CHECKPOINTS, Checkpoint, list_checkpoints, read_newest, write_checkpoint
from dpal_edge.models.students import config_to_dict
from dpal_edge.tasks.sample import TOLERANCE
from dpal_edge.tasks.table import parse_tasks
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import choose_device
from dpal_edge.train.run import stop_signals
from dpal_edge.train.trackers import open_trackers, require_trackers

MAY_CHANGE = frozenset(
    {"steps", "lr", "clip", "precision", "device", "workers", "log_every", "save_every", "keep", "trackers"}
    | {"evaluate_every", "evaluate_images"}
)  # between start and resume


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
    values: dict[str, float]  # means of the last interval
    validation: dict[str, float]  # loss of backbone and ema on held-out images; empty without any
    problems: dict[str, int]  # bad annotations by task
    skipped: dict[str, str]  # files that could not be used, and why
    scores: dict[str, dict[str, float]]  # of the last evaluation, by task


class Watcher:
    """Told how a run goes; this one says nothing."""

    def started(self, facts: dict[str, Any]) -> None:
        """Receive what will be trained on what."""

    def recorded(self, step: int, numbers: dict[str, float]) -> None:
        """Receive each logging interval."""

    def saved(self, path: Path, validation: dict[str, float]) -> None:
        """Receive each checkpoint and the losses of its weights on held-out images."""

    def evaluated(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Receive metrics by task."""

    def stopping(self) -> None:
        """Hear that a signal came; what follows is saving."""


class _Run:
    """The run folder and what is open of it."""

    def __init__(self, config: FinetuneConfig, folder: Path, watcher: Watcher, saved: Checkpoint | None) -> None:
        self.config, self.folder, self.watcher = config, folder, watcher
        torch.manual_seed(config.seed)  # of weights that only training needs
        start = open_init(config)
        self.facts = start.facts
        size = crop_size(config, start.backbone)
        self.objectives, held = open_objectives(config, size)
        check_examples(list(self.objectives.values()))
        self.counts = config.counts({task: len(objective) for task, objective in self.objectives.items()})
        self.digest = digest(self.objectives)
        earlier = saved.metadata["written"]["precision"] if saved else None
        device, precision = choose_device(config, World(), earlier=earlier)
        model = build_model(start, self.objectives, config)
        mean, std = tuple(start.facts["mean"]), tuple(start.facts["std"])
        self.state = build_state(model, self.objectives, config, device, precision, mean=mean, std=std)
        self.name = start.name
        self.skipped: dict[str, str] = {}
        self.losses: dict[str, float] = {}
        self.held = _held_batches(held, self.counts, self.skipped)
        self.scores: dict[str, dict[str, float]] = {}
        self.folders = {
            task: folder
            for task, folder in parse_tasks(config.task).items()
            if not (task == "reid" and config.reid_teacher)
        }
        if config.evaluate_every:
            read_splits(self.folders)  # what an evaluation hours from now will need
        if saved is not None:
            self._restore(saved)

    def _restore(self, saved: Checkpoint) -> None:
        """Put the state back to where ``saved`` was written."""
        if saved.metadata["images"]["sha256"] != self.digest:
            raise ModelFileError(f"{self.folder}: the images have changed since the run began; put them back")
        state = self.state
        model = {name: value for name, value in saved.tensors.items() if name.startswith(("backbone.", "heads."))}
        state.model.load_state_dict(model)
        ema = {f"backbone.{name}": value for name, value in saved.part("ema").items()}
        state.ema.load_state_dict(ema | {f"heads.{name}": value for name, value in saved.part("ema_heads").items()})
        state.objectives.load_state_dict(saved.part("objectives"))
        moments = saved.part("optimizer")
        for name, parameter in _trainable(state).items():
            if f"{name}.step" in moments:
                found = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                state.optimizer.state[parameter] = {key: value.to(state.device) for key, value in found.items()}
        if state.scaler.is_enabled() and saved.metadata["scaler"]:
            state.scaler.load_state_dict(saved.metadata["scaler"])
        state.step, self.losses = saved.metadata["step"], saved.metadata["validation"]

    def write_start(self) -> None:
        """Write what is known before the first update; drop numbers of updates that a crash undid."""
        for folder in (self.folder, self.folder / CHECKPOINTS):
            for partial in folder.glob(".*.partial*"):
                partial.unlink(missing_ok=True)
        write_text(self.folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
        problems = [{"task": t, "problem": text} for t, o in self.objectives.items() for text in o.problems]
        write_text(self.folder / "problems.jsonl", "".join(f"{json.dumps(line)}\n" for line in problems))
        for name in ("metrics.jsonl", "validation.jsonl", "scores.jsonl"):
            kept = [line for line in read_lines(self.folder / name) if line["step"] <= self.state.step]
            write_text(self.folder / name, "".join(f"{json.dumps(line)}\n" for line in kept))

    def describe(self) -> dict[str, Any]:
        """Return what will be trained on what."""
        model = self.state.model
        return {
            "init": self.config.init,
            "architecture": self.name,
            "size": list(model.backbone.config.size),
            "parameters": {"backbone": _count(model.backbone), **{t: _count(h) for t, h in model.heads.items()}},
            "trainable": sum(p.numel() for g in self.state.optimizer.param_groups for p in g["params"]),
            "tasks": {t: {"examples": len(o), "per_update": self.counts[t], "head": o.head.kind, "bad": len(o.problems)}
                      for t, o in self.objectives.items()},
            "device": str(self.state.device),
            "precision": self.state.precision,
            "from_step": self.state.step,
            "steps": self.config.steps,
        }  # fmt: skip

    def save(self) -> Path:
        """Validate, write ``step-N.safetensors``, drop old ones, and return its path.

        Raises:
            DataError: the weights are not finite, or the file cannot be written; earlier checkpoints stay.
        """
        state = self.state
        path = self.folder / CHECKPOINTS / f"step-{state.step:08d}.safetensors"
        if path.exists():
            return path
        if not all(parameter.isfinite().all() for parameter in state.model.parameters()):
            raise DataError(f"the weights are not finite at update {state.step}, so they are not saved")
        if self.held:
            self.losses = validate(state, self.held, self.config)
            append_lines(self.folder / "validation.jsonl", [{"step": state.step, **self.losses}])
        write_checkpoint(path, state_tensors(state), self._metadata())
        for old in list_checkpoints(self.folder)[: -self.config.keep]:
            old.unlink()
        self.watcher.saved(path, self.losses)
        return path

    def _metadata(self) -> dict[str, Any]:
        state = self.state
        return {
            "teachers": self.facts.get("teachers", []),
            "origin": self.facts.get("origin"),
            "images": {"count": sum(map(len, self.objectives.values())), "sha256": self.digest},
            "student": self.name,
            "architecture": config_to_dict(state.model.backbone.config),
            "heads": {task: config.to_dict() for task, config in state.model.configs.items()},
            "mean": state.mean,
            "std": state.std,
            "step": state.step,
            "best": self._best(),
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

    def evaluate(self) -> None:
        """Score the better weights on the evaluation parts of the labelled tasks; write ``scores.jsonl``."""
        state, config = self.state, self.config
        model = state.model if self._best() == "backbone" else state.ema
        self.scores = evaluate_model(
            model, self.folders, mean=state.mean, std=state.std, device=state.device, limit=config.evaluate_images
        )
        append_lines(self.folder / "scores.jsonl", [{"step": state.step, **self.scores}])
        self.watcher.evaluated(state.step, self.scores)

    def _best(self) -> str:
        return min(self.losses, key=self.losses.__getitem__, default="ema")

    def check_skipped(self) -> None:
        """Write ``skipped.jsonl``; stop where too many files cannot be used.

        Raises:
            DataError: more than 5 % of the examples.
        """
        if not self.skipped:
            return
        lines = [{"file": file, "reason": reason} for file, reason in sorted(self.skipped.items())]
        write_text(self.folder / "skipped.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        total = sum(map(len, self.objectives.values()))
        if len(self.skipped) > TOLERANCE * total:
            reason = next(iter(self.skipped.values()))
            raise DataError(
                f"{len(self.skipped)} of {total} images cannot be used (more than {100 * TOLERANCE:g} %), for example "
                f"{reason}; all are in {self.folder / 'skipped.jsonl'}"
            )


def run_finetuning(
    config: FinetuneConfig, folder: Path, *, resume: bool = False, watcher: Watcher | None = None
) -> Summary:
    """Fine-tune ``config.init`` on ``config.task`` in the run folder ``folder``.

    Writes ``config.json``, ``problems.jsonl``, ``metrics.jsonl``, ``validation.jsonl``, ``scores.jsonl``,
    ``checkpoints/step-N.safetensors``, what the trackers write, and ``skipped.jsonl`` if files could not be used.
    Ctrl-C and SIGTERM finish the update in hand, save, and return. On a CPU a resumed run ends with the weights of one
    that was never interrupted, bit for bit.

    Raises:
        ConfigError, DataError, ModelFileError: before anything is written, or with the last checkpoint intact.
    """
    saved = _checkpoint_to_resume(folder, config) if resume else None
    if saved is None and list_checkpoints(folder):
        raise ConfigError(f"{folder}: already holds a run; go on with it by --resume, or choose another --out")
    require_trackers(config.trackers)
    run = _Run(config, folder, watcher or Watcher(), saved)
    run.watcher.started(run.describe())
    run.write_start()
    return _follow(run)


def _follow(run: _Run) -> Summary:
    config, state = run.config, run.state
    workers = (
        config.workers if config.workers is not None else (1 if state.device.type == "cpu" else os.cpu_count() or 1)
    )
    batches = Batches(run.objectives, run.counts, config.seed)
    loader = batches.loader(range(state.step, config.steps), workers=workers, pin=state.device.type == "cuda")
    trackers = open_trackers(config.trackers, run.folder, config.to_dict(), after_step=state.step)
    interval: list[Values] = []
    first, started, clock, saving = state.step, time.perf_counter(), time.perf_counter(), 0.0
    last: dict[str, float] = {}
    try:
        with stop_signals() as stopped:
            for batch, values in train(state, loader, config):
                interval.append(values)
                run.skipped |= batch.skipped
                if state.step % config.log_every == 0 or state.step == config.steps:
                    last = _means(interval, batch, state, run)
                    rate = len(interval) * sum(run.counts.values()) / (time.perf_counter() - clock)
                    numbers = {**last, "images_per_s": rate, "lr": learning_rate(state.step - 1, config)}
                    append_lines(run.folder / "metrics.jsonl", [{"step": state.step, **numbers}])
                    trackers.log(state.step, numbers)
                    run.watcher.recorded(state.step, numbers)
                    run.check_skipped()
                    interval, clock = [], time.perf_counter()
                if stopped:
                    run.watcher.stopping()
                    break
                begun = time.perf_counter()
                if state.step % config.save_every == 0 and state.step < config.steps:
                    run.save()
                if state.step % (config.evaluate_every or config.steps + 1) == 0 and state.step < config.steps:
                    run.evaluate()
                saving += time.perf_counter() - begun
                clock += time.perf_counter() - begun
        seconds = time.perf_counter() - started - saving
        checkpoint = run.save()
        if config.evaluate_every and state.step == config.steps:  # after a stop signal there may be little time
            run.evaluate()
    finally:
        trackers.close()
    return Summary(
        checkpoint=checkpoint,
        step=state.step,
        interrupted=state.step < config.steps,
        device=str(state.device),
        precision=state.precision,
        seconds=seconds,
        images_per_s=(state.step - first) * sum(run.counts.values()) / max(seconds, 1e-9),
        values=last,
        validation=run.losses,
        problems={task: len(objective.problems) for task, objective in run.objectives.items()},
        skipped=run.skipped,
        scores=run.scores,
    )


def _means(interval: list[Values], batch: Batch, state: State, run: _Run) -> dict[str, float]:
    """Return the means of an interval; only here the loop waits for the device.

    Raises:
        DataError: a loss is not finite.
    """
    means = {name: float(torch.stack([v[name].float() for v in interval]).mean()) for name in interval[0]}
    bad = [name for name, value in means.items() if name != "grad_norm" and not math.isfinite(value)]
    if bad:
        task = bad[0].partition("/")[0]
        files = ", ".join(batch.files.get(task, [])[:3])
        older = list_checkpoints(run.folder)
        back = f"{older[-1]} is intact, --resume goes on from there" if older else "no earlier checkpoint exists"
        raise DataError(
            f"the loss {bad[0]!r} is not finite by update {state.step} (the last batch began with {files}); {back}, "
            f"with a smaller --set lr or with --set precision=float32"
        )
    return means


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return every tensor that an update changes, by the names of a checkpoint."""
    tensors = dict(state.model.state_dict())
    for name, value in state.ema.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"{'ema' if part == 'backbone' else 'ema_heads'}.{rest}"] = value
    tensors |= {f"objectives.{name}": value for name, value in state.objectives.state_dict().items()}
    for name, parameter in _trainable(state).items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _trainable(state: State) -> dict[str, Tensor]:
    named = [*state.model.named_parameters(), *((f"objectives.{n}", p) for n, p in state.objectives.named_parameters())]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _held_batches(
    held: Mapping[str, Objective], counts: Mapping[str, int], skipped: dict[str, str]
) -> list[Mapping[str, TaskBatch]]:
    """Read the held-out images of all tasks, plain, as batches of the training's proportions."""
    if not held:
        return []
    rounds = min(-(-len(objective) // counts[task]) for task, objective in held.items())

    def batches() -> Iterator[Mapping[str, TaskBatch]]:
        for i in range(max(rounds, 1)):
            yield {
                task: stack([
                    read_example(objective, j % len(objective), None, skipped)[1]
                    for j in range(i * counts[task], (i + 1) * counts[task])
                ])
                for task, objective in held.items()
            }  # fmt: skip

    return list(batches())


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _checkpoint_to_resume(folder: Path, config: FinetuneConfig) -> Checkpoint | None:
    """Read the newest checkpoint of a run; None if it has none yet.

    Raises:
        ModelFileError: it is damaged.
        ConfigError: the run was started with other settings, or has done more updates than it is to do.
    """
    if not list_checkpoints(folder):
        return None
    _, saved = read_newest(folder)
    before = saved.metadata["config"]
    changed = [k for k, v in config.to_dict().items() if v != before.get(k) and k not in MAY_CHANGE]
    if changed:
        was = ", ".join(f"{key}={before.get(key)!r}" for key in changed)
        raise ConfigError(f"{folder}: cannot resume with other settings; the run has {was}; start a new run for others")
    if saved.metadata["step"] > config.steps:
        raise ConfigError(f"{folder}: steps is {config.steps}, but {saved.metadata['step']} updates are done already")
    return saved
