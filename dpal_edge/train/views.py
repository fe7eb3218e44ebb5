"""The views of DPAL: a global crop, two local crops and a crowd image per person (docs/method.md 1).

All is drawn from one NumPy generator per image, so a view depends on seed and position alone: not on workers, nor on
whether the run was interrupted.
"""

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tv

Pixels = NDArray[np.uint8]  # (height, width, 3) RGB

PERSON_BLEND = 0.7  # weight of a pasted person over the background
_ASPECTS = {1.0: (0.75, 1.33), 0.75: (0.4, 0.6), 0.5: (0.4, 0.6), 1 / 3: (0.25, 0.4)}  # view w/h -> crop w/h


def global_view(image: Image.Image, size: tuple[int, int], rng: Generator) -> Pixels:
    """Cut most of a person at ``size`` (height, width), then flip, jitter and always blur."""
    cropped = random_crop(image, size, rng, scale=(0.8, 1.0), aspect=_aspect(size))
    return np.asarray(_appearance(cropped, rng, blur=1.0))


def local_view(image: Image.Image, local_size: tuple[int, int], size: tuple[int, int], rng: Generator) -> Pixels:
    """Cut a part of a person at ``local_size``, with the aspect range of the global ``size``; blur half of the time."""
    cropped = random_crop(image, local_size, rng, scale=(0.05, 0.8), aspect=_aspect(size))
    return np.asarray(_appearance(cropped, rng, blur=0.5))


def background_view(image: Image.Image, size: tuple[int, int], rng: Generator) -> Pixels:
    """Cut a background for a crowd at ``size``; sometimes blurred, sometimes solarised."""
    cropped = random_crop(image, size, rng, scale=(0.2, 1.0), aspect=(0.75, 1.33))
    cropped = _appearance(cropped, rng, blur=0.1)
    if rng.random() < 0.2:
        cropped = ImageOps.solarize(cropped)
    return np.asarray(cropped)


def crowd_view(image: Image.Image, size: tuple[int, int], rng: Generator) -> Pixels:
    """Cut most of a real multi-person image at ``size``."""
    cropped = random_crop(image, size, rng, scale=(0.8, 1.0), aspect=(0.75, 1.33))
    return np.asarray(_appearance(cropped, rng, blur=0.1))


def paste_self(background: Pixels, local: Pixels, person: Pixels, rng: Generator) -> Pixels:
    """Compose the published crowd: one person twice, side by side, never overlapping.

    Args:
        background: (H, W, 3) to be copied.
        local: (h, w, 3) local crop, pasted on the left.
        person: global view of any size, resized (nearest) to (h, w) and pasted on the right.
    """
    (rows, columns), (h, w) = background.shape[:2], local.shape[:2]
    crowd: Pixels = background.copy()
    left = int(rng.integers(0, columns - 2 * w - 1))
    _blend(crowd, local, int(rng.integers(0, rows - h - 1)), left)
    resized = np.asarray(Image.fromarray(person).resize((w, h), Image.Resampling.NEAREST))
    _blend(crowd, resized, int(rng.integers(0, rows - h - 1)), int(rng.integers(left + w, columns - w - 1)))
    return crowd


def paste_others(background: Pixels, people: list[Pixels], rng: Generator) -> Pixels:
    """Compose a crowd of different people at different scales; a departure from the published method.

    Each person (a global view) is scaled to 0.4 to 0.95 of the height and placed anywhere in its own part of the
    width, so neighbours may overlap as in real crowds.
    """
    rows, columns = background.shape[:2]
    crowd: Pixels = background.copy()
    for i, person in enumerate(people):
        h = int(rows * rng.uniform(0.4, 0.95))
        w = min(round(h * person.shape[1] / person.shape[0]), columns)
        resized = np.asarray(Image.fromarray(person).resize((w, h), Image.Resampling.BILINEAR))
        centre = (i + rng.uniform(0.2, 0.8)) * columns / len(people)
        left = int(np.clip(centre - w / 2, 0, columns - w))
        _blend(crowd, resized, int(rng.integers(0, rows - h + 1)), left)
    return crowd


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
    """Blur an image beyond recognition: a stand-in for a background where none is given."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 12))


def _appearance(image: Image.Image, rng: Generator, *, blur: float) -> Image.Image:
    """Flip (half), jitter colours (0.8), drop colour (0.2) and blur with radius 0.1 to 2 (probability ``blur``)."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.8:
        image = _jitter(image, rng)
    if rng.random() < 0.2:
        image = ImageOps.grayscale(image).convert("RGB")
    if rng.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return image


def _jitter(image: Image.Image, rng: Generator) -> Image.Image:
    """Change brightness, contrast (0.6 to 1.4), saturation (0.8 to 1.2) and hue (-0.1 to 0.1 turns) in random order."""
    for change in rng.permutation(4):
        if change == 0:
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
        elif change == 1:
            image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
        elif change == 2:
            image = ImageEnhance.Color(image).enhance(rng.uniform(0.8, 1.2))
        else:
            image = tv.adjust_hue(image, rng.uniform(-0.1, 0.1))
    return image


def _aspect(size: tuple[int, int]) -> tuple[float, float]:
    """Return the published aspect range (width / height) of crops for a view of ``size``, by its nearest shape."""
    shape = size[1] / size[0]
    return _ASPECTS[min(_ASPECTS, key=lambda known: abs(known - shape))]


def _blend(canvas: Pixels, patch: Pixels, top: int, left: int) -> None:
    h, w = patch.shape[:2]
    under = canvas[top : top + h, left : left + w]
    under[...] = np.round(PERSON_BLEND * patch + (1 - PERSON_BLEND) * under).astype(np.uint8)
