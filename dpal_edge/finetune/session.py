"""What a run of fine-tuning has open, and what it keeps in its folder."""

import json
import platform
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge import __version__
from dpal_edge.errors import DataError, DpalEdgeError, ModelFileError
from dpal_edge.evaluate.command import read_splits
from dpal_edge.evaluate.labels import label_columns
from dpal_edge.evaluate.predictor import head_info
from dpal_edge.evaluate.validation import evaluate_model
from dpal_edge.files import append_lines, read_lines, write_text
from dpal_edge.finetune.config import FinetuneConfig
from dpal_edge.finetune.data import TaskBatch, read_example, stack
from dpal_edge.finetune.loop import State, build_state, validate
from dpal_edge.finetune.objective import Objective
from dpal_edge.finetune.setup import (
    build_model,
    check_counts,
    check_examples,
    crop_size,
    digest,
    open_init,
    open_objectives,
)
from dpal_edge.finetune.watcher import Watcher
from dpal_edge.models.checkpoint import CHECKPOINTS, Checkpoint, list_checkpoints, write_checkpoint
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.students import config_to_dict
from dpal_edge.tasks.sample import TOLERANCE
from dpal_edge.tasks.table import parse_tasks
from dpal_edge.train.distributed import World
from dpal_edge.train.loop import choose_device
from dpal_edge.train.memory import keep_freed_memory
from dpal_edge.train.optimizer import optimizer_tensors, restore_optimizer

MAY_CHANGE = frozenset(
    {"steps", "lr", "clip", "precision", "device", "workers", "log_every", "save_every", "keep", "trackers"}
    | {"batch", "evaluate_every", "evaluate_images"}
)  # between start and resume


_SKIPPED = "skipped.jsonl"


