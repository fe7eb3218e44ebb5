"""What frozen features know, task by task: nearest neighbours for identities, ridge regressions for the rest.

The protocols are surrogates for fine-tuning and this project's own: the numbers compare models probed with the same
splits, crop size and seed, and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.probe.features import FeatureExtractor, Features, extract
from dpal_edge.probe.grid import resize_map
from dpal_edge.probe.ridge import LinearMap, Moments, discriminate, fit_ridge, sum_moments
from dpal_edge.tasks.attributes import Flags, attribute_metrics
from dpal_edge.tasks.image import Pixels
from dpal_edge.tasks.parsing import confusion_matrix, parsing_metrics, read_mask
from dpal_edge.tasks.pose import Joints, Pose, oks_ap, pck
from dpal_edge.tasks.reid import Identity, retrieval_metrics
from dpal_edge.tasks.sample import Sample, Split

_HELD = 5  # one in so many training images chooses the penalty
_LOOKS = 8  # mask pixels looked at under a patch, down and across
_HEAT_SIGMA = 0.7  # of a joint's heat, in patches
_STRIPS = 8  # bands that a person is cut into, from above
_REACH = 1  # patches on each side of the hottest one that tell where in it the joint is

Samples = Sequence[Sample[Any]]
Rows = NDArray[np.floating]


@dataclass(frozen=True)
class Bench:
    """What is probed, and how."""

    extractor: FeatureExtractor
    batch: int  # images per call of the extractor
    seed: int  # of the choice of training images that choose the penalty
    advance: Callable[[int], object] = lambda images: None  # called with the number of images done

    def features(self, samples: Samples) -> Iterator[tuple[Samples, Features]]:
        """Yield the samples, in order and batches, with their features."""
        for part, features in extract(samples, self.extractor, self.batch):
            yield part, features
            self.advance(len(part))

    def fit(
        self, samples: Samples, pairs: Callable[[Samples, Features], tuple[Rows, Rows]]
    ) -> tuple[LinearMap, Moments]:
        """Fit a ridge regression to the inputs and outputs that ``pairs`` makes of each batch of ``samples``.

        Returns:
            The regression, and the moments of all that it was fitted to.

        Raises:
            DataError: there are fewer than two samples, or nothing to fit to in one of the parts.
        """
        if len(samples) < 2:
            raise DataError(f"{len(samples)} training image, expected at least 2: one of {_HELD} chooses the penalty")
        order = np.random.default_rng([self.seed, 5]).permutation(len(samples))
        count = max(len(samples) // _HELD, 1)
        parts = [[samples[i] for i in sorted(chosen)] for chosen in (order[count:], order[:count])]
        fit, held = (sum_moments(pairs(*batch) for batch in self.features(part)) for part in parts)
        if not fit.count or not held.count:
            raise DataError(f"{samples[0].image.parent}: in {len(samples)} training images too little is labelled")
        return fit_ridge(fit, held), fit + held


@dataclass(frozen=True)
class Scores:
    """What a probe found."""

    metrics: dict[str, float]  # the one to compare models by comes first; of all, higher is better
    penalty: float | None = None  # of the ridge regression that was fitted


def probe_reid(splits: Mapping[str, Split[Identity]], bench: Bench) -> Scores:
    """Rank the gallery by cosine similarity: of the global token, and of pooled patch tokens where there are any.

    ``patch_`` is the mean of all patches; ``strip_`` the means of eight bands of rows, side by side, which keep apart
    what a person wears above and below.
    """
    found = {}
    for name in ("query", "gallery"):
        batches = [_pooled(features) for _, features in bench.features(splits[name].samples)]
        found[name] = {prefix: np.concatenate([batch[prefix] for batch in batches]) for prefix in batches[0]}
    query, gallery = ([sample.target for sample in splits[name].samples] for name in found)
    metrics: dict[str, float] = {}
    for prefix in found["query"]:
        scores = retrieval_metrics(found["query"][prefix], found["gallery"][prefix], query, gallery)
        metrics |= {prefix + name: value for name, value in scores.items()}
    return Scores(metrics)


def probe_parsing(splits: Mapping[str, Split[Path]], bench: Bench) -> Scores:
    """Predict each class's log probability from a patch's token; upsample bilinearly, and take the greatest.

    The token is first regressed on the shares of classes under its patch (see ``ridge.discriminate``). Patches without
    a labelled pixel are not fitted to. Scored at the resolution of the masks.
    """
    classes = splits["train"].labels

    def pairs(samples: Samples, features: Features) -> tuple[Rows, Rows]:
        tokens = _patches(features)
        shares = np.stack([class_shares(read_mask(s, classes), tokens.shape[1:3], len(classes)) for s in samples])
        known = shares.any(-1)
        return tokens[known], shares[known]

    linear = discriminate(*bench.fit(splits["train"].samples, pairs))
    confusion = np.zeros((len(classes),) * 2, np.int64)
    for samples, features in bench.features(splits["val"].samples):
        for sample, tokens in zip(samples, _patches(features), strict=True):
            truth = read_mask(sample, classes)
            predicted = resize_map(linear(tokens).astype(np.float32), truth.shape).argmax(-1)
            confusion += confusion_matrix(predicted, truth, len(classes))
    return Scores(parsing_metrics(confusion), linear.penalty)


def probe_pose(splits: Mapping[str, Split[Pose]], bench: Bench) -> Scores:
    """Regress a Gaussian of heat around each joint on patch tokens; look for the joint around the hottest patch.

    A joint that is not labelled has no heat anywhere. A person's score for OKS AP is the mean of the greatest heats.
    """
    names = splits["train"].labels

    def pairs(samples: Samples, features: Features) -> tuple[Rows, Rows]:
        tokens = _patches(features)
        heat = np.stack([joint_heat(sample, tokens.shape[1:3]) for sample in samples])
        return tokens.reshape(-1, tokens.shape[-1]), heat.reshape(-1, len(names))

    linear, _ = bench.fit(splits["train"].samples, pairs)
    joints, scores, poses = [], [], []
    for samples, features in bench.features(splits["val"].samples):
        for sample, tokens in zip(samples, _patches(features), strict=True):
            heat = linear(tokens)
            joints.append(locate_joints(heat, sample))
            scores.append(heat.max(axis=(0, 1)).mean())
            poses.append(sample.target)
    found = np.stack(joints)
    oks = {f"OKS_{name}": value for name, value in oks_ap(found, np.array(scores), poses, names).items()}
    return Scores({"PCK@0.2": pck(found, poses, names), **oks}, linear.penalty)


def probe_attributes(splits: Mapping[str, Split[Flags]], bench: Bench) -> Scores:
    """Regress attributes on the global and the mean patch token, side by side.

    An attribute is there above the middle between its mean outputs over the training people who have it and who lack
    it: the boundary of a discriminant analysis with equal priors, since mA counts both equally. One that all or none
    of them have is predicted so.
    """

    def tokens(features: Features) -> Rows:
        pooled = _pooled(features)
        return np.concatenate([pooled[prefix] for prefix in ("", "patch_") if prefix in pooled], axis=1)

    def pairs(samples: Samples, features: Features) -> tuple[Rows, Rows]:
        return tokens(features), np.stack([sample.target for sample in samples]).astype(np.float32)

    linear, total = bench.fit(splits["train"].samples, pairs)
    threshold = _middle(linear, total)
    predicted, truth = [], []
    for samples, features in bench.features(splits["val"].samples):
        predicted.append(linear(tokens(features)) > threshold)
        truth += [sample.target for sample in samples]
    return Scores(attribute_metrics(np.concatenate(predicted), np.stack(truth)), linear.penalty)


@dataclass(frozen=True)
class Probe:
    """How one task is probed."""

    score: Callable[[Mapping[str, Split[Any]], Bench], Scores]
    splits: tuple[str, ...]  # of the task, that ``score`` needs


PROBES = {
    "reid": Probe(probe_reid, ("query", "gallery")),
    "parsing": Probe(probe_parsing, ("train", "val")),
    "pose": Probe(probe_pose, ("train", "val")),
    "attributes": Probe(probe_attributes, ("train", "val")),
}


def class_shares(mask: Pixels, grid: tuple[int, int], classes: int) -> NDArray[np.float32]:
    """Return the share of each class among the labelled pixels under each patch; zeros where none is labelled.

    Args:
        mask: (H, W) class ids; those of ``classes`` and above are not labelled. 8x8 pixels per patch are looked at.
        grid: rows, columns of patches.

    Returns:
        (rows, columns, classes), 0..1.
    """
    looks = (
        (np.arange(n * _LOOKS) * 2 + 1) * pixels // (2 * n * _LOOKS) for n, pixels in zip(grid, mask.shape, strict=True)
    )
    seen = mask[np.ix_(*looks)].reshape(grid[0], _LOOKS, grid[1], _LOOKS, 1)
    counts = (seen == np.arange(classes)).sum(axis=(1, 3), dtype=np.float32)
    shares: NDArray[np.float32] = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return shares


def joint_heat(sample: Sample[Pose], grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return a Gaussian around each labelled joint, 1 at the joint, at the middles of patches: (rows, columns, K)."""
    x, y = ((sample.target.joints - _corner(sample)) / _extent(sample) * grid[::-1] - 0.5).T
    across = np.exp(-((np.arange(grid[1])[:, None] - x) ** 2) / (2 * _HEAT_SIGMA**2))  # (columns, K)
    down = np.exp(-((np.arange(grid[0])[:, None] - y) ** 2) / (2 * _HEAT_SIGMA**2))  # (rows, K)
    heat: NDArray[np.float32] = (down[:, None] * across * sample.target.labelled).astype(np.float32)
    return heat


