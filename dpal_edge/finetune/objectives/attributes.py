"""Training of an attribute head."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.finetune.attribute_teacher import AttributeTeacher
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.objective import Example, Values
from dpal_edge.finetune.objectives.crops import CropObjective, UnlabelledObjective
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.tasks.attributes import Flags
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.sample import Split


class AttributeObjective(CropObjective[Flags]):
    """Binary cross-entropy that allows for rarity, summed over attributes, averaged over people.

    r is the share of the training people who have an attribute. ``weighted``: an error counts exp(1 - r) where the
    attribute is there, exp(r) where it is not. ``adjusted``: log(r / (1 - r)) is added to the logit in training only,
    so that without it a score of 0.5 stands where having and lacking are equally well told, which is what mA counts;
    the scores are then no frequencies.

    Source: weighted, Li et al., 2015 (DeepMAR), in the form of Tan et al., 2020 (JLAC); adjusted, Menon et al., 2021
    (logit adjustment). Differs: its two-class form, for each attribute.
    """

    task = "attributes"
    ratio: Tensor

    def __init__(
        self, split: Split[Flags], size: tuple[int, int], augmentation: Augmentation, kind: str, loss: str
    ) -> None:
        super().__init__(split, size, augmentation)
        self.head = HeadConfig(task=self.task, kind=kind, labels=split.labels)
        self._loss = loss
        flags = np.stack([sample.target for sample in split.samples])
        self.register_buffer("ratio", torch.from_numpy(flags.mean(0)).float())
        self._swapped = np.arange(len(split.labels))
        for one, other in flip_pairs(split.labels):
            self._swapped[[one, other]] = other, one

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image" and "flags" (A,), bool."""
        sample = self.split.samples[index]
        image, warp = self.view(sample, rng)
        return {"image": image, "flags": sample.target[self._swapped] if warp.flipped else sample.target}

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss"."""
        logits, flags = head(tokens).float(), batch["flags"].float()
        if self._loss == "adjusted":
            least = 0.5 / len(self)  # of nobody's attribute the prior would be infinite
            return {"loss": _entropy(logits + torch.logit(self.ratio, eps=least), flags).sum(1).mean()}
        weight = torch.exp(torch.where(flags > 0, 1 - self.ratio, self.ratio))
        return {"loss": (_entropy(logits, flags) * weight).sum(1).mean()}


class TaughtAttributeObjective(UnlabelledObjective):
    """Attributes as a teacher tells them of the same view: binary cross-entropy with its probabilities as targets.

    Labels of few people are learned by heart; what a teacher says of ever new views is not. Nothing allows for rarity:
    where a score of 0.5 stands, the teacher has settled.

    Source: Hinton et al., 2015, at temperature 1, for each attribute; the same views, Beyer et al., 2022.
    """

    task = "attributes"

    def __init__(
        self,
        images: Sequence[Path],
        size: tuple[int, int],
        augmentation: Augmentation,
        teacher: AttributeTeacher,
        *,
        kind: str,
        mix: float,
    ) -> None:
        super().__init__(images, size, augmentation, mix)
        self.head = HeadConfig(task=self.task, kind=kind, labels=teacher.labels)
        self.limits, self.taught_by, self._teacher = teacher.limits, teacher.hashes, teacher

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss", summed over attributes, averaged over people."""
        wanted = self._teacher(batch["image"]).sigmoid()
        return {"loss": _entropy(head(tokens).float(), wanted).sum(1).mean()}


def _entropy(logits: Tensor, flags: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, flags, reduction="none")
