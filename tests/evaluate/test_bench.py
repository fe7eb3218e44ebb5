"""Samples through a model, without those that cannot be read."""

from pathlib import Path

import numpy as np
import pytest

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.evaluate.bench import Bench
from dpal_edge.evaluate.predictor import HeadInfo
from dpal_edge.tasks.sample import Sample, Split
from tests.evaluate.known import Known
from tests.tasks.layouts import save_image

COLOURS = HeadInfo("attributes", "linear", ("left_red", "right_red", "blue"))


def halves(images):
    """Mean red of the left and of the right half, and blue."""
    red = images[..., 0].astype(np.float32)
    return np.stack([red[:, :, :8].mean((1, 2)), red[:, :, 8:].mean((1, 2)), images[..., 2].mean((1, 2))], axis=1)


def write_split(folder: Path, count: int, labels=COLOURS.labels) -> Split[int]:
    for i in range(count):
        pixels = np.zeros((40, 20, 3))
        pixels[:, :10, 0], pixels[..., 2] = 100 + i, i
        save_image(folder / f"{i}.png", pixels)
    return Split(tuple(Sample(folder / f"{i}.png", i) for i in range(count)), labels)


def test_outputs_come_in_order_and_in_batches(tmp_path):
    model, done = Known(COLOURS, halves), []
    bench = Bench(model, "attributes", tmp_path, batch=4, advance=done.append)
    outputs = list(bench.outputs(write_split(tmp_path, 10, ("blue", "left_red"))))  # in the order of the data
    assert [output.sample.target for output in outputs] == list(range(10))
    np.testing.assert_allclose([output.raw for output in outputs], [[i, 100 + i] for i in range(10)], atol=8)
    assert model.seen == done == [4, 4, 2]
    assert bench.problems == []


def test_mirrored_images_are_averaged(tmp_path):
    split = write_split(tmp_path, 1)
    plain, flipped = (
        next(iter(Bench(Known(COLOURS, halves), "attributes", tmp_path, flip=flip).outputs(split))).raw
        for flip in (False, True)
    )
    np.testing.assert_allclose(flipped, plain)  # this model is as good on either side

    biased = Known(COLOURS, lambda images: halves(images) + np.array([10, 0, 0], np.float32))
    found = next(iter(Bench(biased, "attributes", tmp_path, flip=True).outputs(split))).raw
    np.testing.assert_allclose(found, plain + np.array([5, 5, 0]), rtol=1e-5)


def test_what_cannot_be_read_is_named_and_left_out(tmp_path):
    split = write_split(tmp_path, 21)
    (tmp_path / "3.png").write_bytes(b"no image")
    bench, done = Bench(Known(COLOURS, halves), "attributes", tmp_path, batch=4), []
    bench.advance = done.append
    assert [output.sample.target for output in bench.outputs(split)] == [i for i in range(21) if i != 3]
    [problem] = bench.problems
    assert problem.startswith(f"{tmp_path}: 3.png: cannot be read as an image")
    assert sum(done) == 21


def test_too_many_that_cannot_be_read_end_it_at_once(tmp_path):
    split = write_split(tmp_path, 39)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    model = Known(COLOURS, halves)
    message = r"0.png: cannot be read as an image .* \(and 1 more of 39\); more than 5 % are bad"
    with pytest.raises(DataError, match=message):
        list(Bench(model, "attributes", tmp_path, batch=2).outputs(split))
    assert model.seen == []


def test_labels_that_the_head_does_not_know(tmp_path):
    bench = Bench(Known(COLOURS, halves), "attributes", tmp_path)
    with pytest.raises(ConfigError, match="has green, which the model's attributes head does not know"):
        list(bench.outputs(write_split(tmp_path, 1, ("green",))))
