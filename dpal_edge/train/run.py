"""A run from its start, or from where it was left, to its end or a stop."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dpal_edge.errors import ConfigError, DataError, DpalEdgeError
from dpal_edge.files import read_lines, write_text
from dpal_edge.models.checkpoint import CHECKPOINTS
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.distributed import Vote, joined
from dpal_edge.train.loop import is_out_of_memory, train
from dpal_edge.train.metrics import Metrics
from dpal_edge.train.saver import Saver
from dpal_edge.train.setup import Setup, prepare
from dpal_edge.train.watcher import Record, Watcher


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
    probes: dict[str, float]  # the last scores by task; empty without any
    skipped: dict[str, str] = field(default_factory=dict)  # unreadable files and why


def run_training(config: TrainConfig, run: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Summary:
    """Distil ``config.teacher`` into ``config.student`` in the run folder ``run``.

    Writes ``config.json``, ``teachers.json`` (the passports), ``metrics.jsonl``, ``validation.jsonl``,
    ``probes.jsonl``, ``changes.jsonl``, ``checkpoints/step-N.safetensors``, ``report.html``, what the trackers write,
    and ``skipped.jsonl`` if files were unreadable. Ctrl-C and SIGTERM finish the update in hand, save, and return.

    As one of several processes (started by ``launch`` or torchrun) it trains on its part of each batch; the first one
    writes. Views, order and updates do not depend on the number of processes.

    Args:
        config: the settings; on resume only those in MAY_CHANGE may differ from the run's.
        run: the run folder; it must not hold a run yet unless ``resume``.
        resume: go on from the newest checkpoint, or begin if there is none yet; on a CPU the weights become bit-equal
            to those of a run that was never interrupted.
        watcher: told how it goes; only the first process's is.

    Raises:
        ConfigError, DataError, ModelFileError: before anything is written, or with the last checkpoint intact.
    """
    with joined(config.device) as world:
        watcher = (watcher or Watcher()) if world.main else Watcher()
        try:
            setup = prepare(config, run, world, resume=resume)
            watcher.started(setup.facts())
            if world.main:
                _write_start(run, setup)
            world.wait()
            return _follow(setup, run, watcher)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"too little memory outside the updates, for teachers, validation or a probe "
                f"({str(error).splitlines()[0]}); take a larger accumulate, which makes validation smaller as well"
            ) from error


def _follow(setup: Setup, run: Path, watcher: Watcher) -> Summary:
    """Run the loop to its end or to a stop signal, writing metrics and checkpoints."""
    config, state = setup.config, setup.state
    saver = Saver(run, setup, watcher)
    saver.probe_when_due()  # if the last session ended between saving and probing
    started, first_step = time.perf_counter(), state.step
    loader = setup.loader(config.steps)
    vote = Vote(state.world)
    try:
        with stop_signals() as stopped, loader, Metrics(saver, loader) as metrics:
            for batches, values in train(state, loader, config):
                saver.skipped.update(skip for batch in batches for skip in batch.skipped)
                watcher.updated(state.step)
                if record := metrics.add(values):
                    watcher.recorded(record)
                if vote(bool(stopped)):
                    watcher.stopping()
                    break
                if state.step < config.steps:
                    if saver.due:
                        metrics.check()
                        saver.save()
                    saver.probe_when_due()
            metrics.check()
            seconds = time.perf_counter() - started - saver.seconds
            checkpoint = saver.save()
            if state.step == config.steps:  # after a stop signal there may be little time
                saver.probe()
    except DpalEdgeError:
        with suppress(DataError):  # a full disk must not hide what came first
            saver.finish()
        raise
    saver.finish()
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
        probes=saver.scores,
        skipped=saver.skipped,
    )


def _write_start(run: Path, setup: Setup) -> None:
    """Write what is known before the first update, and remove what a killed process left half-written."""
    for folder in (run, run / CHECKPOINTS):
        for partial in folder.glob(".*.partial*"):
            partial.unlink(missing_ok=True)
    write_text(run / "config.json", json.dumps(setup.config.to_dict(), indent=2) + "\n")
    write_text(run / "teachers.json", json.dumps(setup.passports, indent=2) + "\n")
    for name in ("metrics.jsonl", "validation.jsonl", "probes.jsonl"):  # drop what is to be done again
        lines = read_lines(run / name)
        if kept := [line for line in lines if line["step"] <= setup.state.step]:
            write_text(run / name, "".join(f"{json.dumps(line)}\n" for line in kept))
        else:
            (run / name).unlink(missing_ok=True)
    if setup.changes:
        write_text(run / "changes.jsonl", "".join(json.dumps(change) + "\n" for change in setup.changes))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
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
