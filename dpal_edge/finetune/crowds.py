"""Synthetic crowds: masked people, pasted on images, with boxes that are exact because the masks are known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dpal_edge.errors import DataError
from dpal_edge.files import find_images
from dpal_edge.finetune.augment import Augmentation, change_colours
from dpal_edge.finetune.frames import IGNORED, LEAST_VISIBLE, PERSON, Frame, covering_view
from dpal_edge.tasks.image import Pixels, open_image, read_ids
from dpal_edge.tasks.parsing import IGNORE, read_lip
from dpal_edge.tasks.sample import Problems

_MOST = 12  # people that are pasted on one image
_LEAST_HEIGHT = 24.0  # pixels of a person from head to foot
_LARGEST = 1.6  # greatest height in heights of the image: people so near are seen in part
_COMPANY = 0.5  # share of people who stand near the one before, so that they hide one another
_PARTLY_HIDDEN = 0.35  # share of people of whom something hides a part, as a table or a wall does
_SEEN = (0.3, 0.85)  # how much of the height, or of the width, of those is left
_INSIDE = 128  # opacity, of 255, from which a pixel belongs to a person
_COLOURS = Augmentation(colour=0.25, grey=0.03, low_resolution=0.3)


class Crowds:
    """Cut-outs of people and images to put them on; their pixels are read when they are drawn."""

    def __init__(self, people: Path, backgrounds: Path | None) -> None:
        """Look the files up, and read each once: those that cannot be used are left out, see ``problems``.

        Args:
            people: a folder in the layout of LIP, whose training part is taken, all classes but 0 being the person; or
                of PNG cut-outs with an alpha channel.
            backgrounds: a folder of images without people.

        Raises:
            DataError: a folder is missing or empty, or more than 5 % of the cut-outs or backgrounds cannot be used.
        """
        found, known = _find_people(people)
        problems, usable = Problems(people, found=list(known)), []
        for image, mask in found:
            try:
                read_cutout(image, mask)
                usable.append((image, mask))
            except DataError as error:
                problems.found.append(str(error))
        self.people, self.problems = tuple(usable), problems.finish(len(usable))
        self.backgrounds: tuple[Path, ...] = ()
        if backgrounds:
            self.backgrounds, bad = _readable(backgrounds)
            self.problems += bad

    def background(self, size: tuple[int, int], rng: np.random.Generator) -> Frame:
        """Return a random part of a random background, without people.

        Raises:
            DataError: it cannot be read.
        """
        image: Image.Image = open_image(self.backgrounds[rng.integers(len(self.backgrounds))], "RGB")
        view = covering_view((image.height, image.width), size, rng)
        return Frame(view.image(image), np.zeros((0, 4), np.float32), np.zeros(0, np.int8))

    def paste(self, frame: Frame, rng: np.random.Generator) -> Frame:
        """Return ``frame`` with up to 12 more people, the nearer ones, whose feet are lower, before the others.

        Of a third of them something hides the lower part or a side, as a table or a wall does; the box is that of what
        is seen, as annotators of photographs draw it.

        Raises:
            DataError: a cut-out cannot be read.
        """
        placed = []
        places = _draw_places(int(rng.integers(_MOST + 1)), frame.pixels.shape[:2], rng)
        for x, foot, tall in sorted(places, key=lambda place: place[1]):
            person = _draw_person(read_cutout(*self.people[rng.integers(len(self.people))]), tall, rng)
            if rng.random() < _PARTLY_HIDDEN:
                _hide_part(person, rng)
            placed.append((person, round(x - person.shape[1] / 2), round(foot - person.shape[0])))
        return lay(frame, placed)


def read_cutout(path: Path, mask: Path | None) -> Image.Image:
    """Read a person, RGBA, cropped to what is opaque: a cut-out, or an image of which ``mask`` says who is there.

    Raises:
        DataError: it cannot be read, shows nobody, or the mask is of another size.
    """
    cutout: Image.Image = open_image(path, None if mask is None else "RGB")
    if mask is not None:
        cutout.putalpha(_opacity(mask, cutout.size))
    if cutout.mode != "RGBA":
        raise DataError(f"{path}: mode {cutout.mode}, expected a cut-out with an alpha channel (RGBA)")
    box = cutout.getchannel("A").point(lambda value: 255 * (value >= _INSIDE)).getbbox()
    if box is None:
        raise DataError(f"{mask or path}: shows nobody; leave it out")
    return cutout.crop(box)


def lay(frame: Frame, people: Sequence[tuple[Pixels, int, int]]) -> Frame:
    """Lay cut-outs over a frame, later ones over earlier ones.

    A box is that of the whole mask, hidden or not, where it lies inside the frame. Who is hidden, or outside, by more
    than three quarters is IGNORED; of people who were in the frame before, the whole box counts as theirs.

    Args:
        frame: what is laid on; not changed.
        people: RGBA (h, w, 4), and the column and row of the frame where its left and top edge lie.
    """
    pixels, owner = frame.pixels.copy(), np.full(frame.pixels.shape[:2], -1)
    boxes: list[tuple[int, int, int, int]] = []
    areas: list[int] = []  # of the whole masks, in pixels
    for cutout, left, top in people:
        mask = _blend(pixels, cutout, left, top)
        if mask.any():
            owner[mask] = len(boxes)
            boxes.append(_box(mask))
            areas.append(int((cutout[..., 3] >= _INSIDE).sum()))
    visible = np.bincount(owner[owner >= 0], minlength=len(boxes)) / np.array(areas, float)
    kinds = np.where(visible < LEAST_VISIBLE, IGNORED, PERSON)
    before = np.where(_hidden(frame.boxes, owner >= 0) > 1 - LEAST_VISIBLE, IGNORED, frame.kinds)
    laid = np.array(boxes, np.float32).reshape(-1, 4)
    return Frame(pixels, np.concatenate([frame.boxes, laid]), np.concatenate([before, kinds]).astype(np.int8))


def _find_people(folder: Path) -> tuple[list[tuple[Path, Path | None]], tuple[str, ...]]:
    """Return images with their masks, which cut-outs have within, and what is wrong with others."""
    if (folder / "train_id.txt").exists():
        split = read_lip(folder, "train")
        return [(sample.image, sample.target) for sample in split.samples], split.problems
    return [(path, None) for path in find_images((str(folder),)).paths], ()


def _readable(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the images of a folder that can be decoded, and what is wrong with the others."""
    problems, usable = Problems(folder), []
    for path in find_images((str(folder),)).paths:
        try:
            open_image(path)
            usable.append(path)
        except DataError as error:
            problems.found.append(str(error))
    return tuple(usable), problems.finish(len(usable))


