"""What ``dpal-edge probe`` does with its options."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.files import find_images
from dpal_edge.probe.features import FeatureExtractor, open_extractor
from dpal_edge.probe.probes import PROBES, Bench
from dpal_edge.probe.result import ProbeResult, Similarity, TaskResult
from dpal_edge.probe.similarity import compare
from dpal_edge.probe.subset import limit_splits
from dpal_edge.tasks.sample import Split
from dpal_edge.tasks.table import TASKS, parse_tasks

_MOST_COMPARED = 2000  # images whose features are held in memory at once

Splits = dict[str, Split[Any]]
Advance = Callable[[int], object]  # called with a number of images done


def probe(
    model: str,
    *,
    tasks: Sequence[str] = (),
    teacher: str | None = None,
    data: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    layer: int | None = None,
    limit: int | None = None,
    batch: int = 32,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda images: nullcontext(lambda done: None),
) -> ProbeResult:
    """Probe what ``model`` names (see ``features.open_extractor``).

    Args:
        tasks: ``NAME=DIR`` each.
        teacher: to compare features with, on the images of the folders ``data``, at most 2000 of them.
        limit: images of each split, and of ``data``, drawn by ``seed``; None is all.
        progress: given the number of images to look at, opens what is told how many more are done.

    Raises:
        ConfigError: an option is unknown, out of range, or in conflict with another.
        DataError: a folder is not of its task's layout, or an image cannot be read.
        ModelFileError, BackendUnavailable: the model or teacher cannot be opened here.
    """
    folders = parse_tasks(tasks, PROBES)
    if (teacher is None) != (not data):
        raise ConfigError("--teacher SPEC and --data DIR compare features, and need each other; give both or neither")
    if not folders and teacher is None:
        raise ConfigError("nothing to probe: give --task NAME=DIR, or --teacher SPEC with --data DIR")
    if batch < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch {batch}, limit {limit}: expected 1 or more")
    splits = read_splits(folders, limit, seed)
    images = _draw(find_images(tuple(data)).paths, min(limit or _MOST_COMPARED, _MOST_COMPARED), seed) if data else []
    extractor = open_extractor(model, size=size, layer=layer, device=device, seed=seed)
    other = open_extractor(f"teacher:{teacher}", size=extractor.size, device=device) if teacher else None
    total = sum(len(split.samples) for parts in splits.values() for split in parts.values()) + len(images)
    with progress(total) as advance:
        results = probe_tasks(extractor, folders, splits, batch=batch, seed=seed, advance=advance)
        similarity = None
        if other is not None:
            metrics = compare(extractor, other, images, batch=batch, seed=seed, advance=advance)
            similarity = Similarity(
                teacher=other.description, data=tuple(map(str, data)), images=len(images), metrics=metrics
            )
    return ProbeResult(model=extractor.description, tasks=results, similarity=similarity, seed=seed, limit=limit)


def probe_tasks(
    extractor: FeatureExtractor,
    folders: Mapping[str, Path],
    splits: Mapping[str, Splits],
    *,
    batch: int = 32,
    seed: int = 0,
    advance: Advance = lambda done: None,
) -> dict[str, TaskResult]:
    """Probe a model on the ``splits`` that were read from the ``folders`` of each task.

    Raises:
        ConfigError: a task needs patch tokens that the model does not give; nothing is computed then.
        DataError: an image cannot be read, or the data leave a metric undefined.
    """
    _check_patches(extractor, splits)
    bench = Bench(extractor, batch, seed, advance)
    results = {}
    for name, parts in splits.items():
        scores = PROBES[name].score(parts, bench)
        counts = {split: len(part.samples) for split, part in parts.items()}
        results[name] = TaskResult(
            data=str(folders[name]), images=counts, metrics=scores.metrics, penalty=scores.penalty
        )
    return results


def read_splits(folders: Mapping[str, Path], limit: int | None, seed: int) -> dict[str, Splits]:
    """Read what the probe of each task needs, at most ``limit`` images of a split.

    Raises:
        DataError: a folder is not of its task's layout, or its splits have other labels.
    """
    found = {}
    for name, folder in folders.items():
        splits = {split: TASKS[name].read(folder, split) for split in PROBES[name].splits}
        if len({split.labels for split in splits.values()}) > 1:
            raise DataError(f"{folder}: {' and '.join(splits)} have other labels, or the same in another order")
        found[name] = limit_splits(splits, limit, seed)
    return found


def _check_patches(extractor: FeatureExtractor, tasks: Iterable[str]) -> None:
    refused = " and ".join(name for name in tasks if TASKS[name].patches)
    if refused and not extractor.has_patches:
        raise ConfigError(
            f"{extractor.description['model']}: gives an embedding and no patch tokens, which the probe for {refused} "
            f"needs; leave {refused} out, or probe the checkpoint it was exported from"
        )


def _draw(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    chosen = np.random.default_rng([seed, 8]).permutation(len(paths))[:count]
    return [paths[i] for i in sorted(chosen)]
