"""The numbers of a run: averaged over logging intervals and processes, checked, and written."""

import json
import math
import time
from typing import Any

import torch

from dpal_edge.errors import DataError
from dpal_edge.files import append_lines, write_text
from dpal_edge.train.loop import TimedLoader, learning_rate
from dpal_edge.train.method import Values
from dpal_edge.train.saver import Saver
from dpal_edge.train.trackers import open_trackers
from dpal_edge.train.watcher import Record

_NAMED_FILES = 3  # of a bad batch in the message; all are in the file beside it


class Metrics:
    """Average what the loop yields over each logging interval; write ``metrics.jsonl`` and tell the trackers."""

    def __init__(self, saver: Saver, loader: TimedLoader) -> None:
        self.last: Record | None = None
        self._saver, self._state, self._config, self._loader = saver, saver.state, saver.config, loader
        self._path = saver.run / "metrics.jsonl"
        self._trackers = None
        if self._state.world.main:
            self._trackers = open_trackers(
                self._config.trackers, saver.run, self._config.to_dict(), after_step=self._state.step
            )
        self._begin()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._trackers is not None:
            self._trackers.close()

    def add(self, values: Values) -> Record | None:
        """Take the values of the update just done; at the end of an interval write and return its record.

        Raises:
            DataError: a loss is not finite. It is looked at here only, so that other updates need no sync.
        """
        self._values.append(values)
        step = self._state.step
        if step % self._config.log_every and step < self._config.steps:
            return None
        seconds = self._clock() - self._start
        names, gathered = self.check((self._loader.waited_s - self._waited) / seconds)
        means = torch.tensor([row for rows, _ in gathered for row in rows], dtype=torch.float64).mean(0)
        record = Record(
            step=step,
            images_per_s=len(self._values) * self._config.batch / seconds,
            data_wait=max(wait for _, wait in gathered),
            lr=learning_rate(step - 1, self._config),
            values=dict(zip(names, means.tolist(), strict=True)),
        )
        self.last = record
        if self._state.world.main:
            self._write(record)
        self._begin()
        return record

    def check(self, wait: float = 0.0) -> tuple[list[str], list[tuple[list[list[float]], float]]]:
        """Look at the interval so far; return names, and of every process a row for each update and its ``wait``.

        Raises:
            DataError: a loss is not finite; names the update, the term and the files.
        """
        if not self._values:
            return [], []
        names, rows = _to_host(self._values)
        gathered = self._state.world.gather((rows, wait, self._first_bad(names, rows)))
        if bad := next((found for _, _, found in gathered if found), None):
            raise DataError(self._report_bad(bad))
        return names, [(rows, wait) for rows, wait, _ in gathered]

    def _begin(self) -> None:
        """Start an interval after the update just done."""
        self._values: list[Values] = []
        self._start, self._waited = self._clock(), self._loader.waited_s

    def _clock(self) -> float:
        """Seconds, without those that went into checkpoints."""
        return time.perf_counter() - self._saver.seconds

    def _first_bad(self, names: list[str], rows: list[list[float]]) -> dict[str, Any] | None:
        """Return step, term and files of the first update whose loss is not finite.

        The gradients of an update that fp16 skipped may overflow; losses may not.
        """
        terms = [name for name in names if name not in ("loss", "grad_norm")]
        for step, row in enumerate(rows, self._state.step - len(rows) + 1):
            values = dict(zip(names, row, strict=True))
            if bad := [name for name in (*terms, "loss") if not math.isfinite(values[name])]:
                accumulate, batches = self._config.accumulate, self._loader.batches
                passes = range((step - 1) * accumulate, step * accumulate)
                return {"step": step, "term": bad[0], "files": [name for i in passes for name in batches.names(i)]}
        return None

    def _report_bad(self, bad: dict[str, Any]) -> str:
        path = self._saver.run / "not-finite.json"
        if self._state.world.main:
            write_text(path, json.dumps(bad, indent=2) + "\n")
        files = bad["files"]
        named = ", ".join(files[:_NAMED_FILES]) + (
            f" and {len(files) - _NAMED_FILES} more" if files[_NAMED_FILES:] else ""
        )
        return (
            f"the loss term {bad['term']!r} is not finite at update {bad['step']}, on {named} (all in {path}); "
            f"{self._saver.fallback()}, with a smaller --set base_lr or with --set precision=float32"
        )

    def _write(self, record: Record) -> None:
        numbers = {"images_per_s": record.images_per_s, "data_wait": record.data_wait, "lr": record.lr, **record.values}
        # JSON has no infinity, which the gradient norm of an update that fp16 skipped may be.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            append_lines(self._path, [{"step": record.step, **finite}])
        except OSError as error:
            raise DataError(
                f"{self._path}: cannot be written ({error.strerror}); free some space; {self._saver.fallback()}"
            ) from error
        if self._trackers is not None:
            self._trackers.log(record.step, numbers)


def _to_host(values: list[Values]) -> tuple[list[str], list[list[float]]]:
    """Turn the values of some updates into names and a row for each; only here the loop waits for the device."""
    names = [
        name if value.ndim == 0 else f"{name}/{i}" for name, value in values[0].items() for i in range(value.numel())
    ]
    rows = torch.stack([torch.cat([value.float().flatten() for value in update.values()]) for update in values])
    return names, rows.tolist()
