"""What a run tells whoever watches it."""

from pathlib import Path
from typing import Any


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

    def unevaluated(self, step: int, reason: str) -> None:
        """Hear why there are no metrics of this update."""

    def stopping(self) -> None:
        """Hear that a signal came; what follows is saving."""
