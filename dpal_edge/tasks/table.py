"""The tasks by name: what a data set of each is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import ConfigError
from dpal_edge.tasks.attributes import read_attributes
from dpal_edge.tasks.parsing import read_lip
from dpal_edge.tasks.pose import read_coco_keypoints
from dpal_edge.tasks.reid import read_market
from dpal_edge.tasks.sample import Split


@dataclass(frozen=True)
class Task:
    """What everything that handles a task must know of it."""

    read: Callable[[Path, str], Split[Any]]  # reads one of ``splits`` of a data folder
    splits: tuple[str, ...]  # the one to learn from, then those to score on
    patches: bool  # whether it needs patch tokens, not the global one alone


TASKS = {
    "reid": Task(read_market, ("train", "query", "gallery"), patches=False),
    "parsing": Task(read_lip, ("train", "val"), patches=True),
    "pose": Task(read_coco_keypoints, ("train", "val"), patches=True),
    "attributes": Task(read_attributes, ("train", "val"), patches=False),
}


def parse_tasks(texts: Iterable[str]) -> dict[str, Path]:
    """Turn options of the form ``NAME=DIR`` into data folders by task.

    Raises:
        ConfigError: another form, a task that is not known, or one that is named twice.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder:
            raise ConfigError(f"task {text!r}: expected NAME=DIR, for example reid=data/market1501")
        if name not in TASKS:
            raise ConfigError(f"task {text!r}: no task {name!r}, expected one of: {', '.join(TASKS)}")
        if name in folders:
            raise ConfigError(f"task {text!r}: {name} is given twice; give one folder per task")
        folders[name] = Path(folder)
    return folders
