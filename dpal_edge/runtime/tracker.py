"""Give people the same number in every frame, by where they are and how they look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError
from dpal_edge.runtime.assignment import assign
from dpal_edge.runtime.boxes import Boxes, iou

_MIN_IOU = 0.2  # with the predicted box, for a match by place
_MIN_IOU_FAINT = 0.5  # the same for a low score, which is more often no person, or a part of one
_COAST = 5  # frames without a detection after which a prediction says nothing about the place
_COAST_S = 2.0  # the same in seconds, for cameras that stood still
_FRAME_S = 0.04  # a frame's time where none is given
_SETTLE_S = 0.12  # between two detections, for them to weigh half in the velocity; 0.1 to 0.15 did best on one clip
_MOMENTUM = 0.9  # of the running means, for each frame in which a person is seen
_SPREADS = 3.0  # of its usual distance from its own mean within which a lost person is found again
_LEAST_SPREAD = 0.002  # after a short life a track knows little about its own variation
_IMPOSSIBLE = 10.0  # cost of a pair that may not be; possible ones lie in -1..1


@dataclass
class _Track:
    id: int
    box: NDArray[np.float32]  # (4,)
    velocity: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))  # x, y in pixels per second
    lost: int = 0  # frames since the last detection
    lost_s: float = 0.0  # seconds since the last detection
    faint: bool = False  # the last detection had a low score
    embedding: NDArray[np.float32] | None = None  # (D,) of length 1
    spread: float = 0.0  # running mean of 1 - cosine between the embedding and what was seen next
    means: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of what `smooth` was given

    def move(self, box: NDArray[np.float32], *, walked: bool) -> None:
        """Put it where it was seen; unless it ``walked`` there, nothing is known of its velocity."""
        shift = (box - self.box).reshape(2, 2).mean(axis=0)  # of the centre
        faster = (shift - self.velocity * self.lost_s) / (self.lost_s + _SETTLE_S)
        self.velocity = self.velocity + faster if walked else np.zeros_like(self.velocity)
        self.box, self.lost, self.lost_s = box, 0, 0.0

    def learn(self, unit: NDArray[np.float32]) -> None:
        """Take in how it looks, (D,) of length 1."""
        old = unit if self.embedding is None else self.embedding
        self.spread = _MOMENTUM * self.spread + (1 - _MOMENTUM) * (1 - float(old @ unit))
        self.embedding = unit_rows((_MOMENTUM * old + (1 - _MOMENTUM) * unit)[None])[0]

    def mean(self, name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the running mean of the values of this name, ``value`` included unless the detection was faint."""
        mean = self.means.setdefault(name, value.copy())
        if not self.faint:
            mean += (1 - _MOMENTUM) * (value - mean)
        return mean


