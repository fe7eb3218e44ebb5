"""Reading the images of a data set."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.sample import Box

Pixels = NDArray[np.uint8]


def read_crop(path: Path, size: tuple[int, int], box: Box | None = None) -> Pixels:
    """Read ``box`` of an image, resized (bicubic) to ``size``, aspect ratio not kept.

    Args:
        size: height, width of the crop.
        box: left, top, right, bottom in pixels; None is the whole image.

    Returns:
        (height, width, 3) RGB.

    Raises:
        DataError: missing, not an image, or the box reaches beyond it.
        BackendUnavailable: Pillow is not installed.
    """
    image = open_image(path, "RGB")
    left, top, right, bottom = box or (0, 0, *image.size)
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise DataError(
            f"{path}: the box {box} (left, top, right, bottom) is not inside {image.width}x{image.height} pixels; "
            f"does the annotation belong to this file?"
        )
    height, width = size
    return np.asarray(image.resize((width, height), _pillow().Resampling.BICUBIC, box=(left, top, right, bottom)))


def read_ids(path: Path) -> Pixels:
    """Read a mask of class ids (H, W) from an image with one channel; a palette, where there is one, is ignored.

    Raises:
        DataError: missing, not an image, or with several channels.
        BackendUnavailable: Pillow is not installed.
    """
    image = open_image(path)
    if image.mode not in ("L", "P"):
        raise DataError(f"{path}: mode {image.mode}, expected one channel of 8 bits that holds class ids")
    return np.asarray(image)


def open_image(path: Path, mode: str | None = None) -> Any:
    """Decode an image, converted to ``mode``."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            image.load()
            return image.convert(mode) if mode else image
    except (OSError, pillow.DecompressionBombError, SyntaxError, ValueError) as error:  # Pillow's, on damaged files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or leave it out") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise BackendUnavailable("reading images needs Pillow: pip install 'dpal-edge[evaluate]'") from error
    return Image
