"""Folders of images, turned into batches of views.

A batch is a function of (seed, step): any number of workers, and a resumed run, see the same.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpal_edge.errors import DataError
from dpal_edge.files import find_images
from dpal_edge.train import views
from dpal_edge.train.config import TrainConfig
from dpal_edge.train.views import Pixels

LOCAL_CROPS = 2
# What Pillow raises on damaged files, besides errors of the file system.
_UNREADABLE = (OSError, Image.DecompressionBombError, SyntaxError, ValueError)
_TRIES = 20  # images tried in place of an unreadable one before giving up


@dataclass(frozen=True)
class Batch:
    """The views of B people, uint8 RGB, and the files that could not be read for it."""

    base: Tensor  # (B, 3, H, W)
    local: Tensor  # (LOCAL_CROPS * B, 3, h, w), all first crops before all second ones
    crowd: Tensor  # (B, 3, Hc, Wc)
    skipped: tuple[tuple[str, str], ...] = ()  # path, reason

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU run beside computation."""
        return replace(self, base=self.base.pin_memory(), local=self.local.pin_memory(), crowd=self.crowd.pin_memory())


def split_validation(paths: tuple[Path, ...], count: int, seed: int) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Split ``paths`` into training and ``count`` validation images, at most a tenth of all; the same for one seed."""
    count = min(count, len(paths) // 10)
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(paths))[:count].tolist())
    train = tuple(path for i, path in enumerate(paths) if i not in chosen)
    return train, tuple(paths[i] for i in sorted(chosen))


class PersonBatches(Dataset[Batch]):
    """Item ``step`` is the batch of that update: an epoch is one seeded permutation, and epochs follow each other."""

    def __init__(self, paths: tuple[Path, ...], config: TrainConfig, *, batch: int | None = None) -> None:
        self.paths = paths
        self.config = config
        self.batch = batch or config.batch
        self.backgrounds = find_images(config.backgrounds).paths
        self.crowds = find_images(config.crowd_data).paths

    def __getitem__(self, step: int) -> Batch:
        """Decode, crop, augment and compose batch ``step``.

        Raises:
            DataError: twenty images, tried one in place of the other, are unreadable.
        """
        config = self.config
        skipped: dict[str, str] = {}
        rngs, base, local, sources = [], [], [], []
        for position in range(step * self.batch, (step + 1) * self.batch):
            rng = np.random.default_rng([config.seed, 2, position])
            image = self._read(self.paths, self._index(position), skipped)
            base.append(views.global_view(image, config.size, rng))
            local.append([views.local_view(image, config.local_size, config.size, rng) for _ in range(LOCAL_CROPS)])
            rngs.append(rng)
            sources.append(image)
        crowd = [self._crowd(i, rngs[i], sources, base, local, skipped) for i in range(self.batch)]
        return Batch(
            base=_stack(base),
            local=_stack([crops[k] for k in range(LOCAL_CROPS) for crops in local]),
            crowd=_stack(crowd),
            skipped=tuple(skipped.items()),
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.paths))
        return int(_permutation(len(self.paths), self.config.seed, epoch)[place])

    def _crowd(
        self,
        i: int,
        rng: Generator,
        sources: list[Image.Image],
        base: list[Pixels],
        local: list[list[Pixels]],
        skipped: dict[str, str],
    ) -> Pixels:
        """Make the crowd view of image ``i`` of the batch."""
        config = self.config
        real = {"paste": 0.0, "mixed": 0.5, "real": 1.0}[config.crowd_source]
        if rng.random() < real:
            image = self._read(self.crowds, int(rng.integers(len(self.crowds))), skipped)
            return views.crowd_view(image, config.crowd_size, rng)
        if self.backgrounds:
            image = self._read(self.backgrounds, int(rng.integers(len(self.backgrounds))), skipped)
        else:
            image = views.blurred(sources[int(rng.integers(len(sources)))])
        background = views.background_view(image, config.crowd_size, rng)
        if config.crowd == "self":
            return views.paste_self(background, local[i][-1], base[i], rng)
        other = (i + int(rng.integers(1, max(len(base), 2)))) % len(base)
        return views.paste_others(background, [base[i], base[other]], rng)

    def _read(self, paths: tuple[Path, ...], index: int, skipped: dict[str, str]) -> Image.Image:
        """Decode image ``index``, or another in its place, noting in ``skipped`` those that cannot be read."""
        tries = min(_TRIES, len(paths))
        for attempt in range(tries):
            # Evenly spread, because an interrupted copy leaves its empty files side by side.
            path = paths[(index + attempt * (len(paths) // tries)) % len(paths)]
            try:
                with Image.open(path) as image:
                    image.draft("RGB", (1024, 1024))  # large JPEGs decode several times faster at a reduced scale
                    decoded: Image.Image = image.convert("RGB")
                    return decoded
            except _UNREADABLE as error:
                skipped[str(path)] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise DataError(
            f"{path}: cannot be read, nor can {tries - 1} others tried in its place ({skipped[str(path)]}); "
            f"are these really images?"
        )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, 3, epoch]).permutation(count)


def _stack(images: list[Pixels]) -> Tensor:
    """Stack (H, W, 3) arrays into one (n, 3, H, W) tensor."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
