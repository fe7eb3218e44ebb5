"""A fine-tuned model as a teacher of attributes: what its head says of the views that the student is shown.

It looks at each view twice, the second time mirrored, and its logits are averaged: with the human teacher of this
package mA is .714 so, and .704 without (ccp, 210 people).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.finetune.expert import Expert, open_expert
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.labels import flip_pairs

_TASK = "attributes"


class AttributeTeacher:
    """A model of this project with a head for attributes. No ``nn.Module``: nothing of it is trained or saved."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert
        self.limits, self.hashes = expert.limits, expert.hashes
        self.labels: tuple[str, ...] = expert.model.configs[_TASK].labels
        self._swapped = list(range(len(self.labels)))
        for one, other in flip_pairs(self.labels):
            self._swapped[one], self._swapped[other] = other, one

    @classmethod
    def open(cls, path: Path) -> "AttributeTeacher":
        """Open a checkpoint or the newest one of a run folder.

        Raises:
            ModelFileError: missing, damaged, or without a head for attributes.
        """
        return cls(open_expert(path, _TASK, "attribute_teacher"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map RGB crops (B, H, W, 3), uint8, of any size to logits (B, A), float32, on their device, as seen both ways.

        The caller's autocast holds for it, as for the student.
        """
        pixels, model = images.permute(0, 3, 1, 2), self._expert.model.to(images.device)
        size = model.backbone.config.size
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
        both = normalize(torch.cat([pixels, pixels.flip(3)]), self._expert.mean, self._expert.std)
        seen: Tensor = model(both, (_TASK,))[_TASK].float()
        plain, mirrored = seen.chunk(2)
        return (plain + mirrored[:, self._swapped]) / 2
