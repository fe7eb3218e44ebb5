"""Training of a person detector: which locations answer for whom, and the loss of their boxes and scores."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.finetune.augment import Augmentation, change_colours
from dpal_edge.finetune.crowds import Crowds
from dpal_edge.finetune.detection_teacher import DetectionTeacher
from dpal_edge.finetune.frames import IGNORED, PERSON, SCALES, Frame, covering_view, draw_view
from dpal_edge.finetune.objective import Example, Values, epoch_order
from dpal_edge.models.detection import FIRST_BOX
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.tasks.detection import People
from dpal_edge.tasks.image import open_sample
from dpal_edge.tasks.letterbox import letterbox, to_input
from dpal_edge.tasks.sample import Sample, Split

_CHANNELS = 128  # of the head
_MOST = 1024  # boxes of an example, the largest: a mosaic of 16 crowds holds some 300
_ON_BACKGROUND = 0.7  # share of crowds that stand on a background rather than among the people of a frame
_PARTS = (2, 3, 4)  # rows, and columns, of a mosaic: people become as small as street cameras see them
_UNEVEN = 0.3  # how far a line between parts lies from even ones, in distances of these
_FILLED = 0.5  # share of the parts that a frame fills: an edge towards grey must not tell where people are
_JOINED_SCALES = (0.7, 2.0)  # of the other parts, as draw_view has them
_NEAREST = 9  # locations of each level that may answer for one person
_EASY = 0.75  # weight of an empty location, times its squared score
_BOX_WEIGHT = 2.0
_TOLD = 0.05  # least score of a location at which the teacher's box is learned
_COLOURS = Augmentation(colour=0.2, grey=0.05, low_resolution=0.15)


class DetectionObjective(nn.Module):
    """Whole frames, real and synthetic: varifocal loss of the logit, generalised IoU of the box.

    The locations that answer for a person are those near the middle whose first box overlaps the person as well as
    others do not (``assign``); each is to score what its box reaches. Boxes to ignore hold nobody and are no background
    either.

    Source: adaptive training sample selection (Zhang et al., 2020) with the varifocal loss (Zhang et al., 2021).
    Differs: weights pass from people to background with the quality, else those that hardly fit would be free to score
    high. A choice by what the network says of itself (TOOD, Feng et al., 2021) asks of it to prefer one of many places
    inside a person; short trainings got less far with it (bench/results/default_models.json has both courses).

    A teacher adds what it says of the same views: its scores at all locations, its boxes where it finds somebody, and
    its features, which a linear map of each patch, that only training has, answers for.

    Source: scores and boxes, CrossKD (Wang et al., 2024; differs: the student's own head answers); features, hints
    (Romero et al., 2015; differs: at the end of the student, each channel relative to its variance).
    """

    task = "detection"

    def __init__(
        self,
        split: Split[People],
        size: tuple[int, int],
        *,
        paste: Path | None,
        backgrounds: Path | None,
        paste_share: float = 0.5,
        mosaic: float = 0.0,
        teacher: DetectionTeacher | None = None,
        width: int = 0,
    ) -> None:
        """Look the data up.

        Args:
            split: frames with boxes.
            size: height, width of the input.
            paste: masked people that become crowds, as ``Crowds`` reads them; None makes no crowds.
            backgrounds: images without people, for those crowds; without, they join the people of the frames.
            paste_share: share of the examples that are crowds.
            mosaic: share of the others that join views of 4, 9 or 16 frames.
            teacher: answers beside the boxes; None leaves these alone.
            width: channels of the student's tokens, which a teacher asks for.

        Raises:
            DataError: a folder is missing or empty, or too many of the masked people cannot be used.
            ConfigError: backgrounds, but nobody to put on them.
        """
        super().__init__()
        if backgrounds and not paste:
            raise ConfigError(
                f"backgrounds {backgrounds}: nobody to put there; name a folder of masked people as paste"
            )
        self.split, self.size = split, size
        self.head = HeadConfig(task=self.task, kind="pyramid", labels=("person",), channels=_CHANNELS)
        self._crowds = Crowds(paste, backgrounds) if paste else None
        self.problems = split.problems + (self._crowds.problems if self._crowds else ())
        self._paste_share, self._mosaic = paste_share, mosaic
        self.limits, self.taught_by = (teacher.limits, teacher.hashes) if teacher else ("", {})
        self._teacher = teacher
        self.locate = nn.Linear(width, teacher.channels) if teacher else None

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.split.samples)

    def indices(self, step: int, count: int, seed: int) -> Sequence[int]:
        """Return which examples update ``step`` looks at."""
        return epoch_order(len(self), step, count, seed)

    def file(self, index: int) -> Path:
        """Return the image file of an example."""
        return self.split.samples[index].image

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image", "boxes" (1024, 4) in pixels of it, and "kind" (1024,): 1 person, 2 to ignore, 0 no box.

        Boxes come first, the largest first.

        Raises:
            DataError: an image cannot be read, the frame's or one that a crowd is made of.
        """
        sample = self.split.samples[index]
        frame = _plain(sample, self.size) if rng is None else self._draw(sample, rng)
        area = np.prod(frame.boxes[:, 2:] - frame.boxes[:, :2], axis=1)
        order = np.argsort(-area, kind="stable")[:_MOST]
        boxes, kind = np.zeros((_MOST, 4), np.float32), np.zeros(_MOST, np.int8)
        boxes[: len(order)], kind[: len(order)] = frame.boxes[order], frame.kinds[order]
        return {"image": frame.pixels, "boxes": boxes, "kind": kind}

    def _draw(self, sample: Sample[People], rng: np.random.Generator) -> Frame:
        crowded = self._crowds is not None and rng.random() < self._paste_share
        if self._crowds and crowded and self._crowds.backgrounds and rng.random() < _ON_BACKGROUND:
            frame = self._crowds.background(self.size, rng)
        elif self._mosaic and rng.random() < self._mosaic:
            frame = self._join(sample, rng)
        else:
            frame = _view(sample, self.size, rng)
        if self._crowds and crowded:
            frame = self._crowds.paste(frame, rng)
        return Frame(change_colours(frame.pixels, _COLOURS, rng), frame.boxes, frame.kinds)

    def _join(self, sample: Sample[People], rng: np.random.Generator) -> Frame:
        """Join views of a frame and of others in a grid that is not quite even.

        Source: mosaic of YOLOv4 (Bochkovskiy et al., 2020). Differs: it has up to 4 rows and columns, not 2.
        """
        count = int(rng.choice(_PARTS))
        rows, columns = (_lines(side, count, rng) for side in self.size)
        joined, boxes, kinds = np.empty((*self.size, 3), np.uint8), [], []
        for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            one = sample if top == left == 0 else self.split.samples[rng.integers(len(self))]
            place = (bottom - top, right - left), rng, None if rng.random() < _FILLED else _JOINED_SCALES
            try:
                part = _view(one, *place)
            except DataError:
                part = _view(sample, *place)  # the other file is named when its own turn comes
            joined[top:bottom, left:right] = part.pixels
            boxes.append(part.boxes + np.array([left, top, left, top], np.float32))
            kinds.append(part.kinds)
        return Frame(joined, np.concatenate(boxes), np.concatenate(kinds))

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss" and its parts "quality" and "box", per answering location, weighted by how well it fits.

        With a teacher "told_quality" and "told_box" are the same of what it finds, and "patches" is the mean squared
        error of its features.
        """
        raw = head(tokens).float()
        kind = batch["kind"]
        count = max(int((kind != 0).sum(1).max()), 1)
        people, kind = batch["boxes"][:, :count], kind[:, :count]
        boxes, logits, centres = raw[..., :4], raw[..., 4], head.get_buffer("centres")
        person, quality = assign(boxes, centres, head.get_buffer("strides"), people, kind == PERSON)
        empty = 1 - quality  # as far as a location answers for nobody, it is background, unless nobody knows
        empty = empty.masked_fill(_inside(centres, people, kind == IGNORED).any(1), 0)
        weight = quality + _EASY * empty * logits.detach().sigmoid().square()
        total = quality.sum().clamp(min=1)
        losses = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
        answers = quality > 0
        truth = people.gather(1, person[..., None].expand(-1, -1, 4))[answers]
        gaps = generalized_box_iou_loss(boxes[answers], truth)
        parts = {"quality": (losses * weight).sum() / total, "box": (gaps * quality[answers]).sum() / total}
        loss = parts["quality"] + _BOX_WEIGHT * parts["box"]
        if self._teacher is not None and self.locate is not None:
            seen = self._teacher(batch["image"])
            told = {**_told(raw, seen.found), "patches": _feature_loss(self.locate(tokens[:, 1:]), seen.patches)}
            loss = loss + told["told_quality"] + _BOX_WEIGHT * told["told_box"] + told["patches"]
            parts |= told
        return {"loss": loss, **parts}


def _told(raw: Tensor, wanted: Tensor) -> Values:
    """Return how far boxes and logits (B, N, 5) are from a teacher's, per person it finds."""
    logits, scores = raw[..., 4], wanted[..., 4].sigmoid()
    total = scores.sum().clamp(min=1)
    weight = (logits.detach().sigmoid() - scores).square()
    losses = F.binary_cross_entropy_with_logits(logits, scores, reduction="none")
    answers = scores > _TOLD
    gaps = generalized_box_iou_loss(raw[..., :4][answers], wanted[..., :4][answers])
    return {"told_quality": (losses * weight).sum() / total, "told_box": (gaps * scores[answers]).sum() / total}


def _feature_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of features (B, N, C), in variances of each of the teacher's channels."""
    variance = wanted.var((0, 1)).clamp(min=1e-6)
    return ((found.float() - wanted).square() / variance).mean()


@torch.no_grad()
def assign(boxes: Tensor, centres: Tensor, strides: Tensor, people: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the locations that answer for each person.

    Of the nearest 9 of each level those whose box before training overlaps the person by at least the mean and one
    standard deviation of them all, or most of all, and that lie inside; one among several people's takes the one it
    overlaps most. People narrower than a cell are as wide as the cell when locations are chosen.

    Args:
        boxes: (B, N, 4), predicted.
        centres: (N, 2) of the locations, x and y.
        strides: (N, 1).
        people: (B, M, 4).
        real: (B, M) bool, false where a row of ``people`` is no person.

    Returns:
        Which of the M people each location answers for (B, N), and the score it is to have (B, N): the IoU of its box,
        and 0 for those that answer for nobody.
    """
    first = strides * torch.tensor(FIRST_BOX, device=strides.device)
    overlap = pairwise_iou(people, torch.cat([centres - first, centres + first], 1).expand(len(people), -1, -1))
    middle = (people[..., :2] + people[..., 2:]) / 2
    distance = torch.cdist(middle, centres.expand(len(people), -1, -1))  # (B, M, N)
    near = torch.zeros_like(distance, dtype=torch.bool)
    for stride in sorted(set(strides[:, 0].tolist())):
        level = (strides[:, 0] == stride).nonzero()[:, 0]
        nearest = distance[..., level].topk(min(_NEAREST, len(level)), dim=2, largest=False).indices
        near.scatter_(2, level[nearest], True)
    count = near.sum(2, keepdim=True)
    mean = (overlap * near).sum(2, keepdim=True) / count
    deviation = (((overlap - mean) ** 2 * near).sum(2, keepdim=True) / count).sqrt()
    enough = torch.minimum(mean + deviation, (overlap * near).amax(2, keepdim=True))
    answers = near & (overlap >= enough) & _inside(centres, people, real, least=strides)
    person = torch.where(answers, overlap, -1).argmax(1)
    answers &= F.one_hot(person, people.shape[1]).mT.bool()
    quality = (pairwise_iou(people, boxes) * answers).amax(1)
    return person, quality


def _inside(centres: Tensor, boxes: Tensor, real: Tensor, least: Tensor | None = None) -> Tensor:
    """Return (B, M, N) where a location lies in a real box, which counts as ``least`` (N, 1) wide and high at least."""
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    reach = half[:, :, None] if least is None else torch.maximum(half[:, :, None], least / 2)
    return ((centres - middle[:, :, None]).abs() <= reach).all(-1) & real[..., None]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union (B, M, N), 0..1, of boxes (B, M, 4) and (B, N, 4)."""
    low = torch.maximum(a[:, :, None, :2], b[:, None, :, :2])
    high = torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (a, b)]
    return shared / (areas[0][:, :, None] + areas[1][:, None] - shared).clamp(min=1e-9)


def _lines(side: int, count: int, rng: np.random.Generator) -> list[int]:
    """Divide a side into so many parts; return where they begin and end."""
    between = np.arange(1, count) + rng.uniform(-_UNEVEN, _UNEVEN, count - 1)
    return [0, *np.rint(between * side / count).astype(int).tolist(), side]


def _view(
    sample: Sample[People],
    size: tuple[int, int],
    rng: np.random.Generator,
    scales: tuple[float, float] | None = SCALES,
) -> Frame:
    """Draw a view of a frame between ``scales``; None has it fill the input."""
    image: Image.Image = open_sample(sample)
    frame = (image.height, image.width)
    view = draw_view(frame, size, rng, scales) if scales else covering_view(frame, size, rng)
    return Frame(view.image(image), *view.people(*_within(sample.target, frame)))


def _plain(sample: Sample[People], size: tuple[int, int]) -> Frame:
    pixels = np.asarray(open_sample(sample))
    height, width = pixels.shape[:2]
    boxes, kinds = _within(sample.target, (height, width))
    return Frame(letterbox(pixels, size), to_input(boxes, (height, width), size), kinds)


def _within(people: People, frame: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return boxes and kinds, clipped to a frame of (height, width): some sets guess where people go on outside."""
    boxes: NDArray[np.float32] = np.clip(people.boxes, 0, [frame[1], frame[0]] * 2).astype(np.float32)
    return boxes, np.where(people.ignore, IGNORED, PERSON).astype(np.int8)
