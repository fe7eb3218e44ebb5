"""The person detector's head: a small feature pyramid from one map of patches, and a box and a score per location."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.models.head_config import HeadConfig, Place

_PRIOR = 0.01  # score of every location before training, so that the many empty ones do not drown the others at first
FIRST_BOX = (1.5, 3.0)  # half width and half height before training, in strides: tall, as people are
_LARGEST = 5.0  # limit of the exponent: a side ends at most e^5 first boxes away, however wild the weights


class PyramidHead(nn.Module):
    """Boxes and logits (B, N, 5) of all N locations: left, top, right, bottom in pixels of the input, and a logit.

    The patches become maps of half, one and two patches per cell (strides 8, 16, 32 of a ViT/16), listed in this
    order, each in row order. Two towers, shared by the levels but for their norms, give per location the distances to
    the four sides, as powers of e times the stride, and one logit that ranks boxes: it is trained to be the IoU that
    the box reaches (``finetune.objectives.detection``), so there is no centreness beside it.

    Source: ViTDet's simple feature pyramid (Li et al., 2022) and FCOS (Tian et al., 2019). Differs: three levels,
    depthwise convolutions, batch norms per level, which an export folds away.
    """

    centres: Tensor
    strides: Tensor

    def __init__(self, config: HeadConfig, place: Place) -> None:
        super().__init__()
        channels, (rows, columns) = config.channels, place.grid
        self.grid = place.grid
        self.levels = nn.ModuleList(
            nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU(), SeparableConv(channels), nn.ReLU())
            for layer in (
                nn.ConvTranspose2d(place.width, channels, 2, 2, bias=False),
                nn.Conv2d(place.width, channels, 1, bias=False),
                nn.Conv2d(place.width, channels, 3, 2, 1, bias=False),
            )
        )
        self.score = Tower(channels, [math.log(_PRIOR / (1 - _PRIOR))], len(self.levels))
        self.box = Tower(channels, [math.log(side) for side in FIRST_BOX * 2], len(self.levels))
        patch = place.size[0] / rows
        sizes = ((2 * rows, 2 * columns), (rows, columns), (-(-rows // 2), -(-columns // 2)))
        centres, strides = locations(sizes, (patch / 2, patch, 2 * patch))
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("strides", strides, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, 1 + N, D) to boxes and logits, float32 also under autocast: pixels need the digits."""
        patches = tokens[:, 1:].mT.reshape(tokens.shape[0], -1, *self.grid)
        maps = [level(patches) for level in self.levels]
        logits, sides = (
            torch.cat([tower(x, i).flatten(2) for i, x in enumerate(maps)], dim=2).mT.float()
            for tower in (self.score, self.box)
        )
        sides = sides.clamp(max=_LARGEST).exp() * self.strides
        return torch.cat([self.centres - sides[..., :2], self.centres + sides[..., 2:], logits], dim=-1)


class SeparableConv(nn.Module):
    """A 5x5 convolution per channel, then a 1x1 over channels, each with a batch norm per level."""

    def __init__(self, channels: int, levels: int = 1) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2 * levels))

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """Map (B, channels, rows, columns) of ``level`` to the same shape."""
        x = F.relu(self.norms[2 * level](self.spatial(x)))
        mixed: Tensor = self.norms[2 * level + 1](self.mix(x))
        return mixed


class Tower(nn.Module):
    """Two convolutions with a shortcut each, and numbers per location that begin near ``first``."""

    def __init__(self, channels: int, first: list[float], levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SeparableConv(channels, levels) for _ in range(2))
        self.last = nn.Conv2d(channels, len(first), 1)
        nn.init.normal_(self.last.weight, std=0.01)
        self.last.bias = nn.Parameter(torch.tensor(first))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Map (B, channels, rows, columns) of ``level`` to (B, outputs, rows, columns)."""
        for layer in self.layers:
            x = F.relu(x + layer(x, level))
        found: Tensor = self.last(x)
        return found


def locations(sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the centres (N, 2), x and y in pixels, and the strides (N, 1) of the cells of all levels."""
    centres, widths = [], []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres.append((torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride)
        widths.append(torch.full((rows * columns, 1), stride))
    return torch.cat(centres), torch.cat(widths)
