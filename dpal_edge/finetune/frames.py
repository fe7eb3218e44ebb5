"""One random view of a whole frame: mirrored, enlarged or reduced, and moved; its people's boxes follow it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpal_edge.tasks.image import Pixels
from dpal_edge.tasks.letterbox import GREY, Floats

PERSON, IGNORED = 1, 2  # what a box is to training; 0 fills arrays up
LEAST_VISIBLE = 0.25  # share of a person below which nobody is asked to find the box
_LEAST_HEIGHT = 8.0  # pixels of the input: half a patch, below which there is nothing to see
SCALES = (0.4, 2.0)  # of the size at which the frame just fits


@dataclass(frozen=True)
class Frame:
    """An image (H, W, 3) with boxes (n, 4), left, top, right, bottom in its pixels, and kinds (n,)."""

    pixels: Pixels
    boxes: Floats
    kinds: NDArray[np.int8]  # PERSON or IGNORED


@dataclass(frozen=True)
class View:
    """Where a frame lies in the input: x and y of the frame times ``scale`` plus ``offset``, then mirrored or not."""

    scale: float
    offset: tuple[float, float]  # x, y in pixels of the input
    flipped: bool
    size: tuple[int, int]  # height, width of the input

    def image(self, frame: Image.Image) -> Pixels:
        """Return the input (H, W, 3), grey where the frame does not reach."""
        offset = np.array(self.offset)
        seen = np.clip(-offset / self.scale, 0, None), np.minimum((self.size[::-1] - offset) / self.scale, frame.size)
        low, high = (np.rint(corner * self.scale + offset).astype(int) for corner in seen)
        canvas = Image.new("RGB", self.size[::-1], (GREY, GREY, GREY))
        if (high > low).all():
            box = (*seen[0].tolist(), *seen[1].tolist())
            part = frame.resize(tuple((high - low).tolist()), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
            canvas.paste(part, tuple(low.tolist()))
        return np.array(canvas)[:, :: -1 if self.flipped else 1]

    def people(self, boxes: Floats, kinds: NDArray[np.int8]) -> tuple[Floats, NDArray[np.int8]]:
        """Move boxes to the input and clip them; people that are hardly left in it, or too small, become IGNORED."""
        moved = boxes * self.scale + np.array(self.offset * 2)
        height, width = self.size
        if self.flipped:
            moved = np.array([width, 0, width, 0]) + moved[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1])
        clipped = np.clip(moved, 0, [width, height, width, height]).astype(np.float32)
        share = _areas(clipped) / np.maximum(_areas(moved), 1e-6)
        unseen = (share < LEAST_VISIBLE) | (clipped[:, 3] - clipped[:, 1] < _LEAST_HEIGHT)
        inside = _areas(clipped) > 0
        return clipped[inside], np.where(unseen, IGNORED, kinds).astype(np.int8)[inside]


def draw_view(
    frame: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, scales: tuple[float, float] = SCALES
) -> View:
    """Draw a view: a scale between ``scales`` times what just fits, all places alike, half of them mirrored.

    Source: large-scale jitter, Ghiasi et al., 2021. Differs: the range, and reduced frames lie anywhere.

    Args:
        frame: height, width in pixels.
        size: height, width of the input.
        rng: draws the view.
        scales: least and greatest, of the size at which the frame just fits.
    """
    fitting = min(size[0] / frame[0], size[1] / frame[1])
    scale = fitting * float(np.exp(rng.uniform(*np.log(scales))))
    x, y = (rng.random(2) * [size[1] - frame[1] * scale, size[0] - frame[0] * scale]).tolist()  # or what hangs over
    return View(scale, (x, y), bool(rng.random() < 0.5), size)


def covering_view(frame: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> View:
    """Draw a view that a frame fills without a rest, at 1 to 2 times the least scale that does."""
    scale = max(size[0] / frame[0], size[1] / frame[1]) * rng.uniform(1, 2)
    x, y = (rng.random(2) * [size[1] - frame[1] * scale, size[0] - frame[0] * scale]).tolist()
    return View(scale, (x, y), bool(rng.random() < 0.5), size)


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