def locate_joints(heat: Rows, sample: Sample[Pose]) -> Joints:
    """Find joints (K, 2), in pixels of the image, in heat (rows, columns, K).

    The place is the mean of the hottest patch and those that touch it, weighted by their heat where it is above 0.
    """
    rows, columns, count = heat.shape
    top, left = np.unravel_index(heat.reshape(-1, count).argmax(0), (rows, columns))
    y, x = np.arange(rows)[:, None], np.arange(columns)[:, None]
    near = (abs(y - top) <= _REACH)[:, None] & (abs(x - left) <= _REACH)
    weight = np.maximum(heat, 1e-6) * near
    total = weight.sum((0, 1))
    place = np.stack([(weight.sum(0) * x).sum(0) / total, (weight.sum(1) * y).sum(0) / total], axis=1)
    joints: Joints = ((place + 0.5) / (columns, rows) * _extent(sample) + _corner(sample)).astype(np.float32)
    return joints


def _corner(sample: Sample[Pose]) -> NDArray[np.float32]:
    """Return the left and top of the box that was cut out."""
    return np.array(sample.box, np.float32)[:2]


def _extent(sample: Sample[Pose]) -> NDArray[np.float32]:
    """Return the width and height of the box that was cut out."""
    left, top, right, bottom = np.array(sample.box, np.float32)
    return np.array([right - left, bottom - top])


