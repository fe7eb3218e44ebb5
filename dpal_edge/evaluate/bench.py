"""Samples through a model, one by one, without those that cannot be read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpal_edge.errors import DataError
from dpal_edge.evaluate.labels import label_columns, mirror_back
from dpal_edge.evaluate.predictor import HeadInfo, Predictor, Raw
from dpal_edge.tasks.image import Pixels, read_crop
from dpal_edge.tasks.sample import Problems, Sample, Split

Read = Callable[[Sample[Any], tuple[int, int]], tuple[Pixels, Any]]  # a sample's input of a size, and what else is read


class Output(NamedTuple):
    """What a model says about one sample."""

    sample: Sample[Any]
    raw: Raw  # of the head, without the batch axis, its labels those of the data set in their order
    read: Any  # what was read with the image


def read_person(sample: Sample[Any], size: tuple[int, int]) -> tuple[Pixels, None]:
    """Read a sample's crop; nothing else.

    Raises:
        DataError: it cannot be read.
    """
    return read_crop(sample, size), None


@dataclass
class Bench:
    """One task of a model on one data set."""

    predictor: Predictor
    task: str
    folder: Path  # of the data, named in problems
    batch: int = 32  # images per call of the predictor
    flip: bool = False  # whether outputs are averaged with those for mirrored images
    errors: bool = True  # whether standard errors are wanted
    advance: Callable[[int], object] = lambda images: None  # called with a number of images done
    problems: list[str] = field(default_factory=list)  # samples that were left out, and why

    @property
    def head(self) -> HeadInfo:
        """The head that is scored."""
        return self.predictor.heads[self.task]

    def outputs(self, split: Split[Any], read: Read = read_person) -> Iterator[Output]:
        """Yield what the model says about each sample that can be read, in order; name the others in ``problems``.

        Raises:
            ConfigError: the head does not know the labels of ``split``.
            DataError: more samples cannot be read than is tolerated.
        """
        columns = label_columns(split.labels, self.head, self.folder) if self.head.labels else slice(None)
        bad = Problems(self.folder)
        for start in range(0, len(split.samples), self.batch):
            part = split.samples[start : start + self.batch]
            good = list(self._read(part, read, bad))
            bad.finish(len(split.samples) - len(bad.found))
            if good:
                raw = self._predict(np.stack([pixels for _, pixels, _ in good]))[:, columns]
                for (sample, _, extra), row in zip(good, raw, strict=True):
                    yield Output(sample, row, extra)
            self.advance(len(part))
        self.problems += bad.found

    def _read(
        self, samples: Sequence[Sample[Any]], read: Read, bad: Problems
    ) -> Iterator[tuple[Sample[Any], Pixels, Any]]:
        for sample in samples:
            try:
                yield sample, *read(sample, self.predictor.size)
            except DataError as error:
                inside = sample.image.is_relative_to(self.folder)
                name = sample.image.relative_to(self.folder) if inside else sample.image
                bad.add(str(name), str(error).removeprefix(f"{sample.image}: "))

    def _predict(self, images: Pixels) -> Raw:
        """Run the model, on mirrored images as well if asked to."""
        raw = self.predictor(images, self.task)
        if not self.flip:
            return raw
        mirrored = self.predictor(np.ascontiguousarray(images[:, :, ::-1]), self.task)
        averaged: Raw = (raw + mirror_back(mirrored, self.head, self.predictor.size)) * np.float32(0.5)
        return averaged
