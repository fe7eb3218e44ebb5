"""Person re-identification: the Market-1501 layout, mean average precision and cumulative matching."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.files import IMAGE_SUFFIXES
from dpal_edge.tasks.sample import Problems, Sample, Split, require

JUNK = -1  # person id of Market's detections that are nobody; 0 is a distractor and stays in the gallery
_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_LAYOUT = f"the Market-1501 layout: folders {', '.join(_FOLDERS.values())} of images named PPPP_cCsS_..."
_NAME = re.compile(r"(-1|\d{1,18})_c(\d{1,18})", re.ASCII)  # numbers that NumPy takes
_CHUNK = 256  # queries compared with the gallery at a time: bounds memory


@dataclass(frozen=True)
class Identity:
    """Who is on an image, and which camera took it."""

    person: int
    camera: int


def read_market(folder: Path, split: str) -> Split[Identity]:
    """Read ``split`` (train, query or gallery) of a folder in the layout of Market-1501; junk images are left out.

    Images whose names tell no person and camera are problems, and so are folders with images, which are not read.

    Raises:
        DataError: the split's folder is missing or holds no people, or too many names are bad.
    """
    parent = require(folder / _FOLDERS[split], MARKET_LAYOUT)
    problems, samples = Problems(parent), []
    for path in sorted(parent.iterdir()):
        if path.name.startswith("."):
            continue  # copies from a Mac hold ._*.jpg
        if path.suffix.lower() not in IMAGE_SUFFIXES:  # the original holds Thumbs.db
            if path.is_dir() and any(inner.suffix.lower() in IMAGE_SUFFIXES for inner in path.iterdir()):
                problems.add(path.name, "a folder, whose images are not read; move them into the one above")
            continue
        name = _NAME.match(path.name)
        if name is None:
            problems.add(path.name, f"its name tells no person and camera; expected {MARKET_LAYOUT}")
        elif int(name[1]) != JUNK:
            samples.append(Sample(path, Identity(person=int(name[1]), camera=int(name[2]))))
    found = problems.finish(len(samples))
    if not samples:
        raise DataError(f"{parent}: no images of people in it; expected {MARKET_LAYOUT}")
    return Split(tuple(samples), protocol="market1501", problems=found)


def matched_queries(query: Sequence[Identity], gallery: Sequence[Identity]) -> NDArray[np.int64]:
    """Return which queries have their person in the gallery under another camera: those that are scored.

    Raises:
        DataError: none has.
    """
    cameras: dict[int, set[int]] = {}
    for identity in gallery:
        cameras.setdefault(identity.person, set()).add(identity.camera)
    found = [i for i, identity in enumerate(query) if cameras.get(identity.person, set()) - {identity.camera}]
    if not found:
        raise DataError(
            f"none of {len(query)} query images has its person in the gallery under another camera; "
            f"are query and gallery of one data set?"
        )
    return np.array(found, np.int64)


def retrieval_metrics(
    query_features: NDArray[np.floating],
    gallery_features: NDArray[np.floating],
    query: Sequence[Identity],
    gallery: Sequence[Identity],
) -> dict[str, float]:
    """Rank the gallery by cosine similarity to each query and score the ranking as Market-1501 does.

    Gallery images of the query's person by the query's camera are left out of its ranking; queries without any match
    are left out of the means. Average precision is the mean of the precision at each match. Ties keep the gallery's
    order.

    Args:
        query_features: (Q, D), of any length but zero.
        gallery_features: (G, D).

    Returns:
        ``mAP``, ``rank-1`` and ``rank-5``, 0..1.

    Raises:
        DataError: no query has a match in the gallery.
    """
    matched = matched_queries(query, gallery)
    persons, cameras = _columns(gallery)
    directions = _unit(gallery_features)
    scores = []
    for start in range(0, len(matched), _CHUNK):
        part = matched[start : start + _CHUNK]
        similarity = _unit(query_features[part]) @ directions.T
        for i, order in zip(part, np.argsort(-similarity, axis=1, kind="stable"), strict=True):
            same = persons == query[i].person
            seen = same & (cameras == query[i].camera)
            scores.append(_score(same[order[~seen[order]]]))
    means = np.mean(scores, axis=0)
    return dict(zip(("mAP", "rank-1", "rank-5"), means.tolist(), strict=True))


def _score(matches: NDArray[np.bool_]) -> tuple[float, bool, bool]:
    """Score one ranking, which holds a match: average precision, a match first, a match in the first five."""
    [places] = np.nonzero(matches)
    precision = np.arange(1, len(places) + 1) / (places + 1)
    return float(precision.mean()), bool(places[0] < 1), bool(places[0] < 5)


def _columns(identities: Sequence[Identity]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array([i.person for i in identities]), np.array([i.camera for i in identities])


def _unit(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.floating] = rows / np.maximum(length, np.finfo(rows.dtype).tiny)
    return unit
