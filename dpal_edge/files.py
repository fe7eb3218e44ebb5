"""Files: atomic writes, content hashes, and the images in folders."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class FoundImages:
    """What lies in the folders of a run."""

    paths: tuple[Path, ...]  # sorted, so that a position names the same image on every machine
    ignored: tuple[Path, ...]  # files that are no images by their suffix


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` on success, remove it on any failure.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    # The suffix stays last: video and image writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # a rename must not become durable before the bytes it names
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder, "
            f"nothing was left half-written"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_lines(path: Path, documents: list[dict[str, Any]]) -> None:
    """Append JSON ``documents`` to ``path``, one a line; a crash can cut only the last one short."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(document)}\n" for document in documents))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON documents of ``path``, one a line; not those that a crash cut short, none if there is no file."""
    documents = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            documents.append(json.loads(line))
    return [document for document in documents if isinstance(document, dict)]


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file at ``path``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_images(folders: tuple[str, ...]) -> FoundImages:
    """List the images below ``folders``, following no links to folders.

    Raises:
        DataError: a folder is missing, is not a folder, or no image lies in it.
    """
    paths: list[Path] = []
    ignored: list[Path] = []
    for folder in folders:
        if not Path(folder).is_dir():
            what = "is a file" if Path(folder).exists() else "does not exist"
            raise DataError(f"{folder}: {what}; expected a folder of images")
        before = len(paths)
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                (paths if path.suffix.lower() in IMAGE_SUFFIXES else ignored).append(path)
        if len(paths) == before:
            raise DataError(f"{folder}: no images in it; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return FoundImages(tuple(sorted(paths)), tuple(sorted(ignored)))
