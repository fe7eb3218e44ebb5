"""Checkpoints of a run, and what is measured when one is written."""

import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge import __version__
from dpal_edge.errors import DataError, DpalEdgeError
from dpal_edge.files import append_lines, read_lines, write_text
from dpal_edge.models.checkpoint import CHECKPOINTS, list_checkpoints, write_checkpoint
from dpal_edge.models.students import config_to_dict
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dpal_edge.probe.probes import PROBES
from dpal_edge.probe.validation import probe_backbone
from dpal_edge.tasks.table import parse_tasks
from dpal_edge.train.augment import resolve_augment
from dpal_edge.train.data import PersonBatches
from dpal_edge.train.loop import State, validate
from dpal_edge.train.optimizer import optimizer_tensors
from dpal_edge.train.report import write_report
from dpal_edge.train.setup import Setup
from dpal_edge.train.watcher import Watcher


class Saver:
    """Write checkpoints into a run folder, newest ``keep`` kept; validate and probe what they hold.

    With several processes all of them come here; the first one writes.
    """

    def __init__(self, run: Path, setup: Setup, watcher: Watcher) -> None:
        self.run, self.config, self.state = run, setup.config, setup.state
        self.losses = setup.losses  # of the last checkpoint's weights on held-out images
        self.scores: dict[str, float] = {}  # of the last probe
        self.skipped: dict[str, str] = {**setup.data.train.skipped, **setup.data.validation.skipped}
        self.seconds = 0.0  # spent here so far; not part of the training speed
        self._setup, self._watcher = setup, watcher
        self._saved = self.state.step or None  # what a run goes on from was saved; all processes must know alike
        probes = [line["step"] for line in read_lines(run / "probes.jsonl")]
        self._probed = self.state.world.gather(probes[-1] if probes else None)[0]
        size = min(
            self.config.batch // self.config.accumulate // self.state.world.size, len(setup.data.validation.names)
        )
        config = resolve_augment(self.config, self.state.device)
        self._validation = (
            PersonBatches(setup.data.validation, config, self.state.method.views, batch=size) if size else None
        )

    @property
    def due(self) -> bool:
        """Whether the settings want a checkpoint of this update."""
        return self.state.step % self.config.save_every == 0

    def probe_when_due(self) -> None:
        """Probe after as many updates as the settings say."""
        if self.state.step and self.state.step % self.config.probe_every == 0:
            self.probe()

    def save(self) -> Path:
        """Validate, write ``step-N.safetensors`` unless this was done, drop old ones, and return its path.

        Raises:
            DataError: the weights are not finite, or the file cannot be written; earlier checkpoints stay.
        """
        state = self.state
        path = self.run / CHECKPOINTS / f"step-{state.step:08d}.safetensors"
        if self._saved == state.step:
            return path
        start = time.perf_counter()
        try:
            if not all(parameter.isfinite().all() for parameter in state.method.backbone.parameters()):
                raise DataError(f"the weights are not finite at update {state.step}, so they are not saved")
            if self._validation is not None:
                self.losses, skipped = validate(state, self._validation)
                self.skipped.update(skipped)
            for skipped in state.world.gather(self.skipped):
                self.skipped |= skipped
            if state.world.main:
                self._write(path)
                self._write_skipped()
        except DataError as error:
            raise DataError(f"{error}; {self.fallback()}") from error
        state.world.wait()
        self._saved = state.step
        self.seconds += time.perf_counter() - start
        return path

    def probe(self) -> None:
        """Probe the better of backbone and running mean on the tasks of the settings."""
        if not self.config.probe or self._probed == self.state.step:
            return
        start = time.perf_counter()
        if self.state.world.main:
            self._probe()
        self.state.world.wait()
        self._probed = self.state.step
        self.seconds += time.perf_counter() - start

    def _probe(self) -> None:
        backbone = self.state.ema if self._best() == "ema" else self.state.method.backbone
        try:
            self.scores = probe_backbone(
                backbone,
                parse_tasks(self.config.probe, PROBES),
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                size=self.config.size,
                device=self.state.device,
                limit=self.config.probe_images,
            )
        except DpalEdgeError as error:  # an image that has become unreadable must not end days of training
            self._watcher.warned(f"no probe at update {self.state.step}: {error}")
            return
        append_lines(self.run / "probes.jsonl", [{"step": self.state.step, **self.scores}])
        self._watcher.probed(self.state.step, self.scores)

    def fallback(self) -> str:
        """Say from where a run that failed can go on."""
        older = list_checkpoints(self.run)
        return f"{older[-1]} is intact, --resume goes on from there" if older else "no earlier checkpoint exists"

    def finish(self) -> None:
        """Write the report, and what was skipped since the last checkpoint."""
        if self.state.world.main:
            self._write_skipped()
            write_report(self.run)

    def _write_skipped(self) -> None:
        """Write ``skipped.jsonl``, with what earlier sessions of the run skipped."""
        path = self.run / "skipped.jsonl"
        if self.skipped:
            earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            lines = [json.dumps({"file": file, "reason": reason}) for file, reason in self.skipped.items()]
            write_text(path, "\n".join(sorted({*earlier, *lines})) + "\n")

    def _write(self, path: Path) -> None:
        write_checkpoint(path, state_tensors(self.state), self._metadata())
        for old in list_checkpoints(self.run)[: -self.config.keep]:
            old.unlink()
        if self.losses:
            append_lines(self.run / "validation.jsonl", [{"step": self.state.step, **self.losses}])
        self._watcher.saved(path, self.losses)

    def _best(self) -> str:
        return min(self.losses, key=self.losses.__getitem__, default="backbone")

    def _metadata(self) -> dict[str, Any]:
        state, setup = self.state, self._setup
        return {
            "teachers": setup.passports,
            "images": {"count": setup.data.count, "sha256": setup.data.digest},
            "method": self.config.method,
            "student": self.config.student,
            "architecture": config_to_dict(state.method.backbone.config),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "step": state.step,
            "best": self._best(),
            "validation": self.losses,
            "config": self.config.to_dict(),
            "changes": setup.changes,
            "scaler": state.scaler.state_dict(),
            "written": {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "dpal_edge": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": str(state.device),
                "precision": state.precision,
                "processes": state.world.size,
            },
        }


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return every tensor that an update changes, by the names of a checkpoint."""
    tensors = state.method.student_state()
    tensors |= {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    moments = optimizer_tensors(state.optimizer, dict(state.method.named_parameters()))
    return tensors | {f"optimizer.{name}": value for name, value in moments.items()}
