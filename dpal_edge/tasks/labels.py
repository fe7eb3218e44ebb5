"""Label spaces: names that mean the same on either side of the body."""

import re
from collections.abc import Sequence

_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile("(?i:left|right)|(?<![A-Za-z])[LRlr](?![A-Za-z])|(?<![A-Za-z])[LR](?=[A-Z][a-z])")


def flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the pairs of labels that a horizontal flip of the image exchanges, each once.

    They are those whose names differ in the side alone, a word or a letter that is none: ``left_knee`` and
    ``right_knee``, ``l_knee`` and ``r_knee``, ``knee.L`` and ``knee.R``, ``LKnee`` and ``RKnee``.
    """
    index = {name.lower(): i for i, name in enumerate(names)}
    mirrored = ((i, index.get(_SIDE.sub(lambda found: _OTHER_SIDE[found[0].lower()], name).lower()))
                for i, name in enumerate(names))  # fmt: skip
    return tuple((i, j) for i, j in mirrored if j is not None and i < j)
