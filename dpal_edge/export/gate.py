"""The gate: what a less precise artifact may lose of each head, by the task's metric or by agreement with float32."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError
from dpal_edge.evaluate.command import Splits, read_splits, score_tasks
from dpal_edge.evaluate.predictor import Predictor
from dpal_edge.manifest import HeadSpec, Verdict
from dpal_edge.probe.similarity import linear_cka
from dpal_edge.runtime.boxes import iou
from dpal_edge.tasks.decoding import decode_joints, probabilities
from dpal_edge.tasks.detection_decoding import SAME_PERSON_IOU, decode_people
from dpal_edge.tasks.table import parse_tasks

Raw = NDArray[np.float32]

_MOVED = 0.02  # of the input's height: a joint that moved less is where it was, 5 pixels of 256
_SEEN = 0.3  # confidence of a joint that is there to be moved
_PERSON, _SAME = 0.4, 0.5  # score of a person; overlap of the same one


@dataclass(frozen=True)
class Labelled:
    """Evaluation parts of data sets, and what the float32 model reaches on them."""

    folders: Mapping[str, Path]
    splits: Mapping[str, Splits]
    reference: Mapping[str, tuple[str, float]]  # by task: its first metric, and its value
    max_drop: float  # points of a hundred

    @classmethod
    def measure(cls, tasks: Sequence[str], predictor: Predictor, max_drop: float, limit: int | None) -> "Labelled":
        """Score the float32 model.

        Raises:
            ConfigError, DataError: as ``evaluate``.
        """
        folders = parse_tasks(tasks)
        splits = read_splits(folders, limit)
        return cls(folders, splits, _first_metrics(predictor, folders, splits), max_drop)

    def judge(self, predictor: Predictor) -> tuple[Verdict, ...]:
        """Score an artifact; one verdict for each task."""
        found = _first_metrics(predictor, self.folders, self.splits)
        return tuple(
            Verdict(
                head=task,
                measure=metric,
                reference=value,
                found=found[task][1],
                least=value - self.max_drop / 100,
            )
            for task, (metric, value) in self.reference.items()
        )


def _first_metrics(
    predictor: Predictor, folders: Mapping[str, Path], splits: Mapping[str, Splits]
) -> dict[str, tuple[str, float]]:
    results = score_tasks(predictor, folders, splits, errors=False)
    first = {task: next(iter(result.metrics.items())) for task, result in results.items()}
    if undefined := [task for task, (_, value) in first.items() if value is None]:
        raise ConfigError(f"--gate {', '.join(undefined)}: the metric is undefined on these data; give others")
    return {task: (metric, float(value or 0.0)) for task, (metric, value) in first.items()}


def judge_agreement(
    heads: Sequence[HeadSpec], size: tuple[int, int], reference: Mapping[str, Raw], found: Mapping[str, Raw]
) -> tuple[Verdict, ...]:
    """Compare outputs (n, ...) of an artifact with those of float32 on the same images, without labels.

    Args:
        heads: of the model.
        size: height, width of its input.
        reference: outputs of the float32 model by head.
        found: of the artifact.
    """
    verdicts = []
    for head in heads:
        for measure, least, compare in _AGREEMENTS[head.task]:
            value = compare(reference[head.name], found[head.name], head, size)
            verdicts.append(Verdict(head=head.name, measure=measure, reference=1.0, found=value, least=least))
    return tuple(verdicts)


def _cosine(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the mean cosine of an image's embeddings."""
    return float((_unit(reference) * _unit(found)).sum(1).mean())


def _neighbours(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the mean correlation, over images, of the ranks that all others have by their likeness to it."""
    ranks = [_ranks(_unit(part) @ _unit(part).T) for part in (reference, found)]
    count = len(reference)
    if count < 3:
        return 1.0
    gaps = ((ranks[0] - ranks[1]) ** 2).sum(1)
    return float((1 - 6 * gaps / (count * (count**2 - 1))).mean())


def _cka(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    return float(linear_cka(reference, found))


def _joints(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the share of joints, of those that are seen, that stay where they were."""
    (before, confidence), (after, _) = (decode_joints(raw, head.kind, size) for raw in (reference, found))
    seen = confidence > _SEEN
    stayed = np.linalg.norm(before - after, axis=-1) <= _MOVED * size[0]
    return float(stayed[seen].mean()) if seen.any() else 1.0


def _pixels(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the share of cells of the same class."""
    return float((reference.argmax(1) == found.argmax(1)).mean())


def _decisions(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the share of attributes of which the same is said."""
    return float(((probabilities(reference) > 0.5) == (probabilities(found) > 0.5)).mean())


def _people(reference: Raw, found: Raw, head: HeadSpec, size: tuple[int, int]) -> float:
    """Return the F1 of people that are found again, and no others."""
    matched = before = after = 0
    for expected, raw in zip(reference, found, strict=True):
        first, second = (decode_people(one, threshold=_PERSON, iou=SAME_PERSON_IOU)[0] for one in (expected, raw))
        before, after = before + len(first), after + len(second)
        overlaps = iou(first, second)
        taken: set[int] = set()
        for row in overlaps:
            row[list(taken)] = 0
            if row.size and row.max() >= _SAME:
                taken.add(int(row.argmax()))
        matched += len(taken)
    return 2 * matched / (before + after) if before + after else 1.0


_Compare = Callable[[Raw, Raw, HeadSpec, tuple[int, int]], float]
# By task: the measure, the least that passes, and how it is computed. A detector's scores near the threshold come and
# go, so of its people fewer need to be the same.
_AGREEMENTS: dict[str, tuple[tuple[str, float, _Compare], ...]] = {
    "embedding": (("cosine", 0.99, _cosine), ("rank correlation", 0.97, _neighbours), ("CKA", 0.98, _cka)),
    "pose": (("joints that stay", 0.97, _joints),),
    "parsing": (("pixels of the same class", 0.98, _pixels),),
    "attributes": (("same decisions", 0.98, _decisions),),
    "detection": (("people found again, F1", 0.9, _people),),
}


def _unit(rows: Raw) -> NDArray[Any]:
    wide = rows.astype(np.float64)
    unit: NDArray[Any] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    return values.argsort(1, kind="stable").argsort(1, kind="stable").astype(np.float64)
