"""What a probe found, with all that is needed to find it again."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dpal_edge import __version__


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, probed."""

    data: str  # folder
    images: dict[str, int]  # looked at, by split
    metrics: dict[str, float]  # the one to compare models by comes first; of all, higher is better
    penalty: float | None  # of the ridge regression; None where nothing is fitted


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How much of a teacher's features the model's hold."""

    teacher: dict[str, Any]  # what it is and where its weights come from
    data: tuple[str, ...]  # folders
    images: int  # looked at
    metrics: dict[str, float]  # of all, higher is more alike


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One model, probed."""

    model: dict[str, Any]  # what it is and where its weights come from
    tasks: dict[str, TaskResult]
    similarity: Similarity | None  # None without a teacher
    seed: int
    limit: int | None  # images of each split; None is all
    dpal_edge: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """Lay the result out for a person, a line for the model and one for each task."""
        height, width = self.model["size"]
        lines = [("model", f"{self.model['model']} ({self.model['kind']}) on crops of {height}x{width}")]
        for name, task in self.tasks.items():
            counts = " and ".join(f"{count} {split}" for split, count in task.images.items())
            lines.append((name, f"{_numbers(task.metrics)}  on {counts} images of {task.data}"))
        if self.similarity:
            found = self.similarity
            where = f"on {found.images} images, to {found.teacher['model']} layer {found.teacher['layer']}"
            lines.append(("similarity", f"{_numbers(found.metrics)}  {where}"))
        column = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{column}}  {text}" for name, text in lines)


def _numbers(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
