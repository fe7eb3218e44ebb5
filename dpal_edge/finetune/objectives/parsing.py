"""Training of a parsing head."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.objective import Example, Values
from dpal_edge.finetune.objectives.crops import CropObjective
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.parsing import IGNORE, read_mask
from dpal_edge.tasks.sample import Split

_LOVASZ_WEIGHT = 0.5


class ParsingObjective(CropObjective[Path]):
    """Cross-entropy of every labelled pixel of the view, and half the Lovász-softmax at the head's resolution.

    Source: the sum is that of SCHP (Li et al., 2020), which METHOD's downstream recipes use. Differs: no edge branch;
    the Lovász term looks at the pixels in the middle of the head's cells, a sixteenth of them.
    """

    task = "parsing"

    def __init__(
        self, split: Split[Path], size: tuple[int, int], augmentation: Augmentation, kind: str, channels: int
    ) -> None:
        super().__init__(split, size, augmentation)
        self.head = HeadConfig(task=self.task, kind=kind, labels=split.labels, channels=channels)
        self._mirrored = np.arange(256, dtype=np.uint8)  # what a class becomes in a mirrored view
        for one, other in flip_pairs(split.labels):
            self._mirrored[[one, other]] = other, one

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image" and "mask" (H, W), class ids and IGNORE."""
        sample = self.split.samples[index]
        image, warp = self.view(sample, rng)
        mask = warp.mask(read_mask(sample, self.split.labels), IGNORE)
        return {"image": image, "mask": self._mirrored[mask] if warp.flipped else mask}

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss" and its parts."""
        logits, mask = head(tokens).float(), batch["mask"].long()
        full = F.interpolate(logits, size=self.size, mode="bilinear")
        known = (mask != IGNORE).sum().clamp(min=1)  # of one image in a batch nothing may be labelled
        entropy = F.cross_entropy(full, mask, ignore_index=IGNORE, reduction="sum") / known
        rows, columns = (
            ((torch.arange(n, device=mask.device) + 0.5) * pixels / n).long()
            for n, pixels in zip(logits.shape[-2:], self.size, strict=True)
        )
        coarse = mask[:, rows[:, None], columns]
        lovasz = lovasz_softmax(logits.softmax(1), coarse)
        return {"loss": entropy + _LOVASZ_WEIGHT * lovasz, "entropy": entropy, "lovasz": lovasz}


def lovasz_softmax(shares: Tensor, mask: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard loss, 0..1, averaged over the classes that are in ``mask``.

    Args:
        shares: (B, C, h, w) probabilities.
        mask: (B, h, w) class ids; IGNORE is left out.

    Source: Berman et al., 2018, algorithm 1, over the whole batch.
    """
    known = mask != IGNORE
    truth, found = mask[known], shares.movedim(1, -1)[known]  # (P,), (P, C)
    losses = []
    for label in torch.unique(truth).tolist():
        there = (truth == label).float()
        errors, order = (there - found[:, label]).abs().sort(descending=True)
        there = there[order]
        missed = there.sum() - there.cumsum(0)
        jaccard = 1 - missed / (there.sum() + (1 - there).cumsum(0))
        losses.append((errors * torch.diff(jaccard, prepend=jaccard.new_zeros(1))).sum())
    return torch.stack(losses).mean() if losses else found.sum() * 0
