"""What a task is to training: examples of fixed shape, and a loss on the tokens of one shared backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dpal_edge.models.head_config import HeadConfig

Example = dict[str, NDArray[Any]]  # "image" (H, W, 3) uint8 RGB, and targets of one shape for all examples
Values = dict[str, Tensor]  # "loss" (scalar, float32), and its parts by name


class Objective(Protocol):
    """One task with its data. An ``nn.Module``, because some have weights that only training needs."""

    task: str
    head: HeadConfig
    size: tuple[int, int]  # height, width of its images
    limits: str  # of what teaches it, which pass on to what is trained; empty: none known
    taught_by: Mapping[str, str]  # the hash of each file of its teacher, by name; empty: it has none
    problems: tuple[str, ...]  # bad annotations that reading left out

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        ...

    def indices(self, step: int, count: int, seed: int) -> Sequence[int]:
        """Return which examples update ``step`` looks at, ``count`` of them."""
        ...

    def file(self, index: int) -> Path:
        """Return the image file of an example, to be named in messages."""
        ...

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Read one example, augmented by ``rng``, or plain for validation if that is None.

        Raises:
            DataError: its image or annotation cannot be used.
        """
        ...

    def __call__(self, head: nn.Module, tokens: Tensor, batch: dict[str, Tensor]) -> Values:
        """Return the loss of a batch: tokens (B, 1 + N, D) of its images, and its targets, on one device."""
        ...


def epoch_order(examples: int, step: int, count: int, seed: int) -> list[int]:
    """Return the examples at positions ``step * count`` and on: each epoch is a new order of all of them.

    A function of its arguments alone, so that a resumed run sees what an uninterrupted one sees.
    """
    positions = range(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, 1, epoch]).permutation(examples)
        for epoch in {position // examples for position in positions}
    }
    return [int(orders[position // examples][position % examples]) for position in positions]
