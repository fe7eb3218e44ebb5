"""What ``dpal-edge train`` does with its options, and what a person sees of a run."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpal_edge.errors import ConfigError
from dpal_edge.files import find_images
from dpal_edge.train.config import PRESETS, TrainConfig, build_config, parse_setting, read_config
from dpal_edge.train.data import split_validation
from dpal_edge.train.run import Record, Summary, Watcher, read_run_config, run_training

_NAMED_FILES = 3  # files named in a line; the rest is counted
_FOLDERS = ("data", "backgrounds", "crowd_data")
_TERMS = ("loss", "global", "local", "relation", "router")


def train(
    run: Path,
    *,
    teacher: str | None = None,
    data: tuple[str, ...] = (),
    student: str | None = None,
    preset: str | None = None,
    file: Path | None = None,
    settings: tuple[str, ...] = (),
    steps: int | None = None,
    epochs: float | None = None,
    resume: bool = False,
) -> Summary:
    """Build the configuration from options (``settings`` win over ``file``, ``file`` over ``preset``) and train.

    Raises:
        ConfigError, DataError, ModelFileError: as run_training.
    """
    fields: dict[str, Any] = read_run_config(run) if resume else {}
    fields |= PRESETS[preset] if preset else {}
    fields |= read_config(file) if file else {}
    given = {"teacher": teacher, "data": list(data) or None, "student": student, "steps": steps}
    fields |= {name: value for name, value in given.items() if value is not None}
    fields |= dict(parse_setting(text) for text in settings)
    for name, option in (("teacher", "--teacher SPEC"), ("data", "--data DIR")):
        if not fields.get(name):
            raise ConfigError(f"no {name}: give {option}")
    if epochs is not None:
        fields["steps"] = _steps_of(epochs, steps, build_config({**fields, "steps": 1}))
    with ProgressBar() as bar:
        return run_training(_anchored(build_config(fields)), run, resume=resume, watcher=bar)


class ProgressBar(Watcher):
    """Say what starts, then show a bar with speed, loss terms and data wait; the bar only on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def started(self, facts: dict[str, Any]) -> None:
        """Print what is trained on what."""
        teacher, counts = facts["teacher"], facts["parameters"]
        ignored = _named(facts["ignored"])
        lines = [
            f"student   {facts['student']}, {counts['backbone'] / 1e6:.2f} M parameters, "
            f"with a train-only decoder of {counts['decoder'] / 1e6:.2f} M",
            f"teacher   {teacher['spec']}, {counts['teacher'] / 1e6:.1f} M parameters, layer {teacher['layer']}, "
            f"{100 * teacher['keys_matched']:.0f} % of keys matched, licence {teacher['licence']}",
            f"images    {facts['images']} to train on, {facts['validation_images']} held out"
            + (f"; {len(facts['ignored'])} files ignored, no images by name: {ignored}" if ignored else ""),
            f"device    {facts['device']} in {facts['precision']}",
            f"updates   {facts['from_step']} to {facts['steps']} of {facts['batch']} images",
        ]
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        self._bar = tqdm(
            total=facts["steps"],
            initial=facts["from_step"],
            unit="update",
            disable=None,  # silent when standard error is not a terminal
            dynamic_ncols=True,
        )

    def updated(self, step: int) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def recorded(self, record: Record) -> None:
        """Show the newest numbers."""
        terms = " ".join(f"{name} {record.values[name]:.3f}" for name in _TERMS if name in record.values)
        speed = f"{record.images_per_s:.1f} images/s, data wait {100 * record.data_wait:.0f} %"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{speed}, {terms}")

    def stopping(self) -> None:
        """Say why nothing seems to happen for a moment."""
        sys.stderr.write("\nstopping: saving what was learned; once more gives up at once\n")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(summary: Summary, run: Path) -> str:
    """Say in a few lines how a run ended and what to do next."""
    lines = []
    if summary.last is not None:
        terms = ", ".join(f"{name} {summary.last.values[name]:.4f}" for name in _TERMS)
        lines.append(
            f"{summary.images_per_s:.1f} images/s over {summary.seconds:.0f} s, "
            f"{100 * summary.data_wait:.1f} % of it waiting for data; {terms}"
        )
    if summary.validation:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in summary.validation.items())
        lines.append(f"loss on held-out images: {losses}")
    if summary.skipped:
        lines.append(
            f"skipped {len(summary.skipped)} unreadable files: {_named(sorted(summary.skipped))}; "
            f"all are in {run / 'skipped.jsonl'}"
        )
    if summary.interrupted:
        lines.append(f"stopped after update {summary.step}; go on with: dpal-edge train --out {run} --resume")
    else:
        lines.append(f"done: {summary.checkpoint}")
        lines.append(f"next: dpal-edge export {run} --target onnx --out BUNDLE")
    return "\n".join(lines)


def _anchored(config: TrainConfig) -> TrainConfig:
    """Make paths absolute, so that resume and export find the same files from any folder."""
    folders: dict[str, Any] = {
        name: tuple(str(Path(folder).resolve()) for folder in getattr(config, name)) for name in _FOLDERS
    }
    prefix, at, file = config.teacher.rpartition("@")
    if config.teacher.startswith("timm:"):
        teacher = f"{prefix}@{Path(file).resolve()}" if at else config.teacher
    else:
        teacher = str(Path(config.teacher).resolve())
    return replace(config, teacher=teacher, **folders)


def _named(files: list[str]) -> str:
    more = len(files) - _NAMED_FILES
    return ", ".join(files[:_NAMED_FILES]) + (f" and {more} more" if more > 0 else "")


def _steps_of(epochs: float, steps: int | None, config: TrainConfig) -> int:
    if not (math.isfinite(epochs) and epochs > 0):
        raise ConfigError(f"--epochs is {epochs}, expected more than 0")
    if steps is not None:
        raise ConfigError("both --steps and --epochs are given; give one")
    found = find_images(config.data)
    images = len(split_validation(found.paths, config.validation_images, config.seed)[0])
    return max(round(epochs * images / config.batch), 1)
