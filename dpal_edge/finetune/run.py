"""A run of fine-tuning from its start, or from where it was left, to its end or a stop."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dpal_edge.errors import DataError
from dpal_edge.files import append_lines
from dpal_edge.finetune.config import FinetuneConfig
from dpal_edge.finetune.data import Batch, Batches
from dpal_edge.finetune.loop import learning_rate, train
from dpal_edge.finetune.objective import Values
from dpal_edge.finetune.session import MAY_CHANGE, Session
from dpal_edge.finetune.watcher import Watcher
from dpal_edge.models.checkpoint import list_checkpoints
from dpal_edge.train.resume import checkpoint_to_resume
from dpal_edge.train.run import stop_signals
from dpal_edge.train.trackers import Trackers, open_trackers, require_trackers


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
    saved = checkpoint_to_resume(folder, config, MAY_CHANGE, resume=resume)
    require_trackers(config.trackers)
    session = Session(config, folder, watcher or Watcher(), saved)
    session.watcher.started(session.describe())
    session.write_start()
    return _follow(session)


def _follow(session: Session) -> Summary:
    """Run the loop to its end or to a stop signal, writing metrics, checkpoints and scores."""
    config, state = session.config, session.state
    batches = Batches(session.objectives, session.counts, config.seed)
    remaining = range(state.step, config.steps)
    loader = batches.loader(remaining, workers=_workers(session), pin=state.device.type == "cuda")
    trackers = open_trackers(config.trackers, session.folder, config.to_dict(), after_step=state.step)
    first, metrics = state.step, _Metrics(session, trackers)
    try:
        with stop_signals() as stopped:
            for batch, values in train(state, loader, config):
                session.skipped |= batch.skipped
                metrics.add(batch, values)
                if stopped:
                    session.watcher.stopping()
                    break
                if state.step < config.steps:
                    metrics.paused += _keep(session)
            seconds = time.perf_counter() - metrics.started - metrics.paused
            session.check_skipped()
            checkpoint = session.save()
            if config.evaluate_every and state.step == config.steps:  # after a stop signal there may be little time
                session.evaluate()
    finally:
        trackers.close()
    return Summary(
        checkpoint=checkpoint,
        step=state.step,
        interrupted=state.step < config.steps,
        device=str(state.device),
        precision=state.precision,
        seconds=seconds,
        images_per_s=(state.step - first) * sum(session.counts.values()) / max(seconds, 1e-9),
        values=metrics.last,
        validation=session.losses,
        problems={task: len(objective.problems) for task, objective in session.objectives.items()},
        skipped=session.skipped,
        scores=session.scores,
    )


def _workers(session: Session) -> int:
    """Leave a CPU's cores to the computation; feed a GPU with as many processes as there are cores."""
    if session.config.workers is not None:
        return session.config.workers
    return 1 if session.state.device.type == "cpu" else os.cpu_count() or 1


def _keep(session: Session) -> float:
    """Save and evaluate when the settings want it; return the seconds that took."""
    step, config, begun = session.state.step, session.config, time.perf_counter()
    if step % config.save_every == 0:
        session.save()
    if config.evaluate_every and step % config.evaluate_every == 0:
        session.evaluate()
    return time.perf_counter() - begun


class _Metrics:
    """Average what the loop yields over each logging interval; write ``metrics.jsonl`` and tell the trackers."""

    def __init__(self, session: Session, trackers: Trackers) -> None:
        self.started, self.paused = time.perf_counter(), 0.0
        self.last: dict[str, float] = {}
        self._session, self._trackers = session, trackers
        self._interval: list[Values] = []
        self._clock = 0.0

    def add(self, batch: Batch, values: Values) -> None:
        """Take the values of the update just done; at the end of an interval write their means.

        Raises:
            DataError: a loss is not finite, or too many files cannot be used.
        """
        session, state, config = self._session, self._session.state, self._session.config
        self._interval.append(values)
        if state.step % config.log_every and state.step < config.steps:
            return
        self.last = self._means(batch)
        now = time.perf_counter() - self.started - self.paused
        rate = len(self._interval) * sum(session.counts.values()) / (now - self._clock)
        numbers = {**self.last, "images_per_s": rate, "lr": learning_rate(state.step - 1, config)}
        append_lines(session.folder / "metrics.jsonl", [{"step": state.step, **numbers}])
        self._trackers.log(state.step, numbers)
        session.watcher.recorded(state.step, numbers)
        session.check_skipped()
        self._interval, self._clock = [], now

    def _means(self, batch: Batch) -> dict[str, float]:
        """Return the means of the interval; only here the loop waits for the device."""
        columns = {name: [values[name].float() for values in self._interval] for name in self._interval[0]}
        means = {name: float(torch.stack(column).mean()) for name, column in columns.items()}
        bad = [name for name, value in means.items() if name != "grad_norm" and not math.isfinite(value)]
        if bad:
            files = ", ".join(batch.files.get(bad[0].partition("/")[0], [])[:3])
            older = list_checkpoints(self._session.folder)
            back = f"{older[-1]} is intact, --resume goes on from there" if older else "no earlier checkpoint exists"
            raise DataError(
                f"the loss {bad[0]!r} is not finite by update {self._session.state.step} (the last batch began with "
                f"{files}); {back}, with a smaller --set lr or with --set precision=float32"
            )
        return means
