"""Give people the same number in every frame, by where they are and how they look."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError
from dpal_edge.runtime.assignment import assign
from dpal_edge.runtime.boxes import Boxes, iou

_MIN_IOU = 0.2  # with the last box, for a match by place
_COAST = 5  # frames without a detection after which the last box says nothing about the place
_MOMENTUM = 0.9  # of the running mean embedding
_SPREADS = 3.0  # of its usual distance from its own mean within which a lost person is found again
_LEAST_SPREAD = 0.002  # after a short life a track knows little about its own variation
_IMPOSSIBLE = 10.0  # cost of a pair that may not be; possible ones lie in -1..1


@dataclass
class _Track:
    id: int
    box: NDArray[np.float32]  # (4,)
    embedding: NDArray[np.float32] | None  # (D,) of length 1
    lost: int = 0  # frames since the last detection
    spread: float = 0.0  # running mean of 1 - cosine between the embedding and what was seen next


class Tracker:
    """Track ids for the people of one camera; feed it every frame in order.

    First, tracks seen within the last few frames are matched by box overlap plus appearance. What is left is matched
    by appearance alone, which finds people again after an occlusion or an absence. Embeddings of a vision transformer
    share a large common part, so cosine similarities all lie close together and their absolute value means little:
    the first stage uses only how similarities rank within the frame. The second also asks that the person stand out
    by ``margin`` among all known ones, and be about as close to their mean embedding as they were while in view: it
    would rather give a new id than merge two people.

    Args:
        max_age: frames that a lost track is kept.
        similarity: cosine, -1..1, above which a lost person may be found again by appearance; depends on the model.
        margin: how much more similar than any other person that match must be.
    """

    def __init__(self, *, max_age: int = 150, similarity: float = 0.8, margin: float = 0.02) -> None:
        if max_age < 1 or not -1 <= similarity <= 1 or margin <= 0:
            raise ConfigError(
                f"max_age {max_age}, similarity {similarity}, margin {margin} found, expected max_age of 1 or more, "
                f"similarity in -1..1 and margin above 0"
            )
        self._max_age = max_age
        self._similarity = similarity
        self._margin = margin
        self._tracks: list[_Track] = []
        self._next_id = 1

    def update(self, boxes: Boxes, embeddings: NDArray[np.float32] | None = None) -> list[int]:
        """Take the people of the next frame and return their track ids, counted from 1 and never reused.

        Args:
            boxes: (n, 4) pixels.
            embeddings: (n, D) of any length; without them, people are matched by place alone.
        """
        units = None if embeddings is None else unit_rows(embeddings)
        matches = self._match(boxes, units)
        for track in self._tracks:
            track.lost += 1
        ids = [self._assign(matches.get(i), box, None if units is None else units[i]) for i, box in enumerate(boxes)]
        self._tracks = [track for track in self._tracks if track.lost <= self._max_age]
        return ids

    def _match(self, boxes: Boxes, units: NDArray[np.float32] | None) -> dict[int, _Track]:
        """Return the track of each detection that has one."""
        if not self._tracks or not len(boxes):
            return {}
        alike = None if units is None else self._alike(units)
        pairs = _best_pairs(self._place_scores(boxes, alike))
        if alike is not None:
            rest = self._appearance_scores(alike)
            rest[list(pairs.values())] = -np.inf
            rest[:, list(pairs)] = -np.inf
            pairs |= _best_pairs(rest)
        return {detection: self._tracks[track] for detection, track in pairs.items()}

    def _alike(self, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (tracks, n) cosine similarities; -1 for a track without an embedding."""
        nothing = np.full(len(units), -1, np.float32)
        rows = [nothing if track.embedding is None else units @ track.embedding for track in self._tracks]
        return np.stack(rows)

    def _place_scores(self, boxes: Boxes, alike: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return (tracks, n): overlap, less up to 1 for the pair that looks least alike; -inf where impossible."""
        overlap = iou(np.stack([track.box for track in self._tracks]), boxes)
        recent = np.array([track.lost < _COAST for track in self._tracks])
        possible = (overlap >= _MIN_IOU) & recent[:, None]
        if alike is None or not possible.any():
            unlike = np.zeros_like(overlap)
        else:
            worst, best = alike[possible].min(), alike[possible].max()
            unlike = (best - alike) / max(best - worst, self._margin)
        scores: NDArray[np.float32] = np.where(possible, overlap - unlike, -np.inf).astype(np.float32)
        return scores

    def _appearance_scores(self, alike: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (tracks, n): similarity where it is high, stands out and is usual for the track, else -inf."""
        ranked = np.sort(np.vstack([alike, np.full_like(alike[:1], -1)]), axis=0)
        clear = (alike == ranked[-1]) & (ranked[-1] - ranked[-2] >= self._margin)
        spread = np.array([max(track.spread, _LEAST_SPREAD) for track in self._tracks])
        usual = (alike >= self._similarity) & (1 - alike <= _SPREADS * spread[:, None])
        scores: NDArray[np.float32] = np.where(clear & usual, alike, -np.inf).astype(np.float32)
        return scores

    def _assign(self, track: _Track | None, box: NDArray[np.float32], unit: NDArray[np.float32] | None) -> int:
        """Bring ``track`` up to date, or start one; return its id."""
        if track is None:
            self._tracks.append(_Track(self._next_id, box, unit))
            self._next_id += 1
            return self._tracks[-1].id
        track.box, track.lost = box, 0
        if unit is not None:
            old = unit if track.embedding is None else track.embedding
            track.spread = _MOMENTUM * track.spread + (1 - _MOMENTUM) * (1 - float(old @ unit))
            track.embedding = unit_rows((_MOMENTUM * old + (1 - _MOMENTUM) * unit)[None])[0]
        return track.id


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row of (n, D) to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float32] = (rows / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return units


def _best_pairs(scores: NDArray[np.float32]) -> dict[int, int]:
    """Pair rows with columns so that the sum of scores is greatest; return {column: row}, -inf never paired."""
    possible = np.isfinite(scores)
    cost = np.where(possible, -scores, _IMPOSSIBLE)
    return {column: row for row, column in assign(cost.astype(np.float64)) if possible[row, column]}
