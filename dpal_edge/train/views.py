"""The views of DPAL: a global crop, two local crops and a crowd image per person (docs/method.md 1).

A view is drawn in two steps: a cut (where, and mirrored or not), which is made where the image is decoded, and its look
(colours, blur), which is data and may be given to the pixels here by Pillow or later on the device (augment.py). All is
drawn from NumPy generators of the image, so a view depends on seed and position alone: not on workers, nor on whether
the run was interrupted.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB
Box = tuple[int, int, int, int]  # top, left, height, width in pixels

PERSON_BLEND = 0.7  # weight of a pasted person over the background
MAX_BLUR = 2.0  # greatest radius in pixels
LOOK_COLUMNS = (3, 1, 4, 1, 1, 1)  # numbers that Look.row gives for each of its fields
_ASPECTS = {1.0: (0.75, 1.33), 0.75: (0.4, 0.6), 0.5: (0.4, 0.6), 1 / 3: (0.25, 0.4)}  # view w/h -> crop w/h
_SCENE_ASPECT = (0.75, 1.33)
_STAND_IN = 96  # pixels; longest side of an image that is blurred beyond recognition


@dataclass(frozen=True)
class Look:
    """What is done to the colours of a cut, in this order. The defaults change nothing."""

    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of brightness, contrast, saturation
    hue: float = 0.0  # turns of the colour circle
    order: tuple[int, ...] = (0, 1, 2, 3)  # in which brightness, contrast, saturation, hue are changed
    gray: bool = False
    blur: float = 0.0  # standard deviation in pixels
    solarise: bool = False  # invert what is brighter than half

    def row(self) -> list[float]:
        """Return the fields as ``sum(LOOK_COLUMNS)`` numbers."""
        return [*self.factors, self.hue, *self.order, self.gray, self.blur, self.solarise]


@dataclass(frozen=True)
class Cut:
    """A crop at its final size, mirrored or not, and the look that it is to have."""

    image: Image.Image
    look: Look

    def plain(self) -> Pixels:
        """Return the pixels without the look."""
        return np.asarray(self.image)

    def pixels(self) -> Pixels:
        """Return the pixels with the look."""
        return np.asarray(_change(self.image, self.look))


def global_cut(image: Image.Image, size: tuple[int, int], rng: Generator) -> Cut:
    """Cut most of a person at ``size`` (height, width); always blurred."""
    return _cut(image, size, rng, scale=(0.8, 1.0), aspect=_aspect(size), blur=1.0)


def local_cut(image: Image.Image, local_size: tuple[int, int], size: tuple[int, int], rng: Generator) -> Cut:
    """Cut a part of a person at ``local_size``, with the aspect range of the global ``size``; blur half of the time."""
    return _cut(image, local_size, rng, scale=(0.05, 0.8), aspect=_aspect(size), blur=0.5)


def background_cut(image: Image.Image, size: tuple[int, int], rng: Generator) -> Cut:
    """Cut a background for a crowd at ``size``; sometimes blurred, sometimes solarised."""
    return _cut(image, size, rng, scale=(0.2, 1.0), aspect=_SCENE_ASPECT, blur=0.1, solarise=0.2)


def crowd_cut(image: Image.Image, size: tuple[int, int], rng: Generator) -> Cut:
    """Cut most of a real multi-person image at ``size``."""
    return _cut(image, size, rng, scale=(0.8, 1.0), aspect=_SCENE_ASPECT, blur=0.1)


def twin_boxes(crowd: tuple[int, int], person: tuple[int, int], rng: Generator) -> list[Box]:
    """Draw where the published method pastes one person twice: side by side, never overlapping, both at one size."""
    (rows, columns), (h, w) = crowd, person
    left = int(rng.integers(0, columns - 2 * w - 1))
    first = (int(rng.integers(0, rows - h - 1)), left, h, w)
    return [first, (int(rng.integers(0, rows - h - 1)), int(rng.integers(left + w, columns - w - 1)), h, w)]


def crowd_boxes(crowd: tuple[int, int], person: tuple[int, int], count: int, rng: Generator) -> list[Box]:
    """Draw where ``count`` people are pasted at different scales; a departure from the published method.

    Each is scaled to 0.4 to 0.95 of the height and placed anywhere in its own part of the width, so neighbours may
    overlap as in real crowds.
    """
    rows, columns = crowd
    boxes = []
    for i in range(count):
        h = int(rows * rng.uniform(0.4, 0.95))
        w = min(round(h * person[1] / person[0]), columns)
        centre = (i + rng.uniform(0.2, 0.8)) * columns / count
        left = int(np.clip(centre - w / 2, 0, columns - w))
        boxes.append((int(rng.integers(0, rows - h + 1)), left, h, w))
    return boxes


def paste(background: Pixels, people: list[Pixels], boxes: list[Box]) -> Pixels:
    """Return a copy of ``background`` with each of ``people``, resized to its box, blended in, one after the other."""
    crowd: Pixels = background.copy()
    for person, (top, left, h, w) in zip(people, boxes, strict=True):
        resized = np.asarray(Image.fromarray(person).resize((w, h), Image.Resampling.BILINEAR))
        under = crowd[top : top + h, left : left + w]
        under[...] = np.rint(under + np.float32(PERSON_BLEND) * (resized.astype(np.float32) - under))
    return crowd


def nearest(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to ``size`` (height, width) without mixing pixels: as the published crowd is made."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    resized: Pixels = pixels[rows[:, None], columns]
    return resized


def random_crop(
    image: Image.Image,
    size: tuple[int, int],
    rng: Generator,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Image.Image:
    """Cut a random box of area ``scale`` (share of the image) and width / height ``aspect``; resize it to ``size``.

    As torchvision's RandomResizedCrop: ten tries, then the largest centred box within the aspect range; bicubic.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:
        w = min(width, max(round(height * aspect[1]), 1))
        h = min(height, max(round(w / aspect[0]), 1))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def blurred(image: Image.Image) -> Image.Image:
    """Blur an image beyond recognition, made small as it needs no detail: a stand-in for a background."""
    scale = min(1.0, _STAND_IN / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return small.filter(ImageFilter.GaussianBlur(max(size) / 12))


def block_mask(grid: tuple[int, int], count: int, rng: Generator) -> NDArray[np.bool_]:
    """Choose exactly ``count`` cells of a (rows, columns) grid, most of them in rectangles of 4 cells or more.

    Returns:
        (rows * columns,) bool.

    Source: block masking as in DINOv2 (Oquab et al., 2024). Differs: none; single cells make up what no rectangle fits.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    failures = 0
    while (missing := count - int(mask.sum())) > 0 and failures < 10:
        area, ratio = rng.uniform(min(4, missing), missing), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failures += 1
        if h < rows and w < columns:
            top, left = int(rng.integers(0, rows - h + 1)), int(rng.integers(0, columns - w + 1))
            block = mask[top : top + h, left : left + w]
            if 0 < block.size - int(block.sum()) <= missing:
                block[...] = True
                failures = 0
    flat = mask.reshape(-1)
    flat[rng.choice(np.flatnonzero(~flat), count - int(flat.sum()), replace=False)] = True
    return flat


def _cut(
    image: Image.Image,
    size: tuple[int, int],
    rng: Generator,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    blur: float,
    solarise: float = 0.0,
) -> Cut:
    """Crop, mirror half of the time, and draw a look."""
    cropped = random_crop(image, size, rng, scale=scale, aspect=aspect)
    if rng.random() < 0.5:
        cropped = ImageOps.mirror(cropped)
    return Cut(cropped, _draw_look(rng, blur, solarise))


def _draw_look(rng: Generator, blur: float, solarise: float) -> Look:
    """Draw changes of colour (0.8), no colour (0.2), blur of 0.1 to 2 (probability ``blur``), and solarisation.

    Brightness and contrast change by 0.6 to 1.4, saturation by 0.8 to 1.2, hue by -0.1 to 0.1 turns.
    """
    changed = rng.random() < 0.8
    factors = (rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.8, 1.2)) if changed else (1.0, 1.0, 1.0)
    return Look(
        factors=factors,
        hue=rng.uniform(-0.1, 0.1) if changed else 0.0,
        order=tuple(rng.permutation(4).tolist()),
        gray=bool(rng.random() < 0.2),
        blur=rng.uniform(0.1, MAX_BLUR) if rng.random() < blur else 0.0,
        solarise=bool(rng.random() < solarise),
    )


def _change(image: Image.Image, look: Look) -> Image.Image:
    """Give an image its look."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for change in look.order:
        if change == 3:
            image = _turn_hue(image, look.hue)
        elif look.factors[change] != 1:
            image = enhancers[change](image).enhance(look.factors[change])
    if look.gray:
        image = ImageOps.grayscale(image).convert("RGB")
    if look.blur:
        image = image.filter(ImageFilter.GaussianBlur(look.blur))
    return ImageOps.solarize(image) if look.solarise else image


def _turn_hue(image: Image.Image, turns: float) -> Image.Image:
    shift = round(turns * 256)
    if not shift:
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _aspect(size: tuple[int, int]) -> tuple[float, float]:
    """Return the published aspect range (width / height) of crops for a view of ``size``, by its nearest shape."""
    shape = size[1] / size[0]
    return _ASPECTS[min(_ASPECTS, key=lambda known: abs(known - shape))]
