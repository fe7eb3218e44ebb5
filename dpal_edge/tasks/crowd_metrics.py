"""How boxes find people in crowds: who is found by which box, miss rate over false alarms, and Jaccard index."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Predictions = Sequence[tuple[Floats, Floats]]  # of each frame: boxes (m, 4) left, top, right, bottom, and scores (m,)
Truths = Sequence[tuple[Floats, Flags]]  # of each frame: boxes (n, 4) of people, and which to ignore (n,)

_OVERLAP = 0.5  # IoU from which a box finds a person, and share of a box from which it lies in an ignored one
_ALARMS = np.logspace(-2, 0, 9)  # false alarms per frame at which the miss rate is read
_LEAST_MISS = 1e-10  # so that a logarithm exists
_THRESHOLDS = np.arange(10) / 10  # scores that boxes must be above, of which the Jaccard index takes the best


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes of all frames, best first, without those that lie in ignored boxes; and how many people there are."""

    hits: Flags  # (m,) whether a box found somebody
    people: int
    frames: int


def find_people(predictions: Predictions, truths: Truths) -> Found:
    """Let each box, best first, find the person it overlaps most of those who are not found yet.

    A box that finds nobody and lies in an ignored one, by half of its area or more, counts neither way.

    Source: the evaluation of Caltech Pedestrians (Dollar et al., 2012), as of CrowdHuman and CityPersons.
    """
    parts = [_find_in_frame(*prediction, *truth) for prediction, truth in zip(predictions, truths, strict=True)]
    scores = np.concatenate([np.zeros(0), *(score for score, _ in parts)])
    hits = np.concatenate([np.zeros(0, bool), *(hit for _, hit in parts)])
    people = sum(int((~ignore).sum()) for _, ignore in truths)
    return Found(hits[np.argsort(-scores, kind="stable")], people, len(truths))


def miss_rate(found: Found) -> float:
    """Return the log-average miss rate MR^-2, 0..1, the lower the better; NaN where nobody is to be found.

    It is the geometric mean of the share of people missed at nine numbers of false alarms per frame, 0.01 to 1: at
    each, with as many of the best boxes as have no more. A miss rate of 0 counts as 1e-10.

    Source: Dollar et al., 2012; as CityPersons' evaluation. CrowdHuman's toolkit takes the first box that reaches a
    number instead of the last that does not exceed it: some ten-thousandths on thousands of frames.
    """
    if not found.people:
        return math.nan
    alarms = np.cumsum(~found.hits) / found.frames
    recalls = np.concatenate([[0.0], np.cumsum(found.hits) / found.people])
    missed = 1 - recalls[np.searchsorted(alarms, _ALARMS, side="right")]
    return float(np.exp(np.log(np.maximum(missed, _LEAST_MISS)).mean()))


def recall(found: Found) -> float:
    """Return the share of people that all boxes together find, 0..1; NaN where nobody is to be found."""
    return float(found.hits.sum() / found.people) if found.people else math.nan


def recall_at_precision(found: Found, precision: float) -> float:
    """Return the most people, as a share, that the best boxes find of whom at least ``precision`` find somebody."""
    if not found.people:
        return math.nan
    hits = np.cumsum(found.hits)
    precise = hits >= precision * np.arange(1, len(hits) + 1)
    return float(hits[precise].max(initial=0) / found.people)


def jaccard_index(predictions: Predictions, truths: Truths) -> float:
    """Return the Jaccard index JI, 0..1: pairs of box and person, over both less the pairs, as a mean over frames.

    Boxes and people are paired one to one, as many as overlap by an IoU above 0.5. Those without a pair that lie in an
    ignored box, by more than half of their area, do not count, nor do frames without boxes and people. The threshold is
    the best of 0, 0.1, ... 0.9.

    Source: CrowdDet (Chu et al., 2020). Differs: the most pairs are taken, rather than those of the greatest total IoU.
    """
    ratios = np.array(
        [_frame_ratios(*prediction, *truth) for prediction, truth in zip(predictions, truths, strict=True)]
    )
    counted = ~np.isnan(ratios)
    if not counted.any():
        return math.nan
    return float((np.where(counted, ratios, 0).sum(0) / np.maximum(counted.sum(0), 1)).max())


