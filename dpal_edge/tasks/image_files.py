"""Image files of a data set: which exist, and how large they are, without decoding them."""

from pathlib import Path

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.image import orientation


class ImageFiles:
    """Tells whether files exist; lists each folder once, which is faster than asking for a hundred thousand files."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self._names:
            self._names[folder] = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        return path.name in self._names[folder]


def read_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image in pixels, upright, from its header.

    Raises:
        DataError: it cannot be read as an image.
        BackendUnavailable: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise BackendUnavailable("reading images needs Pillow: pip install 'dpal-edge[evaluate]'") from error
    try:
        with Image.open(path) as image:
            turned = orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as an image") from error
