"""What every data set is made of: images on disk, what is known about them, and what is wrong with some of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from dpal_edge.errors import DataError

Target = TypeVar("Target")
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
TOLERANCE = 0.05  # share of bad annotations above which a data set is refused rather than read without them


@dataclass(frozen=True)
class Sample(Generic[Target]):
    """One person, or one frame: an image, the part of it that is meant, and what is known."""

    image: Path
    target: Target
    box: Box | None = None  # None is the whole image
    size: tuple[int, int] | None = None  # height, width of the image as its annotations have it, where they do


@dataclass(frozen=True)
class Split(Generic[Target]):
    """One part of a data set, in an order that is the same on every machine."""

    samples: tuple[Sample[Target], ...]
    labels: tuple[str, ...] = ()  # what the ids or columns of the targets mean; none for identities
    protocol: str = ""  # the layout whose conventions of scoring hold, for example "crowdpose"
    problems: tuple[str, ...] = ()  # bad annotations that were left out, each with file and line or id, and the reason


@dataclass
class Problems:
    """Bad annotations met while reading a file or folder: counted and left out, or too many to go on."""

    source: Path  # the file or folder that is read
    tolerance: float = TOLERANCE
    found: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Note that the annotation ``where`` (line or id) was left out."""
        self.found.append(f"{self.source}: {where}: {reason}")

    def finish(self, good: int) -> tuple[str, ...]:
        """Return the problems, ``good`` annotations having been read beside them.

        Raises:
            DataError: their share is above the tolerance.
        """
        bad = len(self.found)
        if bad > self.tolerance * (bad + good):
            more = f" (and {bad - 1} more of {bad + good})" if bad > 1 else ""
            raise DataError(
                f"{self.found[0]}{more}; more than {100 * self.tolerance:g} % are bad, so nothing is read: correct "
                f"them or leave them out"
            )
        return tuple(self.found)


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk."""

    name: str
    markers: tuple[str, ...]  # glob patterns below the folder, "{split}" for the split; one that matches recognises it
    read: Callable[[Path, str], Split[Any]]
    expected: str = ""  # which files are expected where, in one line; none for one that is only recognised to refuse it


def read_layout(folder: Path, split: str, layouts: tuple[Layout, ...]) -> Split[Any]:
    """Read ``split`` of ``folder`` in the first of ``layouts`` that the folder shows a marker of.

    Raises:
        DataError: no folder, or no marker of any layout; names what was expected where. Or what its reader raises.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a data set")
    if layout := _recognise(folder, split, layouts):
        return layout.read(folder, split)
    known = "; ".join(f"{one.name}: {one.expected.format(split=split)}" for one in layouts if one.expected)
    children = (child for child in sorted(folder.iterdir()) if child.is_dir())
    inner = next((child for child in children if _recognise(child, split, layouts)), None)
    hint = f". Did you mean {inner}?" if inner else ""
    raise DataError(f"{folder}: {split!r} is in none of the layouts known here. {known}{hint}")


def _recognise(folder: Path, split: str, layouts: tuple[Layout, ...]) -> Layout | None:
    for layout in layouts:
        if any(any(folder.glob(marker.format(split=split))) for marker in layout.markers):
            return layout
    return None


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


def read_rows(path: Path, expected: str) -> list[tuple[int, str]]:
    """Return the lines of the list ``path`` that are not blank, each with its number, the first being 1.

    Raises:
        DataError: missing, not text, or all are blank.
    """
    lines = enumerate(read_text(path, expected).splitlines(), start=1)
    rows = [(number, line.strip()) for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: names no images; expected {expected}")
    return rows
