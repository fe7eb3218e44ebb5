"""Reading the images of a data set."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.sample import Sample

Pixels = NDArray[np.uint8]

_ORIENTATION = 0x0112  # EXIF's tag
# What undoes each orientation, by Pillow's names.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def read_crop(sample: Sample[Any], size: tuple[int, int]) -> Pixels:
    """Read the part of an image that a sample means, resized (bicubic) to ``size``, aspect ratio not kept.

    Args:
        size: height, width of the crop.

    Returns:
        (height, width, 3) RGB.

    Raises:
        DataError: as ``open_sample``.
        BackendUnavailable: Pillow is not installed.
    """
    image = open_sample(sample)
    height, width = size
    return np.asarray(image.resize((width, height), _pillow().Resampling.BICUBIC, box=sample.box))


def open_sample(sample: Sample[Any]) -> Any:
    """Decode the whole image of a sample, RGB, upright.

    Raises:
        DataError: missing, not an image, of another size than its annotations say, or its box reaches beyond it.
        BackendUnavailable: Pillow is not installed.
    """
    image = open_image(sample.image, "RGB")
    if sample.size is not None and sample.size != (image.height, image.width):
        height, width = sample.size
        raise DataError(
            f"{sample.image}: {image.width}x{image.height} pixels, upright, but annotated as {width}x{height}; does "
            f"the annotation belong to this file?"
        )
    left, top, right, bottom = sample.box or (0, 0, *image.size)
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise DataError(
            f"{sample.image}: the box {sample.box} (left, top, right, bottom) is not inside "
            f"{image.width}x{image.height} pixels; does the annotation belong to this file?"
        )
    return image


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
    """Decode an image, converted to ``mode``, and turn it upright.

    Raises:
        DataError: missing, or not an image.
        BackendUnavailable: Pillow is not installed.
    """
    try:
        with _pillow().open(path) as image:
            image.load()
            return upright(image, mode)
    except unreadable() as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or leave it out") from error


def read_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image in pixels, upright, from its header.

    Raises:
        DataError: it cannot be read as an image.
        BackendUnavailable: Pillow is not installed.
    """
    try:
        with _pillow().open(path) as image:
            turned = _orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except unreadable() as error:
        raise DataError(f"{path} cannot be read as an image") from error


def unreadable() -> tuple[type[Exception], ...]:
    """Return what Pillow raises on damaged files, besides errors of the file system.

    Of TIFFs also TypeError, where a field has another type than is expected, and OverflowError, where it holds a number
    too large.
    """
    return OSError, _pillow().DecompressionBombError, SyntaxError, ValueError, TypeError, OverflowError


def upright(image: Any, mode: str | None = None) -> Any:
    """Return a Pillow image in ``mode``, turned as the orientation in its EXIF data asks for.

    Not ``ImageOps.exif_transpose``, which writes the other EXIF fields anew and fails on damaged ones.
    """
    turn = _TURNS.get(_orientation(image))
    converted = image.convert(mode) if mode else image
    return converted if turn is None else converted.transpose(getattr(_pillow().Transpose, turn))


def _orientation(image: Any) -> int:
    """Return the orientation, 1 to 8, that EXIF data give to a Pillow image; from 5 on its sides are exchanged."""
    found = image.getexif().get(_ORIENTATION)
    return found if isinstance(found, int) else 1


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise BackendUnavailable("reading images needs Pillow: pip install 'dpal-edge[evaluate]'") from error
    return Image
