"""What every data set is made of: images on disk and what is known about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dpal_edge.errors import DataError

Target = TypeVar("Target")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Sample(Generic[Target]):
    """One person: an image, the part of it that is meant, and what is known."""

    image: Path
    target: Target
    box: Box | None = None  # None is the whole image


@dataclass(frozen=True)
class Split(Generic[Target]):
    """One part of a data set, in an order that is the same on every machine."""

    samples: tuple[Sample[Target], ...]
    labels: tuple[str, ...] = ()  # what the ids or columns of the targets mean; none for identities


def require(path: Path, expected: str) -> Path:
    """Return ``path`` if it exists.

    Raises:
        DataError: it does not; ``expected`` says which layout wants it there.
    """
    if not path.exists():
        raise DataError(f"{path}: missing; expected {expected}")
    return path


def read_text(path: Path, expected: str) -> str:
    """Return the text of the UTF-8 file ``path``, which ``expected`` describes.

    Raises:
        DataError: missing or not text.
    """
    try:
        return require(path, expected).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); expected {expected}") from error
