"""Real images to compare an exported model on: those it was trained on, or any folder of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.files import find_images
from dpal_edge.tasks.image import open_sample, read_crop
from dpal_edge.tasks.letterbox import letterbox
from dpal_edge.tasks.sample import Sample
from dpal_edge.tasks.table import TASKS, parse_tasks, unlabelled_tasks

Crops = NDArray[np.uint8]  # (n, height, width, 3) RGB
_HOW = "give a folder of them with --calibration DIR"


def read_crops(folders: tuple[str, ...], size: tuple[int, int], count: int) -> Crops:
    """Read ``count`` crops spread evenly over ``folders``, resized (bicubic) to ``size``; pass over unreadable files.

    Raises:
        DataError: no folder, or fewer than two readable images: a graph is not compared on invented input.
    """
    return _read(_find(folders), size, count, read=_read_person)


def read_inputs(
    folders: tuple[str, ...], metadata: dict[str, Any], size: tuple[int, int], count: int, *, frames: bool
) -> Crops:
    """Read inputs of a model: from ``folders``, or, where there are none, from what its checkpoint was trained on.

    Args:
        metadata: of the checkpoint; its config names folders (``data``) or data sets (``task``).
        frames: whether the model takes whole frames rather than crops of people.

    Raises:
        DataError: as ``read_crops``, or a data set is not where it was.
    """
    config = metadata.get("config", {})
    if folders or not config.get("task"):
        samples = _find(folders or tuple(config.get("data", ())))
    else:
        samples = _find_trained(config)
    return _read(samples, size, count, read=_read_whole if frames else _read_person)


def _find(folders: tuple[str, ...]) -> list[Sample[Any]]:
    if not folders:
        raise DataError(f"no real crops to compare the exported model on; {_HOW}")
    try:
        return [Sample(path, None) for path in find_images(folders).paths]
    except DataError as error:
        raise DataError(f"{error}; give real crops with --calibration DIR") from error


def _find_trained(config: dict[str, Any]) -> list[Sample[Any]]:
    """List what the tasks of a fine-tuned model are learned from; some of it may be without labels."""
    samples: list[Sample[Any]] = []
    unlabelled = unlabelled_tasks(config)
    for task, folder in parse_tasks(config["task"]).items():
        if task in unlabelled:
            samples += _find((str(folder),))
            continue
        try:
            samples += TASKS[task].read(folder, TASKS[task].splits[0]).samples
        except DataError as error:
            raise DataError(f"{error}; or {_HOW}") from error
    return samples


def _read_person(sample: Sample[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    return read_crop(sample, size)


def _read_whole(sample: Sample[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    return letterbox(np.asarray(open_sample(sample)), size)


def _read(
    samples: Sequence[Sample[Any]],
    size: tuple[int, int],
    count: int,
    *,
    read: Callable[[Sample[Any], tuple[int, int]], NDArray[np.uint8]],
) -> Crops:
    """Read ``count`` of ``samples``, spread evenly; the others stand in for those that cannot be read."""
    chosen = min(count, len(samples))
    first = [i * len(samples) // chosen for i in range(chosen)]
    crops: list[NDArray[np.uint8]] = []
    for i in dict.fromkeys([*first, *range(len(samples))]):
        try:
            crops.append(read(samples[i], size))
        except DataError:
            continue
        if len(crops) == count:
            break
    if len(crops) < 2:
        folders = ", ".join(sorted({str(Path(sample.image).parent) for sample in samples})[:3])
        raise DataError(f"{folders}: {len(crops)} readable images, expected at least 2 crops of people")
    return np.stack(crops)
