"""What a run tells whoever watches it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """What one logging interval measured: a line of ``metrics.jsonl``."""

    step: int  # updates done
    images_per_s: float  # over all processes
    data_wait: float  # share of the interval spent waiting for data, 0..1; of the process that waited most
    lr: float
    values: dict[
        str, float
    ]  # means over the interval and processes: loss terms, gradient norm, usage/<pattern>/<expert>


class Watcher:
    """Told how a run goes; this one says nothing."""

    def started(self, facts: dict[str, Any]) -> None:
        """Receive what will be trained on what, before the first update."""

    def updated(self, step: int) -> None:
        """Receive the number of updates done."""

    def recorded(self, record: Record) -> None:
        """Receive each logging interval."""

    def saved(self, path: Path, validation: dict[str, float]) -> None:
        """Receive each checkpoint and the losses of its weights on held-out images."""

    def probed(self, step: int, scores: dict[str, float]) -> None:
        """Receive what the frozen student is worth on the tasks of ``config.probe``."""

    def warned(self, text: str) -> None:
        """Receive in one line what went wrong without ending the run."""

    def stopping(self) -> None:
        """Hear that a signal came; what follows is saving."""