def _opacity(path: Path, size: tuple[int, int]) -> Image.Image:
    """Return what of a mask of classes is the person; one pixel less all round, where the background shines through.

    Raises:
        DataError: it cannot be read, or is not of the image's size (width, height).
    """
    mask = read_ids(path)
    if mask.shape != size[::-1]:
        raise DataError(
            f"{path}: {mask.shape[1]}x{mask.shape[0]} pixels, expected {size[0]}x{size[1]} as its image has"
        )
    person = Image.fromarray(((mask != 0) & (mask != IGNORE)).astype(np.uint8) * 255)
    return person.filter(ImageFilter.MinFilter(3))


def _draw_places(count: int, size: tuple[int, int], rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw x of the middle, y of the feet and height, in pixels, of ``count`` people in an image of ``size``."""
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        if places and rng.random() < _COMPANY:
            x, foot, tall = places[-1]
            x += rng.normal(0, 0.4) * tall
            foot += rng.normal(0, 0.08) * tall
            tall *= np.exp(rng.normal(0, 0.12))
        else:
            tall = float(np.exp(rng.uniform(np.log(_LEAST_HEIGHT), np.log(_LARGEST * size[0]))))
            x = rng.uniform(0, size[1])
            highest = rng.uniform(-0.15 * tall, max(size[0] - 0.7 * tall, 0.25 * size[0]))
            foot = highest + tall
        places.append((x, foot, max(tall, _LEAST_HEIGHT)))
    return places


def _draw_person(cutout: Image.Image, tall: float, rng: np.random.Generator) -> Pixels:
    """Return a cut-out (h, w, 4) at ``tall`` pixels, mirrored or not, of changed colours, blurred, with a soft edge."""
    width = cutout.width * tall / cutout.height * rng.uniform(0.9, 1.15)
    person = cutout.resize((max(round(width), 2), round(tall)), Image.Resampling.BILINEAR, reducing_gap=2.0)
    alpha = person.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    colours = person.convert("RGB").filter(ImageFilter.GaussianBlur(max(rng.uniform(-1, 1.2), 0)))
    pixels = np.dstack([change_colours(np.asarray(colours), _COLOURS, rng), np.asarray(alpha)])
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _hide_part(cutout: Pixels, rng: np.random.Generator) -> None:
    """Make what is below a row of a cut-out (h, w, 4) transparent, in place, or less often one of its sides."""
    height, width = cutout.shape[:2]
    seen, which = rng.uniform(*_SEEN), rng.random()
    if which < 0.7:
        cutout[round(seen * height) :, :, 3] = 0
    elif which < 0.85:
        cutout[:, round(seen * width) :, 3] = 0
    else:
        cutout[:, : width - round(seen * width), 3] = 0


def _blend(pixels: Pixels, cutout: Pixels, left: int, top: int) -> NDArray[np.bool_]:
    """Lay a cut-out over ``pixels`` in place; return (H, W) where the person is, inside the image."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), bool)
    rows = slice(max(top, 0), min(top + cutout.shape[0], height))
    columns = slice(max(left, 0), min(left + cutout.shape[1], width))
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return mask
    part = cutout[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    opacity = part[..., 3:].astype(np.float32) / 255
    below = pixels[rows, columns]
    pixels[rows, columns] = np.rint(below + opacity * (part[..., :3].astype(np.float32) - below)).astype(np.uint8)
    mask[rows, columns] = part[..., 3] >= _INSIDE
    return mask


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the true pixels, the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _hidden(boxes: NDArray[np.float32], covered: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share (n,) of each box's pixels that are covered."""
    shares = np.zeros(len(boxes))
    for i, (left, top, right, bottom) in enumerate(np.rint(boxes).astype(int)):
        part = covered[top : max(bottom, top + 1), left : max(right, left + 1)]
        shares[i] = part.mean() if part.size else 0.0
    return shares
