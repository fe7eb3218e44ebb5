"""A model with heads, wherever it comes from: uint8 images in, the raw output of one head out."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import BackendUnavailable, ConfigError, ModelFileError
from dpal_edge.manifest import Manifest, manifest_path
from dpal_edge.runtime.backend import open_backend
from dpal_edge.runtime.model import Model, choose_artifact
from dpal_edge.runtime.person import check_heads
from dpal_edge.tasks.image import Pixels

Raw = NDArray[np.float32]
Precision = Literal["float32", "bf16", "fp16"]

DETECTION, REID = "detection", "reid"
_TASKS = {"embedding": REID}  # a bundle's name of a task, where it is not the data's


@dataclass(frozen=True)
class HeadInfo:
    """How the output of a head is to be read."""

    task: str
    kind: str = ""  # as ``models.heads`` names it; empty for an embedding that is the global token
    labels: tuple[str, ...] = ()  # joints, classes or attributes: the first axis of an output; none for boxes


def head_info(task: str, kind: str, labels: tuple[str, ...]) -> HeadInfo:
    """Describe the head that a checkpoint or a manifest names."""
    task = _TASKS.get(task, task)
    return HeadInfo(task, kind, () if task == DETECTION else labels)


class Predictor(Protocol):
    """A model behind one contract."""

    size: tuple[int, int]  # height, width of the images it takes
    heads: Mapping[str, HeadInfo]  # by task
    description: dict[str, Any]  # JSON-ready: what it is, where its weights come from, and what runs it

    def __call__(self, images: Pixels, task: str) -> Raw:
        """Map images (B, height, width, 3), RGB, to the raw output (B, ...) of the head for ``task``.

        Raises:
            ModelFileError: a value is not finite.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which form of a model is run, and where; what does not apply to a model is refused."""

    engine: str | None = None  # of a bundle; None is the first one installed that reads the artifact
    target: str | None = None  # of a bundle's artifacts, for example "onnx"; None is the first that can run here
    weights: str | None = None  # of a checkpoint: best (the default), backbone or ema
    precision: Precision | None = None  # of a checkpoint; None is float32
    device: str = "auto"  # cpu, cuda or auto; for a bundle, auto is the CPU


def open_predictor(model: str, choice: Choice) -> Predictor:
    """Open a bundle (no torch is loaded), a checkpoint, or a run folder, whose newest checkpoint is taken.

    Raises:
        ModelFileError: missing, damaged, or none of these.
        ConfigError: something is chosen that this model does not have.
        BackendUnavailable: it needs a package or a device that is not here.
    """
    path = Path(model)
    if manifest_path(path).is_file():
        return BundlePredictor.open(path, choice)
    if choice.engine or choice.target:
        raise ConfigError(f"{model}: no bundle, so it has no engine and no target to choose; leave both out")
    try:
        network = import_module("dpal_edge.evaluate.network")
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"{model} needs {error.name}: pip install 'dpal-edge[train]'") from error
    predictor: Predictor = network.load(path, choice)
    return predictor


class BundlePredictor:
    """A bundle, run by its engine: no torch."""

    def __init__(self, model: Model, description: dict[str, Any]) -> None:
        """Most callers want ``open``."""
        manifest = model.manifest
        self.size = manifest.input.size
        check_heads([head for head in manifest.heads if head.task != DETECTION], self.size)
        heads = [head_info(head.task, head.kind, head.labels) for head in manifest.heads]
        self.heads: Mapping[str, HeadInfo] = {head.task: head for head in heads}
        self.description = description
        self._outputs = {head.task: spec.name for head, spec in zip(heads, manifest.heads, strict=True)}
        self._model = model

    @classmethod
    def open(cls, bundle: Path, choice: Choice) -> "BundlePredictor":
        """Load the artifact that is chosen of ``bundle`` with the engine that is chosen."""
        if choice.weights or choice.precision:
            raise ConfigError(
                f"{bundle}: a bundle has the weights and the precision it was exported with; leave both out"
            )
        manifest = Manifest.read(bundle)
        artifact = choose_artifact(bundle, manifest, engine=choice.engine, target=choice.target)
        device = "cpu" if choice.device == "auto" else choice.device
        backend = open_backend(manifest.open_artifact(bundle, artifact), engine=choice.engine, device=device)
        description = {
            "model": str(bundle),
            "kind": "bundle",
            "architecture": manifest.model,
            "target": artifact.target,
            "sha256": artifact.file.sha256,
            "size": list(manifest.input.size),
            "engine": backend.name,
            "device": device,
            "precision": artifact.precision,
        }
        return cls(Model(backend, manifest), description)

    def __call__(self, images: Pixels, task: str) -> Raw:
        """Run the whole model; return the output of one head."""
        raw = self._model.run(images)[self._outputs[task]]
        return check_finite(raw.astype(np.float32), self.description["model"], task)


def check_finite(raw: Raw, model: str, task: str) -> Raw:
    """Return ``raw``, refusing a value that is not finite.

    Raises:
        ModelFileError: there is one; the model is broken.
    """
    if not np.isfinite(raw).all():
        raise ModelFileError(f"{model}: its {task} head gives values that are not finite; are its weights damaged?")
    return raw
