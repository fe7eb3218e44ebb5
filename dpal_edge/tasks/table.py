"""The tasks by name: what a data set of each is made of."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import ConfigError
from dpal_edge.tasks.attribute_layouts import read_attributes
from dpal_edge.tasks.detection_layouts import read_detection
from dpal_edge.tasks.parsing_layouts import read_parsing
from dpal_edge.tasks.pose_layouts import read_pose
from dpal_edge.tasks.reid_layouts import read_reid
from dpal_edge.tasks.sample import Split


@dataclass(frozen=True)
class Task:
    """What everything that handles a task must know of it."""

    read: Callable[[Path, str], Split[Any]]  # reads one of ``splits`` of a data folder
    splits: tuple[str, ...]  # the one to learn from, then those to score on
    patches: bool  # whether it needs patch tokens, not the global one alone


TASKS = {
    "reid": Task(read_reid, ("train", "query", "gallery"), patches=False),
    "parsing": Task(read_parsing, ("train", "val"), patches=True),
    "pose": Task(read_pose, ("train", "val"), patches=True),
    "attributes": Task(read_attributes, ("train", "val"), patches=False),
    "detection": Task(read_detection, ("train", "val"), patches=True),
}

TEACHERS = {"reid": "reid_teacher", "attributes": "attribute_teacher"}  # settings of a fine-tuning, by what they teach


def unlabelled_tasks(settings: Mapping[str, Any]) -> frozenset[str]:
    """Return the tasks that a fine-tuning with these settings learns from a teacher: their folders hold images only."""
    return frozenset(task for task, name in TEACHERS.items() if settings.get(name))


def parse_tasks(texts: Iterable[str], known: Collection[str] = TASKS) -> dict[str, Path]:
    """Turn options of the form ``NAME=DIR`` into data folders by task.

    Args:
        known: the tasks that may be named.

    Raises:
        ConfigError: another form, a task that is not known, or one that is named twice.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder:
            raise ConfigError(f"task {text!r}: expected NAME=DIR, for example reid=data/market1501")
        if name not in known:
            raise ConfigError(f"task {text!r}: no task {name!r}, expected one of: {', '.join(known)}")
        if name in folders:
            raise ConfigError(f"task {text!r}: {name} is given twice; give one folder per task")
        folders[name] = Path(folder)
    return folders
