"""A fine-tuned model as a teacher of attributes: what its head says of the views that the student is shown.

It looks at each view twice, the second time mirrored, and its logits are averaged: with the human teacher of this
package mA is .714 so, and .704 without (ccp, 210 people).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpal_edge.errors import ModelFileError
from dpal_edge.files import sha256_of
from dpal_edge.models.checkpoint import limits_of, read_newest
from dpal_edge.models.human import HumanModel, load_human
from dpal_edge.models.vit import normalize
from dpal_edge.tasks.labels import flip_pairs

_TASK = "attributes"


class AttributeTeacher:
    """A model of this project with a head for attributes. No ``nn.Module``: nothing of it is trained or saved."""

    def __init__(
        self,
        model: HumanModel,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        limits: str = "",
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Most callers want ``open``, which knows the limits of its use and the hash of its file by name."""
        self._model, self._mean, self._std = model.requires_grad_(False), mean, std
        self.limits, self.hashes = limits, hashes or {}
        self.labels: tuple[str, ...] = model.configs[_TASK].labels
        self._swapped = list(range(len(self.labels)))
        for one, other in flip_pairs(self.labels):
            self._swapped[one], self._swapped[other] = other, one

    @classmethod
    def open(cls, path: Path) -> "AttributeTeacher":
        """Open a checkpoint or the newest one of a run folder.

        Raises:
            ModelFileError: missing, damaged, or without a head for attributes.
        """
        file = read_newest(path)[0] if path.is_dir() else path
        model, metadata = load_human(file)
        if _TASK not in model.configs:
            raise ModelFileError(
                f"attribute_teacher {path}: has heads for {', '.join(model.configs)}, expected one for {_TASK}"
            )
        mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
        return cls(model, mean, std, limits=limits_of(metadata), hashes={file.name: sha256_of(file)})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map RGB crops (B, H, W, 3), uint8, of any size to logits (B, A), float32, on their device, as seen both ways.

        The caller's autocast holds for it, as for the student.
        """
        pixels = images.permute(0, 3, 1, 2)
        size = self._model.backbone.config.size
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
        both = normalize(torch.cat([pixels, pixels.flip(3)]), self._mean, self._std)
        seen: Tensor = self._model.to(images.device)(both, (_TASK,))[_TASK].float()
        plain, mirrored = seen.chunk(2)
        return (plain + mirrored[:, self._swapped]) / 2
