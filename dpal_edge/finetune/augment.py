"""One random view of a person: a single warp from the image to the crop, then colours; joints and masks follow it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.errors import ConfigError
from dpal_edge.tasks.image import Pixels
from dpal_edge.tasks.sample import Box

_FILL = (124, 116, 104)  # ImageNet's mean: what lies outside the image
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much views differ; all zero gives the plain crop."""

    flip: float = 0.5  # share of views that are mirrored
    scale: float = 0.25  # the person's size is multiplied by 1 - scale to 1 + scale
    rotate: float = 30.0  # greatest angle in degrees, of ``rotate_share`` of the views
    rotate_share: float = 0.6
    shift: float = 0.08  # greatest displacement, of the crop's sides
    colour: float = 0.3  # strength of brightness, contrast, saturation and channel gains
    hue: float = 0.0  # greatest turn of all colours about grey, of half a circle
    grey: float = 0.05  # share of views without colour
    muted: float = 0.0  # share of views with at most half of their saturation
    low_resolution: float = 0.2  # share of views that are reduced, as if the person were far away, and enlarged again
    erase: float = 0.0  # share of views of which a rectangle is hidden

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 180.0 if name == "rotate" else 0.9 if name in ("scale", "colour") else 1.0
            if not 0 <= value <= most:
                raise ConfigError(f"augmentation {name} is {value}, expected 0 to {most:g}")


@dataclass(frozen=True, eq=False)
class Warp:
    """A view of an image: which pixel of the image each pixel of the crop shows."""

    to_image: NDArray[np.float64]  # (2, 3): crop x, y, 1 in pixels -> image x, y in pixels
    size: tuple[int, int]  # height, width of the crop
    flipped: bool

    def image(self, image: Image.Image) -> Pixels:
        """Return the crop (H, W, 3) of an RGB image, bicubic; reduced first where it shrinks more than twofold."""
        step = np.linalg.norm(self.to_image[:, :2], axis=0).min()  # image pixels per crop pixel, of the finer axis
        matrix = self.to_image
        if (factor := int(step)) >= 2:
            image, matrix = image.reduce(factor), matrix / factor
        return np.asarray(self._transform(image, matrix, Image.Resampling.BICUBIC, _FILL))

    def mask(self, mask: Pixels, fill: int) -> Pixels:
        """Return the crop (H, W) of class ids (h, w), ``fill`` where the view leaves the image."""
        nearest = Image.Resampling.NEAREST
        return np.asarray(self._transform(Image.fromarray(mask), self.to_image, nearest, fill))

    def points(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        """Move points (K, 2) from pixels of the image to pixels of the crop."""
        linear, offset = self.to_image[:, :2], self.to_image[:, 2]
        moved: NDArray[np.float32] = np.linalg.solve(linear, (points - offset).T).T.astype(np.float32)
        return moved

    def _transform(
        self, image: Image.Image, matrix: NDArray[np.float64], resampling: Image.Resampling, fill: object
    ) -> Image.Image:
        height, width = self.size
        coefficients = tuple(matrix.ravel().tolist())
        return image.transform(
            (width, height),
            Image.Transform.AFFINE,
            coefficients,
            resampling,
            fillcolor=fill,  # type: ignore[arg-type]
        )


def plain_warp(box: Box, size: tuple[int, int]) -> Warp:
    """Return the warp that cuts ``box`` (left, top, right, bottom in pixels) out and changes nothing else."""
    return _warp(box, size)


def draw_warp(box: Box, size: tuple[int, int], settings: Augmentation, rng: np.random.Generator) -> Warp:
    """Draw a view around ``box``: mirrored, turned about its centre, resized and moved."""
    angle = rng.uniform(-settings.rotate, settings.rotate) * (rng.random() < settings.rotate_share)
    return _warp(
        box,
        size,
        flipped=bool(rng.random() < settings.flip),
        angle=np.deg2rad(angle),
        scale=float(rng.uniform(1 - settings.scale, 1 + settings.scale)),
        shift=rng.uniform(-settings.shift, settings.shift, 2),
    )


def _warp(
    box: Box,
    size: tuple[int, int],
    *,
    flipped: bool = False,
    angle: float = 0.0,
    scale: float = 1.0,
    shift: NDArray[np.float64] | None = None,
) -> Warp:
    """Compose crop -> unit square -> box, turned in the image's own pixels, so that a turn bends nothing."""
    left, top, right, bottom = box
    extent, centre = np.array([right - left, bottom - top]), np.array([left + right, top + bottom]) / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1.0 if flipped else 1.0, 1.0])
    linear = turn @ np.diag(extent * mirror / scale / size[::-1])
    middle = np.array(size[::-1]) / 2 + (0 if shift is None else shift * size[::-1])
    return Warp(np.column_stack([linear, centre - linear @ middle]), size, flipped)


def change_colours(pixels: Pixels, settings: Augmentation, rng: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and white balance of (H, W, 3) by one linear map; reduce and hide some.

    Returns:
        A new array of the same shape.
    """
    strength = settings.colour
    grey = rng.random() < settings.grey
    saturation = 0.0 if grey else rng.uniform(1 - strength, 1 + strength)
    if settings.muted and rng.random() < settings.muted:
        saturation = rng.uniform(0, 0.5)
    gains = rng.uniform(1 - strength / 3, 1 + strength / 3, 3)
    contrast, brightness = rng.uniform(1 - strength, 1 + strength, 2)
    matrix = (saturation * np.eye(3) + (1 - saturation) * _LUMA[:, None]) * gains * contrast * brightness
    if settings.hue:
        matrix = turn_about_grey(np.pi * settings.hue * rng.uniform(-1, 1)) @ matrix
    offset = (1 - contrast) * brightness * pixels.mean()
    changed = np.clip(pixels.astype(np.float32) @ matrix.astype(np.float32) + np.float32(offset), 0, 255)
    view: Pixels = changed.astype(np.uint8)
    if rng.random() < settings.low_resolution:
        view = _reduce(view, rng)
    if rng.random() < settings.erase:
        _erase(view, rng)
    return view


def turn_about_grey(angle: float) -> NDArray[np.float64]:
    """Return the rotation (3, 3) of RGB about the axis of greys: a third of a circle makes red green."""
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)
    turn: NDArray[np.float64] = (
        np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    )
    return turn


def _reduce(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Keep a quarter to all of the pixels per side, then enlarge."""
    height, width = pixels.shape[:2]
    share = rng.uniform(0.25, 1.0)
    small = max(round(width * share), 1), max(round(height * share), 1)
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))


def _erase(pixels: Pixels, rng: np.random.Generator) -> None:
    """Hide a rectangle of 2 to 25 % of the area behind noise, in place. Source: random erasing, Zhong et al., 2020."""
    height, width = pixels.shape[:2]
    area, ratio = rng.uniform(0.02, 0.25) * height * width, np.exp(rng.uniform(np.log(0.5), np.log(3)))
    rows, columns = min(round(np.sqrt(area * ratio)), height), min(round(np.sqrt(area / ratio)), width)
    top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    pixels[top : top + rows, left : left + columns] = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
