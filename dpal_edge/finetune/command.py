"""What ``dpal-edge finetune`` does with its options, and what it says."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpal_edge.errors import ConfigError
from dpal_edge.finetune.config import FinetuneConfig, build_config
from dpal_edge.finetune.presets import PRESETS
from dpal_edge.finetune.run import Summary, run_finetuning
from dpal_edge.finetune.watcher import Watcher
from dpal_edge.tasks.table import TEACHERS, parse_tasks
from dpal_edge.train.config import parse_setting, read_config
from dpal_edge.train.panel import named
from dpal_edge.train.setup import read_run_config

Say = Callable[[str], object]


def resolve(
    run: Path,
    *,
    preset: str | None = None,
    file: Path | None = None,
    settings: tuple[str, ...] = (),
    resume: bool = False,
    **options: Any,
) -> FinetuneConfig:
    """Build the settings of a run: ``preset``, over it ``file``, ``options`` and ``settings``; what comes later wins.

    Args:
        run: the run folder; with ``resume`` its own settings come first.
        preset: a name of PRESETS.
        file: settings as YAML, TOML or JSON.
        settings: ``KEY=VALUE`` each.
        resume: whether the run goes on.
        options: settings by name; None and empty ones were not given.

    Raises:
        ConfigError: one is unknown, of a wrong type or value, or in conflict with another; or a necessary one lacks.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    fields = (read_run_config(run) if resume else {}) | (PRESETS[preset] if preset else {})
    fields |= read_config(file) if file else {}
    fields |= {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value}
    fields |= _collect(settings)
    if not fields.get("init"):
        raise ConfigError("no init: give --init CHECKPOINT, or --init random:vit_tiny to learn from nothing")
    return _anchored(build_config(fields))


def finetune(config: FinetuneConfig, run: Path, *, resume: bool, say: Say) -> int:
    """Fine-tune, telling ``say`` how it goes; return the exit status.

    Raises:
        ConfigError, DataError, ModelFileError: as run_finetuning.
    """
    summary = run_finetuning(config, run, resume=resume, watcher=Lines(say))
    say(describe(summary, run))
    return 130 if summary.interrupted else 0


class Lines(Watcher):
    """Say a line for what happens, and keep one that changes where standard error is a terminal."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._live = sys.stderr.isatty()
        self._started, self._first, self._steps = time.monotonic(), 0, 0

    def started(self, facts: dict[str, Any]) -> None:
        """Say what is trained on what."""
        self._first, self._steps = facts["from_step"], facts["steps"]
        counts = facts["parameters"]
        heads = ", ".join(f"{task} {count / 1e6:.2f}" for task, count in counts.items() if task != "backbone")
        height, width = facts["size"]
        self._say(
            f"model      {facts['architecture']} of {counts['backbone'] / 1e6:.2f} M parameters from {facts['init']}; "
            f"heads in M: {heads}; {facts['trainable'] / 1e6:.2f} M train; input {height}x{width}"
        )
        for task, told in facts["tasks"].items():
            bad = f", {told['bad']} bad annotations left out (problems.jsonl)" if told["bad"] else ""
            head = f"{told['head']} head"
            if told["replaces"]:
                head = f"new {head} (the init's has another kind, other labels or channels)"
            self._say(f"{task:<11}{told['examples']} examples, {told['per_update']} in each update, {head}{bad}")
        if facts["dropped"]:
            self._say(f"not kept   the init's heads for {', '.join(facts['dropped'])}: no --task trains them here")
        self._say(f"device     {facts['device']} in {facts['precision']}")
        self._say(f"updates    {facts['from_step']} to {facts['steps']} of "
                  f"{sum(t['per_update'] for t in facts['tasks'].values())} images")  # fmt: skip

    def recorded(self, step: int, numbers: dict[str, float]) -> None:
        """Show progress on a terminal."""
        if self._live:
            sys.stderr.write(f"\r\033[K{self._line(step, numbers)}")
            sys.stderr.flush()

    def _line(self, step: int, numbers: dict[str, float]) -> str:
        per_update = (time.monotonic() - self._started) / max(step - self._first, 1)
        left = timedelta(seconds=round(per_update * (self._steps - step)))
        terms = ", ".join(
            f"{n} {v:.3f}" for n, v in numbers.items() if "/" not in n and n not in ("images_per_s", "lr")
        )
        return f"{step:,} of {self._steps:,} updates, {left} left, {numbers['images_per_s']:.1f} images/s; {terms}"

    def saved(self, path: Path, validation: dict[str, float]) -> None:
        """Say that a checkpoint was written."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in validation.items())
        self._note(f"saved {path.stem}" + (f"; loss on held-out images: {losses}" if losses else ""))

    def evaluated(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Say what the model is worth."""
        for task, metrics in scores.items():
            self._note(f"update {step}, {task}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))

    def unevaluated(self, step: int, reason: str) -> None:
        """Say why there are no metrics."""
        self._note(f"update {step} is not evaluated: {reason}")

    def stopping(self) -> None:
        """Say why nothing seems to happen for a moment."""
        self._note("stopping: saving what was learned; once more gives up at once")

    def _note(self, text: str) -> None:
        if self._live:
            sys.stderr.write("\r\033[K")
        self._say(text)


def describe(summary: Summary, run: Path) -> str:
    """Say in a few lines how a run ended and what to do next."""
    lines = [
        f"{summary.images_per_s:.1f} images/s over {summary.seconds:.0f} s on {summary.device} in {summary.precision}"
    ]
    if summary.skipped:
        lines.append(f"skipped {len(summary.skipped)} files that cannot be used: {named(sorted(summary.skipped))}; "
                     f"all are in {run / 'skipped.jsonl'}")  # fmt: skip
    if summary.interrupted:
        return "\n".join(
            [*lines, f"stopped after update {summary.step}; go on with: dpal-edge finetune --out {run} --resume"]
        )
    lines.append(f"done: {summary.checkpoint}")
    lines.append(f"next: dpal-edge evaluate {run} --task NAME=DIR, dpal-edge export {run} --target onnx --out BUNDLE")
    return "\n".join(lines)


def _collect(settings: tuple[str, ...]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` settings; what is a number for each task may be given once for each."""
    found: dict[str, Any] = {}
    for name, value in map(parse_setting, settings):
        if name in ("share", "weight") and isinstance(value, str):
            earlier = found.get(name, [])
            value = [*(earlier if isinstance(earlier, list) else [earlier]), value]
        found[name] = value
    return found


def _anchored(config: FinetuneConfig) -> FinetuneConfig:
    """Make the paths of data and models absolute, so that a resumed run finds them from any folder."""
    tasks = tuple(f"{task}={folder.resolve()}" for task, folder in parse_tasks(config.task).items())
    paths: dict[str, Any] = {
        name: str(Path(folder).resolve()) for name in ("paste", "backgrounds") if (folder := getattr(config, name))
    }
    for name in ("init", "detection_teacher", *TEACHERS.values()):
        file, mark, options = str(getattr(config, name) or "").partition("?")
        if file and Path(file).exists():
            paths[name] = f"{Path(file).resolve()}{mark}{options}"
    return replace(config, task=tasks, **paths)
