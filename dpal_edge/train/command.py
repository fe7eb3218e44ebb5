"""What ``dpal-edge train`` does with its options, and what it says at the end."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpal_edge.errors import ConfigError
from dpal_edge.models.teacher_spec import anchor
from dpal_edge.train.config import PRESETS, TrainConfig, build_config, parse_setting, read_config
from dpal_edge.train.data import split_validation
from dpal_edge.train.distributed import in_worker, launch
from dpal_edge.train.panel import Panel, named
from dpal_edge.train.preview import dry_run
from dpal_edge.train.run import Summary, run_training
from dpal_edge.train.setup import check_batch, read_run_config
from dpal_edge.train.sources import open_source
from dpal_edge.train.trackers import require_trackers

_SOURCES = ("data", "backgrounds", "crowd_data")  # settings that hold paths or URLs


def resolve(
    run: Path,
    *,
    preset: str | None = None,
    file: Path | None = None,
    settings: tuple[str, ...] = (),
    steps: int | None = None,
    epochs: float | None = None,
    resume: bool = False,
    **options: Any,
) -> TrainConfig:
    """Build the settings of a run: ``preset``, over it ``file``, ``options`` and ``settings``; what comes later wins.

    Args:
        run: the run folder; with ``resume`` its own settings come first.
        preset: a name of PRESETS.
        file: settings as YAML, TOML or JSON.
        settings: ``KEY=VALUE`` each.
        steps: updates.
        epochs: passes over the data, in place of ``steps``.
        resume: whether the run goes on.
        options: settings by name; None and empty ones were not given.

    Raises:
        ConfigError: one is unknown, of a wrong type or value, or in conflict with another; or a necessary one lacks.
        BackendUnavailable: a tracker is not installed.
    """
    begun = read_run_config(run) if resume else {}
    fields = begun | (PRESETS[preset] if preset else {}) | (read_config(file) if file else {})
    given = {**options, "steps": steps}
    fields |= {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value}
    fields |= dict(parse_setting(text) for text in settings)
    _check_method(fields, begun, preset)
    for name, option in (("teacher", "--teacher SPEC"), ("data", "--data DIR")):
        if not fields.get(name):
            raise ConfigError(f"no {name}: give {option}")
    if epochs is not None:
        if steps is not None:
            raise ConfigError("both --steps and --epochs are given; give one")
        fields["steps"] = _steps_of(epochs, build_config({**fields, "steps": 1}))
    config = _anchored(build_config(fields))
    require_trackers(config.trackers)
    return config


def train(
    config: TrainConfig,
    run: Path,
    *,
    resume: bool,
    dry: bool,
    processes: int | None,
    arguments: list[str],
    say: Callable[[str], object],
) -> int:
    """Train here, or in several processes that run the command once more, or only try; return the exit status.

    Args:
        config: the settings.
        run: the run folder.
        resume: go on from its newest checkpoint.
        dry: measure and draw what training would be, and save nothing of it.
        processes: on this machine; None is one for each GPU that the settings allow.
        arguments: the command line, without the name of the command.
        say: told the outcome.

    Raises:
        ConfigError, DataError, ModelFileError: as run_training.
    """
    count = processes or _one_per_gpu(config)
    if dry:
        say(dry_run(config, run, resume=resume, processes=count, say=say))
        return 0
    if count > 1 and not in_worker():
        check_batch(config, count)
        return launch(count, arguments)
    with Panel() as panel:
        summary = run_training(config, run, resume=resume, watcher=panel)
    if os.environ.get("RANK", "0") == "0":
        say(describe(summary, run, processes))
    return 130 if summary.interrupted else 0


def describe(summary: Summary, run: Path, processes: int | None = None) -> str:
    """Say in a few lines how a run ended and what to do next."""
    lines = []
    if summary.last is not None:
        values = summary.last.values.items()
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values if not name.startswith("usage/"))
        lines.append(
            f"{summary.images_per_s:.1f} images/s over {summary.seconds:.0f} s, "
            f"{100 * summary.data_wait:.1f} % of it waiting for data; {terms}"
        )
    if summary.validation:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in summary.validation.items())
        lines.append(f"loss on held-out images: {losses}")
    if summary.probes:
        lines.append("probe: " + ", ".join(f"{name} {score:.4g}" for name, score in summary.probes.items()))
    if summary.skipped:
        lines.append(
            f"skipped {len(summary.skipped)} unreadable files: {named(sorted(summary.skipped))}; "
            f"all are in {run / 'skipped.jsonl'}"
        )
    lines.append(f"report: {run / 'report.html'}")
    if summary.interrupted:
        more = f" --processes {processes}" if processes else ""
        lines.append(f"stopped after update {summary.step}; go on with: dpal-edge train --out {run} --resume{more}")
    else:
        lines.append(f"done: {summary.checkpoint}")
        lines.append(f"next: dpal-edge export {run} --target onnx --out BUNDLE")
    return "\n".join(lines)


def _check_method(fields: dict[str, Any], begun: dict[str, Any], preset: str | None) -> None:
    """Refuse settings of one method for another, which would otherwise be called unknown one by one."""
    method = fields.get("method", TrainConfig.method)
    if begun and method != begun.get("method", method):
        raise ConfigError(f"the run was begun with method {begun['method']}, not {method}; start a new run for another")
    if preset == "published" and method != "dpal":
        raise ConfigError(f"preset published is DPAL's, and the method is {method}; leave --preset out")


def _anchored(config: TrainConfig) -> TrainConfig:
    """Make paths absolute, so that resume and export find the same files from any folder."""
    sources: dict[str, Any] = {
        name: tuple(spec if "://" in spec else str(Path(spec).resolve()) for spec in getattr(config, name))
        for name in _SOURCES
    }
    tasks = (task.partition("=") for task in config.probe)
    cache = config.teacher_cache
    return replace(
        config,
        teacher=tuple(anchor(spec) for spec in config.teacher),
        probe=tuple(f"{name}={Path(folder).resolve()}" if equals else name for name, equals, folder in tasks),
        teacher_cache=None if cache is None else str(Path(cache).resolve()),
        **sources,
    )


def _steps_of(epochs: float, config: TrainConfig) -> int:
    if not (math.isfinite(epochs) and epochs > 0):
        raise ConfigError(f"--epochs is {epochs}, expected more than 0")
    train, _ = split_validation(open_source(config.data), config.validation_images, config.order_seed)
    return max(round(epochs * len(train) / config.batch), 1)


def _one_per_gpu(config: TrainConfig) -> int:
    return max(torch.cuda.device_count(), 1) if config.device in ("auto", "cuda") else 1