def box_areas(boxes: Floats) -> NDArray[np.float64]:
    """Return the areas (n,) of boxes (n, 4)."""
    areas: NDArray[np.float64] = np.maximum(boxes[:, 2:].astype(np.float64) - boxes[:, :2], 0).prod(1)
    return areas


def _find_in_frame(boxes: Floats, scores: Floats, people: Floats, ignore: Flags) -> tuple[Floats, Flags]:
    """Return scores and hits (k,) of the boxes that count."""
    overlap = _iou(boxes, people[~ignore])
    hits, left = np.zeros(len(boxes), bool), np.ones(overlap.shape[1], bool)
    order = np.argsort(-scores, kind="stable")
    near = overlap.max(axis=1, initial=0) >= _OVERLAP
    for i in order[near[order]]:
        person = np.where(left, overlap[i], 0).argmax()
        if left[person] and overlap[i, person] >= _OVERLAP:
            hits[i], left[person] = True, False
    counted = hits | (_inside(boxes, people[ignore]) < _OVERLAP)
    return scores[counted], hits[counted]


def _frame_ratios(boxes: Floats, scores: Floats, people: Floats, ignore: Flags) -> NDArray[np.float64]:
    """Return the Jaccard index of one frame at each threshold; NaN where nothing counts."""
    real = people[~ignore]
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    paired, since = _pair(_iou(boxes, real) > _OVERLAP)
    alarms = ~paired & (_inside(boxes, people[ignore]) <= _OVERLAP)
    wanted = _inside(real, people[ignore]) <= _OVERLAP
    ratios = []
    for threshold in _THRESHOLDS:
        count = int((scores > threshold).sum())  # of the best boxes
        pairs = paired[:count].sum()
        others = alarms[:count].sum() + (wanted & (since >= count)).sum()
        ratios.append(pairs / (pairs + others) if pairs + others else math.nan)
    return np.array(ratios)


def _pair(edges: Flags) -> tuple[Flags, NDArray[np.int64]]:
    """Pair rows with columns one to one along ``edges`` (m, n), as many as there can be of the first rows.

    Returns:
        Whether each row has a pair (m,), and for each column the row from which on it has one (n,), m if never. Neither
        changes as further rows are added, since an augmenting path leaves nobody without a pair who had one.
    """
    choices = [np.flatnonzero(row).tolist() for row in edges]
    partner: dict[int, int] = {}
    paired, since = np.zeros(len(edges), bool), np.full(edges.shape[1], len(edges))
    for row in range(len(edges)):
        column = _augment(row, choices, partner, set())
        if column is not None:
            paired[row], since[column] = True, row
    return paired, since


def _augment(row: int, choices: list[list[int]], partner: dict[int, int], seen: set[int]) -> int | None:
    """Give ``row`` a column, moving rows that have one to others; return the column that was free, if there is one."""
    for column in choices[row]:
        if column in seen:
            continue
        seen.add(column)
        free = column if column not in partner else _augment(partner[column], choices, partner, seen)
        if free is not None:
            partner[column] = row
            return free
    return None


def _iou(boxes: Floats, others: Floats) -> NDArray[np.float64]:
    shared = _shared(boxes, others)
    return shared / np.maximum(box_areas(boxes)[:, None] + box_areas(others) - shared, 1e-9)


def _inside(boxes: Floats, others: Floats) -> NDArray[np.float64]:
    """Return the share (m,) of each box that lies in that of the others which holds most of it; 0 without others."""
    most: NDArray[np.float64] = _shared(boxes, others).max(axis=1, initial=0) / np.maximum(box_areas(boxes), 1e-9)
    return most


def _shared(boxes: Floats, others: Floats) -> NDArray[np.float64]:
    """Return the areas (m, n) that boxes share."""
    one, other = boxes.astype(np.float64)[:, None], others.astype(np.float64)[None]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared: NDArray[np.float64] = np.maximum(sides, 0).prod(-1)
    return shared