class Tracker:
    """Track ids for the people of one camera; feed it every frame in order.

    First, tracks seen within the last few frames are matched by appearance plus overlap with the box where their
    velocity takes them. Those left over may continue with a detection of low score, by overlap alone. What is left
    after that is matched by appearance alone, which finds people again after an occlusion or an absence. Embeddings
    of a vision transformer share a large common part, so cosine similarities all lie close together and their absolute
    value means little: the first stage uses only how similarities rank within the frame. The last also asks that the
    person stand out by ``margin`` among all known ones, and be about as close to their mean embedding as they were
    while in view: it would rather give a new id than merge two people.

    Args:
        max_age: frames that a lost track is kept.
        similarity: cosine, -1..1, above which a lost person may be found again by appearance; depends on the model.
        margin: how much more similar than any other person that match must be.
        high: score, 0..1, below which a detection cannot start a track, only continue one seen within the last few
            frames, whose means it leaves as they are; None treats all detections alike.

    Source: the stage for low scores is ByteTrack's (Zhang et al., 2022). Differs: appearance ranks in the first stage
    and finds people in the last; one detection of high score starts a track. Instead of a Kalman filter over place and
    size, the last box moves at the running mean of its centre's velocity: an alpha-beta filter with alpha 1 and a
    beta that grows with the time between two detections. On our video this overlaps people more after a gap, since
    sizes, which jump when legs are hidden, are not extrapolated.
    """

    def __init__(
        self, *, max_age: int = 150, similarity: float = 0.8, margin: float = 0.02, high: float | None = None
    ) -> None:
        if max_age < 1 or not -1 <= similarity <= 1 or margin <= 0:
            raise ConfigError(
                f"max_age {max_age}, similarity {similarity}, margin {margin} found, expected max_age of 1 or more, "
                f"similarity in -1..1 and margin above 0"
            )
        if high is not None and not 0 <= high <= 1:
            raise ConfigError(f"high is {high}, expected a score in 0..1, or None to treat all detections alike")
        self._max_age = max_age
        self._similarity = similarity
        self._margin = margin
        self._high = high
        self._tracks: list[_Track] = []
        self._next_id = 1

    def update(
        self,
        boxes: Boxes,
        embeddings: NDArray[np.float32] | None = None,
        scores: NDArray[np.float32] | None = None,
        *,
        seconds: float | None = None,
    ) -> list[int | None]:
        """Take the people of the next frame and return their track ids, counted from 1 and never reused.

        A detection whose score is below ``high`` and that continues no track has no id: None.

        Args:
            boxes: (n, 4) pixels.
            embeddings: (n, D) of any length; without them, people are matched by place alone.
            scores: (n,) of the detector, 0..1; without them, all are treated alike.
            seconds: since the frame of the previous update, 0 or more; None is one frame at 25 per second.
        """
        elapsed = _FRAME_S if seconds is None else seconds
        if not 0 <= elapsed < np.inf:
            raise ValueError(f"seconds is {seconds}, expected 0 or more since the previous update")
        for track in self._tracks:
            track.lost += 1
            track.lost_s += elapsed
        boxes = boxes.astype(np.float32)  # a copy, since tracks keep its rows
        units = None if embeddings is None else unit_rows(embeddings)
        faint = np.zeros(len(boxes), bool) if self._high is None or scores is None else scores < self._high
        by_place, by_looks = self._match(boxes, units, faint)
        known = {i: self._tracks[row] for i, row in (by_place | by_looks).items()}
        ids = []
        for i, box in enumerate(boxes):
            unit = None if units is None or faint[i] else units[i]
            ids.append(self._see(known.get(i), box, unit, walked=i in by_place, faint=bool(faint[i])))
        self._tracks = [track for track in self._tracks if track.lost <= self._max_age]
        return ids

    def smooth_embeddings(self, ids: Sequence[int | None], embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n, D) of length 1: the running mean of each track, or their own for people without one.

        Args:
            ids: n, as ``update`` just returned them.
            embeddings: (n, D) of any length, as ``update`` was given them.
        """
        smoothed = unit_rows(embeddings)
        for i, track in enumerate(self._named(ids)):
            if track is not None and track.embedding is not None:
                smoothed[i] = track.embedding
        return smoothed

    def smooth(
        self, ids: Sequence[int | None], values: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """Return the running mean of each value over each track; call it once after each ``update``.

        A mean begins with the first value and then keeps nine tenths of itself in each frame; people without a track
        keep their own values. A detection of low score takes the mean and adds nothing to it.

        Args:
            ids: n, as ``update`` just returned them.
            values: (n, A) each, by a name of the caller's own, always the same for what belongs together.
        """
        smoothed = {name: rows.astype(np.float32) for name, rows in values.items()}
        for name, rows in smoothed.items():
            for i, track in enumerate(self._named(ids)):
                if track is not None:
                    rows[i] = track.mean(name, rows[i])
        return smoothed

    def _named(self, ids: Sequence[int | None]) -> list[_Track | None]:
        """Return the track of each id."""
        tracks: dict[int | None, _Track] = {track.id: track for track in self._tracks}
        return [tracks.get(track_id) for track_id in ids]

    def _match(
        self, boxes: Boxes, units: NDArray[np.float32] | None, faint: NDArray[np.bool_]
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Return {detection: row of its track} for those found where expected, and for those found by looks alone."""
        if not self._tracks or not len(boxes):
            return {}, {}
        overlap = self._overlap(boxes)
        alike = None if units is None else self._alike(units)
        by_place = _best_pairs(self._place_scores(np.where(faint, 0, overlap), alike))
        by_place |= _best_pairs(np.where(faint & (overlap >= _MIN_IOU_FAINT), overlap, -np.inf), by_place)
        if alike is None:
            return by_place, {}
        return by_place, _best_pairs(np.where(faint, -np.inf, self._appearance_scores(alike)), by_place)

    def _overlap(self, boxes: Boxes) -> NDArray[np.float32]:
        """Return (tracks, n): IoU with where each track should be now; 0 if it was lost for too long to tell."""
        recent = np.array([track.lost <= _COAST and track.lost_s <= _COAST_S for track in self._tracks])
        shifts = np.stack([track.velocity * track.lost_s for track in self._tracks])
        predicted = np.stack([track.box for track in self._tracks]) + np.tile(shifts, 2)
        overlap: NDArray[np.float32] = iou(predicted.astype(np.float32), boxes) * recent[:, None]
        return overlap

    def _alike(self, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (tracks, n) cosine similarities; -1 for a track without an embedding."""
        nothing = np.full(len(units), -1, np.float32)
        rows = [nothing if track.embedding is None else units @ track.embedding for track in self._tracks]
        return np.stack(rows)

    def _place_scores(self, overlap: NDArray[np.float32], alike: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return (tracks, n): overlap, less up to 1 for the pair that looks least alike; -inf where impossible."""
        possible = overlap >= _MIN_IOU
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

    def _see(
        self,
        track: _Track | None,
        box: NDArray[np.float32],
        unit: NDArray[np.float32] | None,
        *,
        walked: bool,
        faint: bool,
    ) -> int | None:
        """Bring ``track`` up to date, or start one unless the detection is ``faint``; return its id."""
        if track is not None:
            track.move(box, walked=walked)
        elif faint:
            return None
        else:
            track = _Track(self._next_id, box)
            self._tracks.append(track)
            self._next_id += 1
        track.faint = faint
        if unit is not None:
            track.learn(unit)
        return track.id


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row of (n, D) to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: NDArray[np.float32] = (rows / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return units


def _best_pairs(scores: NDArray[np.float32], taken: Mapping[int, int] | None = None) -> dict[int, int]:
    """Pair rows with columns so that the sum of scores is greatest; return {column: row}, -inf never paired.

    Args:
        taken: {column: row} of pairs made before, whose rows and columns are left out.
    """
    possible = np.isfinite(scores)
    if taken:
        possible[list(taken.values())] = possible[:, list(taken)] = False
    # Few pairs are possible in a usual frame, and the time of `assign` grows with the cube of the size.
    rows, columns = np.flatnonzero(possible.any(axis=1)), np.flatnonzero(possible.any(axis=0))
    cost = np.where(possible, -scores, _IMPOSSIBLE)[np.ix_(rows, columns)]
    pairs = [(int(rows[row]), int(columns[column])) for row, column in assign(cost.astype(np.float64))]
    return {column: row for row, column in pairs if possible[row, column]}
