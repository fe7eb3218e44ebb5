"""People in the forms of others: COCO's results and supervision's detections."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpal_edge.errors import BackendUnavailable
from dpal_edge.runtime.person import Person

_PERSON = 1  # COCO's number of the category


def to_coco(people: Sequence[Person], image_id: int) -> list[dict[str, Any]]:
    """Return COCO's results format for one image: boxes as left, top, width, height, scores in 0..1.

    Where joints are known, "keypoints" holds x, y and the confidence of each, in the order of the model's names; COCO's
    own tools ignore the third, and expect 17 joints in their order.
    """
    results = []
    for person in people:
        left, top, right, bottom = person.box
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": _PERSON,
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "score": round(person.score, 5),
        }
        if person.keypoints is not None:
            result["keypoints"] = [round(value, 4) for value in person.keypoints.ravel().tolist()]
        results.append(result)
    return results


def to_supervision(people: Sequence[Person]) -> Any:
    """Return ``supervision.Detections``: boxes, scores, track ids, and by name in ``data`` what else is known of all.

    Its annotators, zones and line counters take it from there. ``data`` holds "embedding" (n, D) and "keypoints"
    (n, K, 3), as ``Person`` has them; people without a track have the id -1 where others have one.

    Raises:
        BackendUnavailable: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise BackendUnavailable(f"supervision cannot be imported ({error}); pip install supervision") from error
    ids = [person.track_id for person in people]
    data: dict[str, Any] = {}
    for name in ("embedding", "keypoints"):
        values = [getattr(person, name) for person in people]
        if values and all(value is not None for value in values):
            data[name] = np.stack(values)
    return supervision.Detections(
        xyxy=np.array([person.box for person in people], np.float32).reshape(-1, 4),
        confidence=np.array([person.score for person in people], np.float32),
        class_id=np.zeros(len(people), int),
        tracker_id=np.array([-1 if one is None else one for one in ids])
        if any(one is not None for one in ids)
        else None,
        data=data,
    )
