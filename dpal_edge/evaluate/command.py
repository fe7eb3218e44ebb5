"""What ``dpal-edge evaluate`` does with its options."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dpal_edge.errors import ConfigError
from dpal_edge.evaluate.bench import Bench
from dpal_edge.evaluate.labels import label_columns
from dpal_edge.evaluate.predictor import DETECTION, Choice, Predictor, open_predictor
from dpal_edge.evaluate.result import EvaluationResult, TaskResult, defined
from dpal_edge.evaluate.scorers import SCORERS
from dpal_edge.probe.subset import limit_splits
from dpal_edge.tasks.detected_pose import read_detected_people
from dpal_edge.tasks.sample import Split
from dpal_edge.tasks.table import TASKS, parse_tasks

_POSE = "pose"

Splits = dict[str, Split[Any]]
Advance = Callable[[int], object]  # called with a number of images done


def evaluate(
    model: str,
    *,
    tasks: Sequence[str],
    flip: bool = False,
    detected_boxes: bool = False,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda images: nullcontext(lambda done: None),
    **choice: Any,
) -> EvaluationResult:
    """Score the heads of ``model``, a bundle, a checkpoint or a run folder, on the evaluation parts of data sets.

    Args:
        tasks: ``NAME=DIR`` each.
        flip: average outputs with those for mirrored images, left and right exchanged.
        detected_boxes: also find joints in the boxes of a published detector, see ``read_detected_people``.
        limit: images of each split, drawn by ``seed``; None is all. Of query and gallery all images of a few people.
        batch: images at a time.
        progress: given the number of images to look at, opens what is told how many more are done.
        choice: fields of ``predictor.Choice``: which form of the model is run, and where.

    Raises:
        ConfigError: an option is unknown, out of range, or in conflict with another or with the model.
        DataError: a folder is not of its task's layout, or more than 5 % of its annotations or files are bad.
        ModelFileError, BackendUnavailable: the model cannot be opened here.
    """
    folders = parse_tasks(tasks)
    if not folders:
        raise ConfigError("nothing to evaluate: give --task NAME=DIR")
    if batch < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch {batch}, limit {limit}: expected 1 or more")
    if flip and DETECTION in folders:
        raise ConfigError("--flip averages outputs for people, boxes have no average; evaluate detection without it")
    if detected_boxes and (_POSE not in folders or limit is not None):
        raise ConfigError("--detected-boxes are all people of COCO's val: give --task pose=DIR, and no --limit")
    splits = read_splits(folders, limit, seed)
    if detected_boxes:
        splits[_POSE]["detected"] = read_detected_people(folders[_POSE])
    predictor = open_predictor(model, Choice(**choice))
    total = sum(len(split.samples) for parts in splits.values() for split in parts.values())
    with progress(total) as advance:
        results = score_tasks(predictor, folders, splits, flip=flip, batch=batch, advance=advance)
    return EvaluationResult(model=predictor.description, tasks=results, flip=flip, limit=limit, seed=seed)


def read_splits(folders: Mapping[str, Path], limit: int | None = None, seed: int = 0) -> dict[str, Splits]:
    """Read the evaluation parts of the data of each task, at most ``limit`` images of a split.

    Raises:
        DataError: a folder is not of its task's layout.
    """
    return {
        task: limit_splits({split: TASKS[task].read(folder, split) for split in TASKS[task].splits[1:]}, limit, seed)
        for task, folder in folders.items()
    }


def score_tasks(
    predictor: Predictor,
    folders: Mapping[str, Path],
    splits: Mapping[str, Splits],
    *,
    flip: bool = False,
    batch: int = 32,
    errors: bool = True,
    advance: Advance = lambda done: None,
) -> dict[str, TaskResult]:
    """Score a model on the ``splits`` that were read from the ``folders`` of each task.

    Raises:
        ConfigError: the model has no head for a task, or one for other labels; nothing is computed then.
        DataError: too many files cannot be read, or the data leave a metric undefined.
    """
    _check(predictor, folders, splits)
    results = {}
    for task, parts in splits.items():
        bench = Bench(predictor, task, folders[task], batch, flip, errors, advance)
        scores = SCORERS[task](parts, bench)
        results[task] = TaskResult(
            data=str(folders[task]),
            images=scores.images,
            metrics=defined(scores.metrics),
            standard_errors=scores.errors,
            problems=(*(problem for part in parts.values() for problem in part.problems), *bench.problems),
        )
    return results


def _check(predictor: Predictor, folders: Mapping[str, Path], splits: Mapping[str, Splits]) -> None:
    """Refuse tasks that the model has no head for, and labels that its heads do not know."""
    missing = [task for task in folders if task not in predictor.heads]
    if missing:
        raise ConfigError(
            f"{predictor.description['model']}: has no head for {' and '.join(missing)}, only for "
            f"{', '.join(predictor.heads)}; leave out what it lacks"
        )
    for task, parts in splits.items():
        if predictor.heads[task].labels:
            for split in parts.values():
                label_columns(split.labels, predictor.heads[task], folders[task])
