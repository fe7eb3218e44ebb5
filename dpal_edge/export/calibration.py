"""The ranges of what linear layers read, over real crops; and whether the crops are fit to tell them."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dpal_edge.errors import DataError
from dpal_edge.export.crops import Crops
from dpal_edge.export.linears import Graph
from dpal_edge.export.onnx import INPUT_NAME

LEVELS = 127  # of INT8 on each side of 0, symmetric
LEAST_IMAGES = 16
_BATCH = 8
_BINS = 2048
_CANDIDATES = 96  # clips tried, from the largest value down
_LEAST_CLIP = 0.1  # of the largest value
_LEAST_CONTRAST = 4.0  # grey levels of standard deviation below which a crop shows nothing
_LEAST_SMOOTHNESS = 0.4  # correlation of neighbouring pixels: 0.95 in the crops this was written with, 0 in noise
_GOOD_IMAGES = 128

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Range:
    """What a tensor holds over all images."""

    largest: float  # absolute value
    clip: float  # the absolute value that INT8 reaches: what is above becomes this
    clipped: float  # share of the values above


@dataclass(frozen=True)
class Coverage:
    """What the calibration images are, and how far one may trust ranges from them."""

    images: int
    distinct: int  # of them, by content
    brightness: tuple[float, float]  # mean grey levels of the darkest and the brightest twentieth, 0..255
    smoothness: float  # median correlation of neighbouring pixels
    growth: float  # how much ranges grew from the first half of the images to all, the worst layer, relative

    def to_dict(self) -> dict[str, Any]:
        """Return all as JSON-ready values."""
        return asdict(self)

    @property
    def advice(self) -> str:
        """What would make the ranges more certain; empty where nothing would."""
        if self.images < _GOOD_IMAGES:
            return f"{self.images} images: give {_GOOD_IMAGES} or more of what the cameras will see"
        if self.growth > 0.2:
            return f"the second half of the images still widened a range by {100 * self.growth:.0f} %: give more"
        return ""


class Histogram:
    """How often which absolute values occur; its range doubles as larger ones come."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.reach = 0.0  # upper edge of the last bin
        self.largest = 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Count values."""
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        largest = float(magnitudes.max(initial=0.0))
        self.largest = max(self.largest, largest)
        if self.reach == 0.0:
            self.reach = largest
        while self.reach and largest > self.reach:
            self.counts[: _BINS // 2] = self.counts.reshape(-1, 2).sum(1)
            self.counts[_BINS // 2 :] = 0
            self.reach *= 2
        if self.reach:
            self.counts += np.histogram(magnitudes, _BINS, (0.0, self.reach))[0]

    def choose(self) -> Range:
        """Choose the clip with the least squared error of rounding to INT8 and clipping together."""
        if self.largest == 0.0:
            return Range(0.0, 0.0, 0.0)
        centres = (np.arange(_BINS) + 0.5) * (self.reach / _BINS)
        clips: Array = self.largest * np.linspace(1.0, _LEAST_CLIP, _CANDIDATES)
        errors = [float((self.counts * _error(centres, clip)).sum()) for clip in clips]
        clip = float(clips[int(np.argmin(errors))])
        clipped = float(self.counts[centres > clip].sum() / self.counts.sum())
        return Range(self.largest, clip, clipped)


def _error(values: Array, clip: float) -> Array:
    step = clip / LEVELS
    error: Array = (np.minimum(np.rint(values / step), LEVELS) * step - values) ** 2
    return error


def calibrate(model: onnx.ModelProto, crops: Crops) -> tuple[dict[str, Range], Coverage]:
    """Run a float32 graph on uint8 ``crops`` (n, H, W, 3); return the range of each input of a linear layer by name.

    Source: ranges of least mean squared error, as in "A White Paper on Neural Network Quantization" (Nagel et al.,
    2021). Differs: from a histogram of 2048 bins.

    Raises:
        DataError: the crops are too few, or show nothing, or noise.
    """
    check_crops(crops)
    names = list(dict.fromkeys(layer.activation.source for layer in Graph(model).linears()))
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.output[:]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = open_session(opened)
    histograms = {name: Histogram() for name in names}
    halfway: dict[str, float] = {}
    middle = len(crops) // 2
    for start in [*range(0, middle, _BATCH), *range(middle, len(crops), _BATCH)]:
        stop = min(start + _BATCH, middle if start < middle else len(crops))
        for name, values in zip(names, session.run(names, {INPUT_NAME: crops[start:stop]}), strict=True):
            histograms[name].add(values)
        if stop == middle:
            halfway = {name: histogram.largest for name, histogram in histograms.items()}
    ranges = {name: histogram.choose() for name, histogram in histograms.items()}
    growth = max((ranges[n].largest / value - 1 for n, value in halfway.items() if value), default=0.0)
    return ranges, _cover(crops, growth)


def check_crops(crops: Crops) -> None:
    """Refuse what no camera gives: ranges of noise or of grey areas are not those of people.

    Raises:
        DataError: too few crops, or most show nothing, or noise.
    """
    if len(crops) < LEAST_IMAGES:
        raise DataError(
            f"{len(crops)} crops to calibrate on, expected {LEAST_IMAGES} or more, and better {_GOOD_IMAGES}; name "
            f"folders of them with --calibration DIR"
        )
    contrast = float(np.median([crop.std() for crop in crops]))
    if contrast < _LEAST_CONTRAST:
        raise DataError(
            f"the calibration crops show nothing (grey levels deviate by {contrast:.1f}); give crops of people"
        )
    if (smooth := smoothness(crops)) < _LEAST_SMOOTHNESS:
        raise DataError(
            f"the calibration crops look like noise (neighbouring pixels correlate by {smooth:.2f}, in photographs by "
            f"about 0.95); give crops of people, invented ones give wrong ranges"
        )


def smoothness(crops: Crops) -> float:
    """Return the median correlation, -1..1, of neighbouring pixels of a crop."""
    found = []
    for crop in crops:
        grey = crop.mean(-1)
        left, right = grey[:, :-1] - grey[:, :-1].mean(), grey[:, 1:] - grey[:, 1:].mean()
        spread = np.sqrt((left**2).sum() * (right**2).sum())
        found.append(float((left * right).sum() / spread) if spread else 1.0)
    return float(np.median(found))


def _cover(crops: Crops, growth: float) -> Coverage:
    grey = crops.mean((1, 2, 3))
    low, high = np.quantile(grey, [0.05, 0.95])
    distinct = len({hashlib.sha256(crop.tobytes()).digest() for crop in crops})
    return Coverage(len(crops), distinct, (float(low), float(high)), smoothness(crops), growth)


def open_session(model: onnx.ModelProto) -> Any:
    """Open a graph that is no file yet in ONNX Runtime, on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: what it thinks of the graph is no news
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
