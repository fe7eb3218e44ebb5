"""Label spaces: names that mean the same on either side of the body."""

import re
from collections.abc import Sequence

_OTHER_SIDE = {"left": "right", "right": "left"}


def flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the pairs of labels that a horizontal flip of the image exchanges, each once.

    They are those whose names differ in left and right alone, as ``left_knee`` and ``right_knee``.
    """
    index = {name.lower(): i for i, name in enumerate(names)}
    mirrored = (
        (i, index.get(re.sub("left|right", lambda found: _OTHER_SIDE[found[0]], name))) for name, i in index.items()
    )
    return tuple((i, j) for i, j in mirrored if j is not None and i < j)
