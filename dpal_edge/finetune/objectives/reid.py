"""Training of an embedding: by identities, or by another model's embeddings of crops that nobody labelled."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpal_edge.errors import DataError
from dpal_edge.finetune.augment import Augmentation
from dpal_edge.finetune.config import PER_PERSON
from dpal_edge.finetune.embedding_teacher import EmbeddingTeacher
from dpal_edge.finetune.objective import Example, Values, epoch_order
from dpal_edge.finetune.objectives.crops import CropObjective, UnlabelledObjective
from dpal_edge.models.head_config import HeadConfig
from dpal_edge.models.heads import BNNeckHead
from dpal_edge.tasks.reid import Identity
from dpal_edge.tasks.sample import Split

_SMOOTHING = 0.1  # of the identity labels
_RELATION_WEIGHT = 2.0


class IdentityObjective(CropObjective[Identity]):
    """Identity cross-entropy after the BNNeck, soft-margin triplets of the hardest pairs before it, half and half.

    Batches hold 4 images each of at least two people: of one alone nothing can be told from anything.

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
        """Return 4 images each of ``count / 4`` people, ``count`` being a multiple; people come in epochs."""
        rng = np.random.default_rng([seed, 2, step])
        people = epoch_order(len(self._images), step, count // PER_PERSON, seed)
        drawn: list[int] = []
        for person in people:
            images = self._images[person]
            drawn += rng.choice(images, PER_PERSON, replace=len(images) < PER_PERSON).tolist()
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


class EmbeddingObjective(UnlabelledObjective):
    """Embeddings that point where a teacher's point: 1 - cosine, and the pairwise cosines of the batch.

    Where the teacher pools a map of features, a linear map of each patch, which only training has, answers for the
    teacher's features at that place too: the squared error relative to their variance. A crop then teaches thousands
    of values and not one direction.

    No identity is labelled.

    Source: relational distillation, Park et al., 2019 (differs: cosines rather than distances, squared error); hints,
    Romero et al., 2015 (differs: at the end of the student, together with the rest).
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
        width: int,
    ) -> None:
        """Prepare ``images`` for a student whose tokens have ``width`` channels."""
        super().__init__(images, size, augmentation, mix)
        self.head = HeadConfig(task=self.task, kind=kind, channels=teacher.channels)
        self.taught_by, self._teacher = teacher.hashes, teacher
        self.locate = nn.Linear(width, teacher.map_channels) if teacher.map_channels else None
        if self.locate is not None:  # the map is sparse: what begins at random is further from it than nothing
            nn.init.zeros_(self.locate.weight)
            nn.init.zeros_(self.locate.bias)

    def forward(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return "loss" and its parts."""
        pixels: NDArray[np.uint8] = batch["image"].cpu().numpy()
        seen = self._teacher(pixels)
        wanted = F.normalize(torch.from_numpy(seen.embeddings).to(tokens.device), dim=1)
        found = F.normalize(head(tokens).float(), dim=1)
        cosine = 1 - (found * wanted).sum(1).mean()
        relation = (found @ found.T - wanted @ wanted.T).square().mean()
        values = {"loss": cosine + _RELATION_WEIGHT * relation, "cosine": cosine, "relation": relation}
        if self.locate is not None and seen.maps is not None:
            values["map"] = self._map_loss(self.locate(tokens[:, 1:]), torch.from_numpy(seen.maps).to(tokens.device))
            values["loss"] = values["loss"] + values["map"]
        return values

    def _map_loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Return the squared error of patches (B, N, C) against a map (B, C, rows, columns), relative to its variance.

        Both without their mean over the batch: what is the same for all crops is most of a map (97 % of the energy of
        Open Model Zoo's person-reidentification-retail-0277) and tells none of them from another.
        """
        rows = round(math.sqrt(found.shape[1] * self.size[0] / self.size[1]))
        averaged = F.adaptive_avg_pool2d(wanted, (rows, found.shape[1] // rows)).flatten(2).mT
        own, other = (values - values.mean(0) for values in (found.float(), averaged))
        return (own - other).square().sum() / other.square().sum().clamp(min=1e-12)


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
