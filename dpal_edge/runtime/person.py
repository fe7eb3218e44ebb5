"""What is known about one person in one frame, and how the outputs of the heads become it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ModelFileError
from dpal_edge.manifest import HeadSpec
from dpal_edge.runtime.tracker import unit_rows
from dpal_edge.tasks.decoding import SIMCC_SPLIT, decode_classes, decode_joints, place_in_box, probabilities

_Raw = NDArray[np.float32]
_Columns = dict[str, Sequence[Any]]  # a field of Person -> its value for each of n people


@dataclass(frozen=True, eq=False)
class Person:
    """One person in one frame. What the bundle has no head for is None.

    Of a tracked person the embedding and the attributes are running means over the track: they flicker less than what
    one frame shows.
    """

    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    score: float  # of the detector, 0..1
    track_id: int | None  # from 1; None without a tracker
    embedding: NDArray[np.float32] | None = None  # (D,) of length 1
    keypoints: NDArray[np.float32] | None = None  # (K, 3): x, y in pixels of the frame, confidence in 0..1
    keypoint_names: tuple[str, ...] = ()  # K
    attributes: dict[str, float] | None = None  # probability of each, 0..1
    crop_box: tuple[int, int, int, int] | None = None  # box in whole pixels inside the frame: what the model saw
    parsing_logits: NDArray[np.float32] | None = None  # (C, h, w) of the crop, at the head's own resolution
    parsing_names: tuple[str, ...] = ()  # C

    @cached_property
    def parsing(self) -> NDArray[np.uint8] | None:
        """Class of each pixel of ``crop_box``, (bottom - top, right - left), an index of ``parsing_names``.

        It is computed when first asked for, since an application that does not look at it should not pay.
        """
        if self.parsing_logits is None or self.crop_box is None:
            return None
        left, top, right, bottom = self.crop_box
        return decode_classes(self.parsing_logits, (bottom - top, right - left))

    @cached_property
    def parsing_areas(self) -> dict[str, float] | None:
        """Share of the crop that each class takes, 0..1, at the head's own resolution, without those that take none."""
        if self.parsing_logits is None:
            return None
        counts = np.bincount(self.parsing_logits.argmax(0).ravel(), minlength=len(self.parsing_names)).tolist()
        return {name: n / sum(counts) for name, n in zip(self.parsing_names, counts, strict=True) if n}

    def to_dict(self, *, embedding: bool = False, parsing: bool = False) -> dict[str, Any]:
        """Return what JSON can hold of what is known.

        Args:
            embedding: add the embedding as a list.
            parsing: add the class of each pixel of ``crop_box``, row by row, as runs [class, length].
        """
        person: dict[str, Any] = {
            "box": [round(edge, 2) for edge in self.box],
            "score": round(self.score, 4),
            "track_id": self.track_id,
        }
        if self.keypoints is not None:
            rows = zip(self.keypoint_names, self.keypoints.tolist(), strict=True)
            person["keypoints"] = {name: [round(x, 2), round(y, 2), round(p, 4)] for name, (x, y, p) in rows}
        if self.attributes is not None:
            person["attributes"] = {name: round(share, 4) for name, share in self.attributes.items()}
        if self.parsing_areas is not None:
            person["parsing_areas"] = {name: round(share, 4) for name, share in self.parsing_areas.items()}
        if parsing and self.parsing is not None:
            runs = [[key, sum(1 for _ in run)] for key, run in groupby(self.parsing.ravel().tolist())]
            person["parsing"] = {"box": self.crop_box, "names": self.parsing_names, "runs": runs}
        if embedding:
            person["embedding"] = None if self.embedding is None else [round(x, 6) for x in self.embedding.tolist()]
        return person


def decode_heads(
    heads: Sequence[HeadSpec], outputs: dict[str, _Raw], size: tuple[int, int], crop_boxes: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Turn the outputs for n crops into n people's fields of ``Person``, all people at once.

    Args:
        outputs: (n, ...) by head.
        size: height, width of the model's input.
        crop_boxes: (n, 4) left, top, right, bottom of the crops in pixels of the frame.
    """
    columns: _Columns = {"crop_box": [tuple(box) for box in crop_boxes.tolist()]}
    for head in heads:
        columns |= _DECODERS[head.task](head, outputs[head.name], size, crop_boxes)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_heads(heads: Sequence[HeadSpec], size: tuple[int, int]) -> None:
    """Refuse heads that no decoding here fits.

    Raises:
        ModelFileError: a task that is not known, or a shape that is not its own.
    """
    for head in heads:
        if head.task not in _DECODERS:
            raise ModelFileError(
                f"the bundle has a head for {head.task!r}, expected {', '.join(_DECODERS)}; a detector is given as "
                f"detector=, a bundle of a newer dpal-edge needs that one"
            )
        expected = _expected_shape(head, size)
        fits = len(head.shape) == len(expected) and all(
            e in (None, n) for n, e in zip(head.shape, expected, strict=True)
        )
        if not fits:
            shown = ", ".join("any" if side is None else str(side) for side in expected)
            raise ModelFileError(
                f"head {head.name!r} for {head.task} has shape {head.shape}, its labels and kind ask for ({shown}); "
                f"export the bundle again"
            )


def _expected_shape(head: HeadSpec, size: tuple[int, int]) -> tuple[int | None, ...]:
    """Return the shape of a known head without the batch axis, None where any length will do."""
    if head.task == "embedding":
        return (None,)
    if head.task == "attributes":
        return (len(head.labels),)
    if head.kind == "simcc":
        return len(head.labels), SIMCC_SPLIT * sum(size)
    return len(head.labels), None, None


def _embedding(head: HeadSpec, raw: _Raw, size: tuple[int, int], boxes: NDArray[np.int64]) -> _Columns:
    return {"embedding": list(unit_rows(raw))}


def _pose(head: HeadSpec, raw: _Raw, size: tuple[int, int], boxes: NDArray[np.int64]) -> _Columns:
    places, confidence = decode_joints(raw, head.kind, size)
    placed = place_in_box(places, size, boxes.astype(np.float32))
    keypoints = np.concatenate([placed, confidence[..., None]], axis=-1)
    return {"keypoints": list(keypoints), "keypoint_names": [head.labels] * len(raw)}


def _parsing(head: HeadSpec, raw: _Raw, size: tuple[int, int], boxes: NDArray[np.int64]) -> _Columns:
    return {"parsing_logits": list(raw), "parsing_names": [head.labels] * len(raw)}


def _attributes(head: HeadSpec, raw: _Raw, size: tuple[int, int], boxes: NDArray[np.int64]) -> _Columns:
    return {"attributes": [dict(zip(head.labels, row, strict=True)) for row in probabilities(raw).tolist()]}


_DECODERS: dict[str, Callable[[HeadSpec, _Raw, tuple[int, int], NDArray[np.int64]], _Columns]] = {
    "embedding": _embedding,
    "pose": _pose,
    "parsing": _parsing,
    "attributes": _attributes,
}
