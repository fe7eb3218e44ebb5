"""Training of an embedding: by identities, or by another model's embeddings of crops that nobody labelled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpal_edge.errors import DataError
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.embedding_teacher import EmbeddingTeacher
from dpal_edge.finetune.objective import Example, Values, epoch_order
from dpal_edge.finetune.objectives.crops import CropObjective
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.heads import BNNeckHead
from dpal_edge.tasks.reid import Identity
from dpal_edge.tasks.sample import Sample, Split

_PER_PERSON = 4  # images of one person in a batch
_SMOOTHING = 0.1  # of the identity labels
_RELATION_WEIGHT = 2.0


class IdentityObjective(CropObjective[Identity]):
    """Identity cross-entropy after the BNNeck, soft-margin triplets of the hardest pairs before it, half and half.

    Batches hold 4 images each of several people.

    Source: Luo et al., 2019; the halves and the soft margin as in SOLIDER-REID (docs of the data set presets).
    """

    task = "reid"

    def __init__(
        self, split: Split[Identity], size: tuple[int, int], augmentation: Augmentation, channels: int
    ) -> None:
        super().__init__(split, size, augmentation)
        people = sorted({sample.target.person for sample in split.samples})
        if len(people) < 2:
            raise DataError(f"{len(people)} person to learn from, expected images of at least 2")
        self.head = HeadConfig(task=self.task, kind="bnneck", channels=channels)
        self._number = {person: i for i, person in enumerate(people)}
        self._images: list[list[int]] = [[] for _ in people]
        for i, sample in enumerate(split.samples):
            self._images[self._number[sample.target.person]].append(i)
        self.classify = nn.Linear(channels, len(people), bias=False)
        nn.init.normal_(self.classify.weight, std=0.001)

    def indices(self, step: int, count: int, seed: int) -> Sequence[int]:
        """Return 4 images each of ``count / 4`` people; people come in epochs, images are drawn."""
        rng = np.random.default_rng([seed, 2, step])
        people = epoch_order(len(self._images), step, max(count // _PER_PERSON, 1), seed)
        drawn: list[int] = []
        for person in people:
            images = self._images[person]
            drawn += rng.choice(images, _PER_PERSON, replace=len(images) < _PER_PERSON).tolist()
        return drawn

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image" and "person" (), the number of the identity."""
        sample = self.split.samples[index]
        return {"image": self.view(sample, rng)[0], "person": np.array(self._number[sample.target.person])}

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss" and its parts."""
        feature = head.feature(tokens) if isinstance(head, BNNeckHead) else head(tokens)
        person = batch["person"]
        identity = F.cross_entropy(self.classify(head(tokens)).float(), person, label_smoothing=_SMOOTHING)
        triplet = soft_triplet(feature.float(), person)
        return {"loss": 0.5 * identity + 0.5 * triplet, "identity": identity, "triplet": triplet}


class EmbeddingObjective(CropObjective[None]):
    """Embeddings that point where a teacher's point: 1 - cosine, and the pairwise cosines of the batch.

    No identity is labelled. Images are mixed: some views show the upper part of one person and the lower part of
    another, so that few photographs become many outfits; the teacher looks at the very same pixels.

    Source: relational distillation, Park et al., 2019. Differs: cosines rather than distances, squared error.
    """

    task = "reid"

    def __init__(
        self,
        images: Sequence[Path],
        size: tuple[int, int],
        augmentation: Augmentation,
        teacher: EmbeddingTeacher,
        *,
        kind: str,
        mix: float,
    ) -> None:
        split: Split[None] = Split(tuple(Sample(path, None) for path in images))
        super().__init__(split, size, augmentation)
        self.head = HeadConfig(task=self.task, kind=kind, channels=teacher.channels)
        self._teacher, self._mix = teacher, mix

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image", which the teacher is shown as well."""
        image, _ = self.view(self.split.samples[index], rng)
        if rng is not None and rng.random() < self._mix:
            other, _ = self.view(self.split.samples[int(rng.integers(len(self)))], rng)
            cut = int(rng.uniform(0.3, 0.7) * self.size[0])
            image = np.concatenate([image[:cut], other[cut:]])
        return {"image": image}

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss" and its parts."""
        pixels: NDArray[np.uint8] = batch["image"].cpu().numpy()
        wanted = F.normalize(torch.from_numpy(self._teacher(pixels)).to(tokens.device), dim=1)
        found = F.normalize(head(tokens).float(), dim=1)
        cosine = 1 - (found * wanted).sum(1).mean()
        relation = (found @ found.T - wanted @ wanted.T).square().mean()
        return {"loss": cosine + _RELATION_WEIGHT * relation, "cosine": cosine, "relation": relation}


def soft_triplet(features: Tensor, person: Tensor) -> Tensor:
    """Return the mean of log(1 + exp(farthest of the same person - nearest of another)), Euclidean distances.

    Args:
        features: (B, D).
        person: (B,) of several images each.

    Source: Hermans et al., 2017, batch-hard with soft margin.
    """
    distance = torch.cdist(features, features)
    same = person[:, None] == person
    farthest = distance.masked_fill(~same, 0).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()
