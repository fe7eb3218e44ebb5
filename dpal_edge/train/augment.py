"""Batches on the device: moved, augmented there if their workers left it, and normalised.

The arithmetic is that of views.py, image by image, without its rounding to 8 bits after every step; every image has its
own parameters, and nothing waits for the device.
"""

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.data import LOCAL_CROPS, Batch
from dpal_edge.train.method import Views
from dpal_edge.train.views import LOOK_COLUMNS, MAX_BLUR, PERSON_BLEND

_REACH = 3 * round(MAX_BLUR)  # pixels that the widest blur looks at to each side
_HUE = 3  # in Look.order


def resolve_augment(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return ``config`` with ``augment`` decided: on a GPU, which does in milliseconds what many cores would need."""
    if config.augment != "auto":
        return config
    return replace(config, augment="device" if device.type == "cuda" else "workers")


def to_views(batch: Batch, device: torch.device) -> Views:
    """Move a batch to ``device``, finish its augmentation and normalise it with the ImageNet mean and std."""
    moved = batch.to(device)
    names = ("base", "local", "crowd", "clean")
    images = {name: _unit(view) for name in names if (view := getattr(moved, name)) is not None}
    for name, looks in moved.looks.items():
        images[name] = change(images[name], looks)
    if moved.boxes is not None:
        images["crowd"] = _paste_people(images, moved.boxes, moved.partners)
    mean, std = _statistics(device)
    return Views(**{name: (view - mean) / std for name, view in images.items()}, masked=moved.masked, keys=batch.keys)


def change(images: Tensor, looks: Tensor) -> Tensor:
    """Give images their looks.

    Args:
        images: (B, 3, H, W) of 0..1.
        looks: (B, sum(LOOK_COLUMNS)): ``views.Look.row`` of each.

    Returns:
        (B, 3, H, W) of 0..1.
    """
    factors, hue, order, gray, blur, solarise = torch.split(looks[..., None, None], list(LOOK_COLUMNS), dim=1)
    turn = (order == _HUE).float().argmax(1, keepdim=True)  # the place of the hue in the order
    # Turning hues costs most, so all images do it once, between what comes before it in their order and what after.
    for place in range(3):
        images = _adjust(images, order[:, place : place + 1], factors, place < turn)
    images = _turn_hue(images, hue)
    for place in range(1, 4):
        images = _adjust(images, order[:, place : place + 1], factors, place > turn)
    images = torch.where(gray > 0, _gray(images), images)
    images = _blur(images, blur.flatten())
    return torch.where((solarise > 0) & (images >= 128 / 255), 1 - images, images)


def paste(background: Tensor, people: Tensor, boxes: Tensor) -> Tensor:
    """Blend one person into each background, resized to its box as Pillow's bilinear filter does.

    Args:
        background: (B, 3, H, W).
        people: (B, 3, h, w).
        boxes: (B, 4): top, left, height, width in ``background``; nobody where the height is 0.

    Returns:
        (B, 3, H, W).
    """
    top, left, height, width = boxes.unbind(1)
    rows, in_rows = _placement(top, height, people.shape[2], background.shape[2])
    columns, in_columns = _placement(left, width, people.shape[3], background.shape[3])
    placed = rows[:, None] @ people @ columns[:, None].mT
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.lerp(background, placed, PERSON_BLEND * inside)


def _paste_people(images: dict[str, Tensor], boxes: Tensor, partners: Tensor | None) -> Tensor:
    """Paste everybody and the partner, or everybody twice: the last local crop and the whole person at its size."""
    base = images["base"]
    if partners is not None:
        first, second = base, base[partners]
    else:
        first = images["local"].chunk(LOCAL_CROPS)[-1]
        second = _nearest(base, (first.shape[2], first.shape[3]))
    return paste(paste(images["crowd"], first, boxes[:, 0]), second, boxes[:, 1])


def _unit(images: Tensor) -> Tensor:
    """Turn uint8 into 0..1."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _nearest(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As ``views.nearest``."""
    rows, columns = (
        (2 * torch.arange(new, device=images.device) + 1) * old // (2 * new)
        for new, old in zip(size, images.shape[2:], strict=True)
    )
    return images[:, :, rows[:, None], columns]


def _adjust(images: Tensor, change: Tensor, factors: Tensor, active: Tensor) -> Tensor:
    """Change brightness (0), contrast (1) or saturation (2), as ``change`` (B, 1, 1, 1) says, where ``active``."""
    gray = _gray(images)
    mean = gray.mean((2, 3), keepdim=True)
    origin = torch.where(change == 0, 0.0, torch.where(change == 1, mean, gray))  # what a factor of 0 would leave
    factor = torch.where(active, factors.gather(1, change.long().clamp(max=2)), 1.0)
    return torch.lerp(origin, images, factor).clamp(0, 1)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn hues by ``turns`` (B, 1, 1, 1) of the circle; saturation and value of HSV stay."""
    red, green, blue = images.chunk(3, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    scale = chroma.clamp(min=1e-6)
    sixths = torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale)
    sixths = torch.where(value == red, (green - blue) / scale, sixths) + 6 * turns
    offsets = torch.arange(5, 0, -2, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    away = (sixths + offsets) % 6  # of each channel from where it is lowest
    return value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)


def _blur(images: Tensor, deviations: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own standard deviation in pixels, 0 for none; borders are repeated."""
    count, channels, rows, columns = images.shape
    distances = torch.arange(-_REACH, _REACH + 1, device=images.device)
    weights = torch.exp(-0.5 * (distances / deviations.clamp(min=1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    flat = F.pad(images.reshape(1, count * channels, rows, columns), (_REACH,) * 4, mode="replicate")
    flat = F.conv2d(flat, weights[:, :, None], groups=count * channels)
    return F.conv2d(flat, weights[..., None], groups=count * channels).view_as(images)


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, dim=1)
    gray: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return gray


def _placement(start: Tensor, length: Tensor, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Return weights that resize ``source`` pixels to ``length`` (B,) of ``target`` pixels from ``start`` (B,) on.

    Returns:
        (B, target, source) weights, rows adding up to 1 inside and 0 outside; (B, target) bool, inside.
    """
    scale = (source / length.clamp(min=1))[:, None]
    places = torch.arange(target, device=start.device) - start[:, None]
    inside = (places >= 0) & (places < length[:, None])
    centres = (places + 0.5) * scale
    distance = (torch.arange(source, device=start.device) + 0.5 - centres[..., None]).abs()
    weights = (1 - distance / scale.clamp(min=1)[..., None]).clamp(min=0) * inside[..., None]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), inside


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation on ``device``, sent there once: the step must not wait for them."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std
