"""Label spaces of a data set and of a head, matched by name; and outputs for mirrored images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import ConfigError
from dpal_edge.evaluate.predictor import HeadInfo, Raw
from dpal_edge.tasks.decoding import SIMCC_SPLIT
from dpal_edge.tasks.labels import flip_pairs


def label_columns(labels: Sequence[str], head: HeadInfo, folder: Path) -> NDArray[np.int64]:
    """Return where in the head's outputs each label of a data set stands.

    The head may know more labels: joints and attributes beyond the set's are not scored, and a pixel's class is the
    likeliest of those that the set has.

    Raises:
        ConfigError: the data set has labels that the head does not know.
    """
    unknown = [name for name in labels if name not in head.labels]
    if unknown:
        spare = ", ".join(name for name in head.labels if name not in labels) or "none"
        raise ConfigError(
            f"{folder}: has {', '.join(unknown)}, which the model's {head.task} head does not know (it has besides: "
            f"{spare}); use data with the head's labels, or fine-tune on this set"
        )
    return np.array([head.labels.index(name) for name in labels], np.int64)


def mirror_back(raw: Raw, head: HeadInfo, size: tuple[int, int]) -> Raw:
    """Turn the output (B, ...) for mirrored images into the one that the images as they are should have.

    Labels that differ in left and right alone change places.

    Args:
        size: height, width of the model's input.
    """
    if head.kind == "simcc":
        x, y = np.split(raw, [SIMCC_SPLIT * size[1]], axis=-1)
        raw = np.concatenate([x[..., ::-1], y], axis=-1)
    elif raw.ndim == 4:  # maps
        raw = raw[..., ::-1]
    swapped = np.arange(len(head.labels))
    for one, other in flip_pairs(head.labels):
        swapped[[one, other]] = other, one
    return raw[:, swapped] if head.labels else raw
