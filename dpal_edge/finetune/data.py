"""Batches of several tasks at once; a batch is a function of (seed, update), whatever the number of workers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpal_edge.errors import DataError
from dpal_edge.finetune.objective import Example, Objective
from dpal_edge.train.loop import end_workers, next_batch, prepare_worker

_TRIES = 20  # examples in a row that may be unusable before a batch is given up

TaskBatch = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """The examples of one update."""

    tasks: dict[str, TaskBatch]  # by task: "image" (B, H, W, 3) uint8 and targets
    files: dict[str, list[str]]  # by task, the image of each example
    skipped: dict[str, str] = field(default_factory=dict)  # files that could not be used, and why


class Batches(Dataset[Batch]):
    """Draws, reads and augments the examples of each update; an unusable one is replaced by the next, and noted."""

    def __init__(self, objectives: Mapping[str, Objective], counts: Mapping[str, int], seed: int) -> None:
        self.objectives, self.counts, self.seed = objectives, counts, seed

    def __getitem__(self, step: int) -> Batch:
        batch = Batch({}, {})
        for number, (task, objective) in enumerate(self.objectives.items()):
            indices = objective.indices(step, self.counts[task], self.seed + number)
            examples, batch.files[task] = [], []
            for place, index in enumerate(indices):
                rng = np.random.default_rng([self.seed, 3, number, step, place])
                used, example = read_example(objective, index, rng, batch.skipped)
                examples.append(example)
                batch.files[task].append(str(objective.file(used)))
            batch.tasks[task] = stack(examples)
        return batch

    def loader(self, steps: range, *, workers: int, pin: bool) -> "Iterator[Batch]":
        """Iterate the batches of ``steps`` in order, read by ``workers`` processes."""
        # Forked, so that what an objective holds (an engine, its data set) need not be pickled; workers only read.
        context: Any = "fork" if workers else None
        loader: DataLoader[Batch] = DataLoader(
            self,
            sampler=steps,
            batch_size=None,  # an item is a whole batch
            num_workers=workers,
            pin_memory=pin,
            multiprocessing_context=context,
            worker_init_fn=prepare_worker,
        )
        iterator = iter(loader)
        try:
            while (batch := next_batch(iterator)) is not None:
                yield batch
        finally:
            end_workers(iterator)


def read_example(
    objective: Objective, index: int, rng: np.random.Generator | None, skipped: dict[str, str]
) -> tuple[int, Example]:
    """Read the example ``index``, or the next usable one after it; note in ``skipped`` what was passed over.

    Raises:
        DataError: too many in a row cannot be used.
    """
    reason = ""
    for step in range(min(_TRIES, len(objective))):
        used = (index + step) % len(objective)
        try:
            return used, objective.example(used, rng)
        except DataError as error:
            reason = str(error)
            skipped[str(objective.file(used))] = reason
    raise DataError(f"{objective.task}: {_TRIES} examples in a row cannot be used; the last: {reason}")


def stack(examples: list[Example]) -> TaskBatch:
    """Join examples of one shape to a batch."""
    return {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in examples[0]}
