"""Parts of data sets, for probes that must be quick: the same for one seed on every machine."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dpal_edge.tasks.reid import matched_queries
from dpal_edge.tasks.sample import Split


def limit_splits(splits: Mapping[str, Split[Any]], limit: int | None, seed: int) -> dict[str, Split[Any]]:
    """Keep at most ``limit`` images of each split, drawn by ``seed``, in their order; None keeps all.

    Of query and gallery all images of a few people are kept, as many as fit and at least one, all of whom can be
    found: an easier search than the whole gallery's.

    Raises:
        DataError: nobody can.
    """
    if limit is None:
        return dict(splits)
    rng = np.random.default_rng([seed, 7])
    if "query" in splits:
        people = _draw_people(splits, limit, rng)
        return {
            name: _select(split, [s.target.person in people for s in split.samples]) for name, split in splits.items()
        }
    chosen = {}
    for name, split in splits.items():
        ranks = rng.permutation(len(split.samples))
        chosen[name] = _select(split, (ranks < limit).tolist())
    return chosen


def _draw_people(splits: Mapping[str, Split[Any]], limit: int, rng: np.random.Generator) -> set[int]:
    """Draw people who can be found, until the images of one more would not fit into one of the splits."""
    query, gallery = ([sample.target for sample in splits[name].samples] for name in ("query", "gallery"))
    counts = [Counter(sample.target.person for sample in split.samples) for split in splits.values()]
    people = rng.permutation(sorted({query[i].person for i in matched_queries(query, gallery)})).tolist()
    images = np.cumsum([[count[person] for count in counts] for person in people], axis=0)
    return set(people[: max(int((images <= limit).all(1).sum()), 1)])


def _select(split: Split[Any], kept: list[bool]) -> Split[Any]:
    return replace(split, samples=tuple(sample for sample, keep in zip(split.samples, kept, strict=True) if keep))
