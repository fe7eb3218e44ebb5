"""How much of a teacher's features a student's hold: linear CKA, and cosine after the best linear map.

Neither minds the student's width, or a rotation of its features: any model can be compared with any.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.probe.features import FeatureExtractor, read_batches
from dpal_edge.probe.grid import resize_map
from dpal_edge.probe.ridge import Moments, fit_ridge
from dpal_edge.tasks.sample import Sample

_DRAWN = 16  # patch tokens looked at per image: neighbours tell much the same, and memory stays bounded
_LEAST = 10  # images; fewer say nothing about hundreds of channels

Tokens = NDArray[np.floating]  # (n, r, D): r tokens of each of n images


def compare(
    student: FeatureExtractor,
    teacher: FeatureExtractor,
    images: Sequence[Path],
    *,
    batch: int = 32,
    seed: int = 0,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[str, float]:
    """Compare two models on the same crops, ``images`` resized to the student's size.

    Returns:
        For ``global/`` tokens, and for ``patch/`` tokens (16 per image, drawn by ``seed``) where the student has them:
        the values of ``linear_cka`` and ``mapped_cosine``. A student's map on another grid is resized to the teacher's.

    Raises:
        DataError: fewer than 10 images, or one that cannot be read.
    """
    if len(images) < _LEAST:
        raise DataError(f"{len(images)} images to compare features on, expected at least {_LEAST}")
    rng = np.random.default_rng([seed, 6])
    samples = [Sample(images[i], None) for i in rng.permutation(len(images))]
    drawn: dict[str, list[tuple[Tokens, Tokens]]] = {"global": [], "patch": []}
    for part, crops in read_batches(samples, student.size, batch):
        ours, theirs = student(crops), teacher(crops)
        drawn["global"].append((ours.whole[:, None], theirs.whole[:, None]))
        if ours.patches is not None and theirs.patches is not None:
            drawn["patch"].append(_draw(resize_map(ours.patches, theirs.patches.shape[1:3]), theirs.patches, rng))
        advance(len(part))
    found: dict[str, float] = {}
    for name, pairs in drawn.items():
        if pairs:
            x, y = (np.concatenate(tokens) for tokens in zip(*pairs, strict=True))
            found[f"{name}/CKA"] = linear_cka(_rows(x), _rows(y))
            found |= {f"{name}/{key}": value for key, value in mapped_cosine(x, y).items()}
    return found


def linear_cka(x: Tokens, y: Tokens) -> float:
    """Return the linear centred kernel alignment of features (n, Dx) and (n, Dy) of the same things, n > 3.

    It is at most 1, for features equal but for a rotation, a shift and a scale. The estimate is debiased: of unrelated
    features it is 0 on average for any n, where the plain one nears 1 as soon as n is below the width. It is 0, too,
    where one of the two does not vary.

    Source: Kornblith et al. (2019), with the estimator of Song et al. (2012) for each of its three terms.
    """
    x, y = (rows.astype(np.float64) - rows.mean(0, dtype=np.float64) for rows in (x, y))
    scale = _alignment(x, x) * _alignment(y, y)
    return float(_alignment(x, y) / np.sqrt(scale)) if scale > 0 else 0.0


def mapped_cosine(x: Tokens, y: Tokens) -> dict[str, float]:
    """Fit the best linear map from ``x`` (n, r, Dx) to ``y`` (n, r, Dy) on half of the n images; measure on the rest.

    The map is a ridge regression whose penalty a fifth of its half chooses.

    Returns:
        ``cosine``: mean cosine of the mapped and the true tokens, -1..1. ``centred_cosine``: the same after the mean of
        the fitted half's ``y`` is taken off both, so that what all tokens share earns nothing.
    """
    half = len(x) // 2
    held = max(half // 5, 1)
    fit, choose = (Moments.of(_rows(x[part]), _rows(y[part])) for part in (slice(held, half), slice(held)))
    linear = fit_ridge(fit, choose)
    mapped, true = linear(_rows(x[half:])), _rows(y[half:])
    mean = _rows(y[:half]).mean(0)
    return {"cosine": _mean_cosine(mapped, true), "centred_cosine": _mean_cosine(mapped - mean, true - mean)}


def _alignment(x: Tokens, y: Tokens) -> float:
    """Estimate, without bias but for a factor, the Hilbert-Schmidt criterion of centred (n, Dx) and (n, Dy)."""
    n = len(x)
    lengths_x, lengths_y = (x * x).sum(1), (y * y).sum(1)
    shared = ((x.T @ y) ** 2).sum() - n / (n - 2) * (lengths_x * lengths_y).sum()
    return float(shared + lengths_x.sum() * lengths_y.sum() / ((n - 1) * (n - 2)))


def _draw(x: Tokens, y: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """Draw the same patches of maps (B, rows, columns, D) of two models, other ones in each image."""
    x, y = (tokens.reshape(len(tokens), -1, tokens.shape[-1]) for tokens in (x, y))
    chosen = rng.random(x.shape[:2]).argsort(1)[:, :_DRAWN, None]
    return np.take_along_axis(x, chosen, 1), np.take_along_axis(y, chosen, 1)


def _mean_cosine(x: Tokens, y: Tokens) -> float:
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())


def _rows(tokens: Tokens) -> Tokens:
    return tokens.reshape(-1, tokens.shape[-1])
