"""What the tasks on person crops share: where examples come from, and how an image becomes a view."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image
from torch import nn

from dpal_edge.errors import DataError
from dpal_edge.finetune.augment import Augmentation, Warp, change_colours, draw_warp, plain_warp
from dpal_edge.finetune.objective import Example, epoch_order
from dpal_edge.tasks.image import Pixels, open_sample
from dpal_edge.tasks.sample import Sample, Split

Target = TypeVar("Target")


class CropObjective(nn.Module, Generic[Target]):
    """A split of person crops, and the views that training takes of them."""

    limits = ""
    taught_by: Mapping[str, str] = {}  # the hash of each file of its teacher, by name

    def __init__(self, split: Split[Target], size: tuple[int, int], augmentation: Augmentation) -> None:
        super().__init__()
        self.split, self.size, self.augmentation = split, size, augmentation
        self.problems = split.problems

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return len(self.split.samples)

    def indices(self, step: int, count: int, seed: int) -> Sequence[int]:
        """Return which examples update ``step`` looks at."""
        return epoch_order(len(self), step, count, seed)

    def file(self, index: int) -> Path:
        """Return the image file of an example."""
        return self.split.samples[index].image

    def view(self, sample: Sample[Any], rng: np.random.Generator | None) -> tuple[Pixels, Warp]:
        """Return a view (H, W, 3) of a sample and the warp that led to it; the plain crop without ``rng``.

        Raises:
            DataError: the image cannot be read, or does not fit its annotations.
        """
        image: Image.Image = open_sample(sample)
        box = sample.box or (0.0, 0.0, float(image.width), float(image.height))
        if rng is None:
            warp = plain_warp(box, self.size)
            return warp.image(image), warp
        warp = draw_warp(box, self.size, self.augmentation, rng)
        return change_colours(warp.image(image), self.augmentation, rng), warp


class UnlabelledObjective(CropObjective[None]):
    """Crops that a teacher answers for. It looks at the very same views, so these may be of people who never were:
    some show the upper part of one and the lower part of another, and few photographs become many outfits.
    """

    def __init__(self, images: Sequence[Path], size: tuple[int, int], augmentation: Augmentation, mix: float) -> None:
        """Prepare ``images``, of whose views a share ``mix`` joins two."""
        super().__init__(Split(tuple(Sample(path, None) for path in images)), size, augmentation)
        self._mix = mix

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Return "image", which the teacher is shown as well."""
        image, _ = self.view(self.split.samples[index], rng)
        if rng is not None and rng.random() < self._mix:
            other = self.split.samples[int(rng.integers(len(self)))]
            cut = int(rng.uniform(0.3, 0.7) * self.size[0])
            with suppress(DataError):  # that file is named when its own turn comes
                image = np.concatenate([image[:cut], self.view(other, rng)[0][cut:]])
        return {"image": image}
