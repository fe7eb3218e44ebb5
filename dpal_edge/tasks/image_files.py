"""Image files of a data set: which exist."""

from pathlib import Path


class ImageFiles:
    """Tells whether files exist; lists each folder once, which is faster than asking for a hundred thousand files."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self._names:
            self._names[folder] = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        return path.name in self._names[folder]