class Session:
    """A run from one start or resume to its next stop: what is open, and what it keeps in its folder."""

    def __init__(self, config: FinetuneConfig, folder: Path, watcher: Watcher, saved: Checkpoint | None) -> None:
        self.config, self.folder, self.watcher = config, folder, watcher
        torch.manual_seed(config.seed)  # of weights that only training needs
        start = open_init(config)
        self.facts = start.facts
        size = crop_size(config, start)
        self.objectives, held = open_objectives(config, size, start.backbone.config)
        check_examples(list(self.objectives.values()))
        self.counts = config.counts({task: len(objective) for task, objective in self.objectives.items()})
        check_counts(self.objectives, self.counts)
        self.digest = digest(self.objectives)
        earlier = saved.metadata["written"]["precision"] if saved else None
        device, precision = choose_device(config, World(), earlier=earlier)
        if device.type == "cpu":
            keep_freed_memory()
        model = build_model(start, self.objectives, config, earlier=saved.metadata["architecture"] if saved else None)
        had = start.trained.configs if start.trained and saved is None else {}
        self.dropped = sorted(had.keys() - model.configs.keys())
        self.replaced = {task for task, head in model.configs.items() if had.get(task, head) != head}  # of the init's
        mean, std = tuple(start.facts["mean"]), tuple(start.facts["std"])
        self.state = build_state(model, self.objectives, config, device, precision, mean=mean, std=std)
        self.name = start.name
        self.skipped: dict[str, str] = {}
        self.losses: dict[str, float] = {}
        self.held = _held_batches(held, self.counts, self.skipped)
        self.scores: dict[str, dict[str, float]] = {}
        folders = parse_tasks(config.task)
        self.folders = {task: folder for task, folder in folders.items() if task not in config.unlabelled}
        if config.evaluate_every:
            self._check_evaluation()
        if saved is not None:
            self._restore(saved)

    def _check_evaluation(self) -> None:
        """Refuse now what an evaluation hours from now would stumble over."""
        for task, splits in read_splits(self.folders, self.config.evaluate_images).items():
            config = self.state.model.configs[task]
            head = head_info(task, config.kind, config.labels)
            for split in splits.values() if head.labels else ():
                label_columns(split.labels, head, self.folders[task])

    def _restore(self, saved: Checkpoint) -> None:
        """Put the state back to where ``saved`` was written."""
        for task, head in self.state.model.configs.items():
            before, now = HeadConfig.from_dict(saved.metadata["heads"][task]).to_dict(), head.to_dict()
            if changed := [f"{name} were {before[name]}, are {now[name]}" for name in now if now[name] != before[name]]:
                raise ModelFileError(
                    f"{self.folder}: the head for {task} has changed since the run began: {', '.join(changed)}; put "
                    f"the data back"
                )
        if saved.metadata["images"]["sha256"] != self.digest:
            raise ModelFileError(f"{self.folder}: the images have changed since the run began; put them back")
        now = self._taught_by()
        for task, files in saved.metadata.get("taught_by", now).items():
            if files != now.get(task):
                raise ModelFileError(
                    f"{self.folder}: the teacher of {task} was {' and '.join(files)} when the run began, and is "
                    f"another file or has other contents now; name or put back the one that it was"
                )
        state = self.state
        model = {name: value for name, value in saved.tensors.items() if name.startswith(("backbone.", "heads."))}
        state.model.load_state_dict(model)
        ema = {f"backbone.{name}": value for name, value in saved.part("ema").items()}
        state.ema.load_state_dict(ema | {f"heads.{name}": value for name, value in saved.part("ema_heads").items()})
        state.objectives.load_state_dict(saved.part("objectives"))
        restore_optimizer(state.optimizer, _trainable(state), saved.part("optimizer"))
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
        if self.state.step < self.config.steps:  # what an earlier session could not use may be mended
            (self.folder / _SKIPPED).unlink(missing_ok=True)
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
            "tasks": {t: {"examples": len(o), "per_update": self.counts[t], "head": o.head.kind, "bad": len(o.problems),
                          "replaces": t in self.replaced}
                      for t, o in self.objectives.items()},
            "dropped": self.dropped,
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
        limits = dict.fromkeys((self.facts.get("limits", ""), *(o.limits for o in self.objectives.values())))
        inherited = {"licence": self.facts.get("licence"), "limits": " ".join(text for text in limits if text)}
        return {
            **{name: text for name, text in inherited.items() if text},
            "teachers": self.facts.get("teachers", []),
            "taught_by": self._taught_by(),
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

    def _taught_by(self) -> dict[str, dict[str, str]]:
        """Return, of the tasks that a teacher answers for, the hashes of the teacher's files by name."""
        return {task: dict(one.taught_by) for task, one in self.objectives.items() if one.taught_by}

    def evaluate(self) -> None:
        """Score the better weights on the evaluation parts of the labelled tasks; write ``scores.jsonl``.

        Where the data do not allow it the watcher is told, and the run goes on. What is scored already stays.
        """
        state, config = self.state, self.config
        if any(line["step"] == state.step for line in read_lines(self.folder / "scores.jsonl")):
            return
        model = state.model if self._best() == "backbone" else state.ema
        try:
            self.scores = evaluate_model(
                model, self.folders, mean=state.mean, std=state.std, device=state.device, limit=config.evaluate_images
            )
        except DpalEdgeError as error:  # few images may leave a metric undefined, and files may have gone since
            self.watcher.unevaluated(state.step, str(error))
            return
        append_lines(self.folder / "scores.jsonl", [{"step": state.step, **self.scores}])
        self.watcher.evaluated(state.step, self.scores)

    def _best(self) -> str:
        return min(self.losses, key=self.losses.__getitem__, default="ema")

    def check_skipped(self) -> None:
        """Write ``skipped.jsonl``; save and stop where too many files cannot be used.

        Raises:
            DataError: more than 5 % of the examples.
        """
        if not self.skipped:
            return
        lines = [{"file": file, "reason": reason} for file, reason in sorted(self.skipped.items())]
        write_text(self.folder / _SKIPPED, "".join(f"{json.dumps(line)}\n" for line in lines))
        total = sum(map(len, self.objectives.values()))
        if len(self.skipped) > TOLERANCE * total:
            reason = next(iter(self.skipped.values()))
            self.save()  # nothing is wrong with what was learned
            raise DataError(
                f"{len(self.skipped)} of {total} images cannot be used (more than {100 * TOLERANCE:g} %), for example "
                f"{reason}; all are in {self.folder / _SKIPPED}; what was learned is saved, --resume goes on"
            )


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return every tensor that an update changes, by the names of a checkpoint."""
    tensors = dict(state.model.state_dict())
    for name, value in state.ema.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"{'ema' if part == 'backbone' else 'ema_heads'}.{rest}"] = value
    tensors |= {f"objectives.{name}": value for name, value in state.objectives.state_dict().items()}
    moments = optimizer_tensors(state.optimizer, _trainable(state))
    return tensors | {f"optimizer.{name}": value for name, value in moments.items()}


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
