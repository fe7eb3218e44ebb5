"""What an evaluation found, with all that is needed to find it again."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dpal_edge import __version__


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, scored on one data set."""

    data: str  # folder
    images: dict[str, int]  # images, or people in images, that were scored, by split
    metrics: dict[str, float | None]  # 0..1, the most important first; None is undefined on these data
    standard_errors: dict[str, float]  # of metrics, by sampling of the data; those that the data are too few for lack
    problems: tuple[str, ...]  # bad annotations and unreadable files that were left out, and why


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One model, evaluated."""

    model: dict[str, Any]  # what it is, where its weights come from, and what ran it in which precision
    tasks: dict[str, TaskResult]
    flip: bool  # whether outputs were averaged with those for mirrored images
    limit: int | None  # images of each split; None is all
    seed: int  # of the images that the limit drew
    dpal_edge: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """Lay the result out as a table for a person: a line for each metric."""
        told = self.model
        height, width = told["size"]
        settings = ", flip test" if self.flip else ""
        settings += f", at most {self.limit} images of each split" if self.limit else ""
        lines = [
            f"model  {told['model']} ({told['architecture']}, {told['kind']}) at {height}x{width}",
            f"run    {told['engine']} on {told['device']} in {told['precision']}{settings}",
        ]
        for name, task in self.tasks.items():
            counts = " and ".join(f"{count} {split}" for split, count in task.images.items())
            bad = f"; {len(task.problems)} bad left out, first {task.problems[0]}" if task.problems else ""
            lines += ["", f"{name} on {counts} images of {task.data}{bad}"]
            column = max(map(len, task.metrics))
            for metric, value in task.metrics.items():
                error = task.standard_errors.get(metric)
                spread = "" if error is None else f" ± {error:.3f}"
                lines.append(f"  {metric:{column}}  {'undefined' if value is None else f'{value:.3f}'}{spread}")
        return "\n".join(lines)


def defined(metrics: dict[str, float]) -> dict[str, float | None]:
    """Put None, which JSON knows, in the place of NaN."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
