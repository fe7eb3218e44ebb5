"""Person detection: the people of a frame, and how well boxes find them."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable
from dpal_edge.tasks.crowd_metrics import (
    Found,
    Predictions,
    Truths,
    box_areas,
    find_people,
    jaccard_index,
    miss_rate,
    recall,
    recall_at_precision,
)
from dpal_edge.tasks.sample import Split

Floats = NDArray[np.float32]

_MOST_BOXES = {"crowdhuman": 1000, "citypersons": 1000}  # of a frame that count, the highest scores; 100 elsewhere
_PRECISION = 0.9
# CityPersons' parts: the lowest person, in pixels, and the range of what is to be seen of them.
_SUBSETS = {"reasonable": (50.0, 0.65, math.inf), "heavy": (50.0, 0.2, 0.65)}
_SLACK = 1.25  # boxes lower than the lowest person by more than this factor are no false alarms


@dataclass(frozen=True, eq=False)
class People:
    """The people of one frame, in pixels of it; there may be none."""

    boxes: Floats  # (n, 4) left, top, right, bottom
    ignore: NDArray[np.bool_]  # (n,) true where nobody need be found, and what is found is no mistake
    visible: Floats  # (n, 4) the part that can be seen; the whole box where that is not known

    @property
    def visibility(self) -> NDArray[np.float64]:
        """The share (n,) of each box that can be seen."""
        return box_areas(self.visible) / np.maximum(box_areas(self.boxes), 1e-9)


def detection_metrics(predictions: Predictions, split: Split[People]) -> dict[str, float]:
    """Score boxes found in whole frames, with the metrics of the split's protocol.

    Args:
        predictions: of each of the frames of ``split``, boxes (m, 4) left, top, right, bottom in pixels and scores
            (m,); the uncertain ones too, since metrics go through all thresholds.

    Returns:
        0..1, the most important first; NaN where there is nobody to be found:

        * ``MR^-2`` for the protocol ``crowdhuman``, and ``MR^-2_reasonable`` and ``MR^-2_heavy`` for ``citypersons``:
          the log-average miss rate, the lower the better. Reasonable are people 50 pixels high and more of whom 65 %
          and more can be seen, heavy those of whom 20 to 65 %;
        * ``AP50`` at an IoU of .5 and ``AP``, the mean over .5 to .95, as COCO computes them, with at most 100 boxes
          of a frame (1000 for crowdhuman and citypersons);
        * ``JI`` for ``crowdhuman``, the Jaccard index at the best threshold;
        * ``recall50``, the share of people found at an IoU of .5 by all the boxes given, and ``recall50@precision0.9``,
          by so many of the highest scores as are 9 in 10 right.

    Raises:
        BackendUnavailable: the library that computes AP is not installed.
    """
    people = [sample.target for sample in split.samples]
    truths = _truths(people)
    found = find_people(predictions, truths)
    overall = {
        **average_precision(predictions, people, _MOST_BOXES.get(split.protocol, 100)),
        "recall50": recall(found),
        f"recall50@precision{_PRECISION}": recall_at_precision(found, _PRECISION),
    }
    if split.protocol == "crowdhuman":
        return {"MR^-2": miss_rate(found), **overall, "JI": jaccard_index(predictions, truths)}
    if split.protocol == "citypersons":
        return {**{f"MR^-2_{name}": miss_rate(_subset(predictions, people, name)) for name in _SUBSETS}, **overall}
    return overall


def average_precision(predictions: Predictions, people: Sequence[People], most: int = 100) -> dict[str, float]:
    """Return COCO's ``AP50`` and ``AP`` of boxes, 0..1; NaN where there is nobody to be found.

    What lies in an ignored box, by the share of its own area that the threshold asks for, counts neither way.
    Differs: CrowdHuman's toolkit joins precisions by straight lines, where COCO takes the best at each recall and
    above, which gives up to a hundredth more.

    Args:
        predictions: boxes and scores of each frame.
        people: of each frame.
        most: boxes of a frame that count, the highest scores.

    Raises:
        BackendUnavailable: the library that computes it is not installed.
    """
    try:
        import hotcoco
    except ModuleNotFoundError as error:
        raise BackendUnavailable("AP needs hotcoco: pip install 'dpal-edge[evaluate]'") from error
    reference = hotcoco.COCO(_document(people))
    evaluation: Any = hotcoco.COCOeval(reference, reference.load_res(_results(predictions)), "bbox")
    evaluation.params.max_dets = [most]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is not COCO's number of boxes: known and documented
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[:, :, 0, 0, 0]  # IoU .5 to .95, recalls; people of all sizes
    if (precision < 0).any():
        return {"AP50": math.nan, "AP": math.nan}
    return {"AP50": float(precision[0].mean()), "AP": float(precision.mean())}


def _subset(predictions: Predictions, people: Sequence[People], name: str) -> Found:
    """Look for CityPersons' people of a subset: the others are ignored."""
    height, least, most = _SUBSETS[name]
    chosen = []
    for frame in people:
        fits = (_heights(frame.boxes) >= height) & (frame.visibility >= least) & (frame.visibility <= most)
        chosen.append(replace(frame, ignore=frame.ignore | ~fits))
    tall = [_heights(boxes) >= height / _SLACK for boxes, _ in predictions]
    return find_people([(b[keep], s[keep]) for (b, s), keep in zip(predictions, tall, strict=True)], _truths(chosen))


def _truths(people: Sequence[People]) -> Truths:
    return [(frame.boxes, frame.ignore) for frame in people]


def _document(people: Sequence[People]) -> dict[str, Any]:
    """Return people as a document in COCO's format."""
    rows = [
        (number, box, ignore)
        for number, frame in enumerate(people)
        for box, ignore in zip(_as_coco(frame.boxes).tolist(), frame.ignore.tolist(), strict=True)
    ]
    annotations = [
        {"id": i, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(ignore)}
        for i, (image, box, ignore) in enumerate(rows, start=1)
    ]
    images = [{"id": number} for number in range(len(people))]
    return {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": annotations}


def _results(predictions: Predictions) -> NDArray[np.float64]:
    """Return image, left, top, width, height, score and category (N, 7) of all boxes."""
    parts = [
        np.column_stack([np.full(len(boxes), number), _as_coco(boxes), scores, np.ones(len(boxes))])
        for number, (boxes, scores) in enumerate(predictions)
    ]
    return np.concatenate([np.zeros((0, 7)), *parts])


def _as_coco(boxes: Floats) -> NDArray[np.float64]:
    """Return left, top, width, height."""
    exact = boxes.astype(np.float64).reshape(-1, 4)
    return np.concatenate([exact[:, :2], exact[:, 2:] - exact[:, :2]], axis=1)


def _heights(boxes: Floats) -> Floats:
    return boxes[:, 3] - boxes[:, 1]