def _pooled(features: Features) -> dict[str, Rows]:
    """Return what stands for a whole person, (B, any length) each, by the prefix of its metrics."""
    if features.patches is None:
        return {"": features.whole}
    bands = np.array_split(features.patches, min(_STRIPS, features.patches.shape[1]), axis=1)
    strips = np.concatenate([band.mean(axis=(1, 2)) for band in bands], axis=1)
    return {"": features.whole, "patch_": features.patches.mean(axis=(1, 2)), "strip_": strips}


def _middle(linear: LinearMap, total: Moments) -> NDArray[np.float64]:
    """Return, per output of 0 or 1, the middle between the mean outputs of rows with 1 and of rows with 0."""
    ones, zeros = total.y, total.count - total.y
    with np.errstate(divide="ignore", invalid="ignore"):
        high = (linear.weight * total.xy).sum(0) / ones + linear.bias
        low = (linear.weight * (total.x[:, None] - total.xy)).sum(0) / zeros + linear.bias
    middle = (high + low) / 2
    return np.where(ones == 0, np.inf, np.where(zeros == 0, -np.inf, middle))


def _patches(features: Features) -> NDArray[np.float32]:
    """Return the patch tokens; that there are some is checked before anything is probed."""
    if features.patches is None:
        raise ValueError("these features have no patches")
    return features.patches
