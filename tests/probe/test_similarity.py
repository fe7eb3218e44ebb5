"""CKA, and cosine after the best linear map."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.probe.similarity import compare, linear_cka, mapped_cosine
from tests.probe.colours import Colours
from tests.tasks.layouts import save_image


def _hsic(x, y):
    """Song's unbiased estimator, written with kernels as in the paper."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    ones = np.ones(n)
    middle = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3))


def test_cka_agrees_with_the_kernel_form():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 7)) + 4
    y = x[:, :3] @ rng.normal(size=(3, 20)) + rng.normal(size=(30, 20))
    expected = _hsic(x, y) / np.sqrt(_hsic(x, x) * _hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(y, x) == pytest.approx(expected)


def test_cka_ignores_rotation_shift_and_scale():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0, abs=1e-5)


def test_cka_of_unrelated_features_is_zero_even_where_there_are_fewer_images_than_channels():
    rng = np.random.default_rng(2)
    values = [linear_cka(rng.normal(size=(50, 200)), rng.normal(size=(50, 300))) for _ in range(20)]
    assert abs(np.mean(values)) < 0.02
    assert linear_cka(np.ones((50, 3)), rng.normal(size=(50, 3))) == 0.0


def test_mapped_cosine_of_a_linear_map_is_one_and_of_noise_is_zero():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 3, 8))
    same = mapped_cosine(x, x @ rng.normal(size=(8, 12)) + 30)
    assert same["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert same["centred_cosine"] == pytest.approx(1.0, abs=1e-3)
    noise = mapped_cosine(x, rng.normal(size=(200, 3, 12)) + 30)
    assert noise["cosine"] > 0.99  # what all tokens share
    assert abs(noise["centred_cosine"]) < 0.1


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(4)
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for path in paths:
        save_image(path, np.repeat(np.repeat(rng.integers(0, 255, (4, 2, 3)), 8, 0), 8, 1))
    return paths


def test_models_of_another_width_and_grid_are_compared(images):
    rng = np.random.default_rng(5)
    one = Colours((4, 2), rng.normal(size=(3, 3)))
    other = Colours((4, 2), one.matrix @ np.linalg.qr(rng.normal(size=(5, 3)).T)[0] @ np.eye(3, 9))
    done = []
    found = compare(one, other, images, batch=7, advance=done.append)
    assert sum(done) == 24
    assert set(found) == {f"{a}/{b}" for a in ("global", "patch") for b in ("CKA", "cosine", "centred_cosine")}
    for name, value in found.items():
        assert value == pytest.approx(1.0, abs=1e-2), name
    coarse = compare(one, Colours((2, 1), one.matrix), images)
    assert coarse["global/CKA"] == pytest.approx(1.0)
    assert coarse == compare(one, Colours((2, 1), one.matrix), images, batch=3)


def test_too_few_images(images):
    extractor = Colours((4, 2), np.eye(3))
    with pytest.raises(DataError, match="9 images to compare features on, expected at least 10"):
        compare(extractor, extractor, images[:9])
