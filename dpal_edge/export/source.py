"""What is exported: the model in a checkpoint, for one input size, with the names that the bundle gives its outputs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dpal_edge.manifest import HeadSpec
from dpal_edge.models.checkpoint import is_ours, load_backbone, read_checkpoint, read_newest
from dpal_edge.models.human import HumanModel, load_human, resize_model
from dpal_edge.models.students import config_to_dict

EMBEDDING, DETECTION = "embedding", "detection"
_REID = "reid"  # its output is the bundle's embedding
_REPEATED = ("ema", "ema_heads", "optimizer")  # parts of a checkpoint that repeat others or belong to no network


@dataclass(frozen=True)
class Source:
    """A trained model and where it comes from."""

    path: Path  # the checkpoint
    model: HumanModel  # in eval mode; without heads, its class token is the output
    name: str  # of the architecture, for example vit_tiny
    parameters: dict[str, int]  # of all that computed in training, by part
    metadata: dict[str, Any]  # at least mean, std and weights

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the images that the model was trained on, RGB in 0..1."""
        return tuple(self.metadata["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""
        return tuple(self.metadata["std"])

    @property
    def kept(self) -> set[str]:
        """The parts that are exported."""
        return {"backbone", "heads"} if self.model.configs else {"backbone"}


def open_source(checkpoint: Path, weights: str, size: tuple[int, int] | None = None) -> Source:
    """Open a fine-tuned, distilled or published model.

    Args:
        checkpoint: a file, or a run folder, whose newest checkpoint is taken.
        weights: as for ``load_backbone`` and ``load_human``.
        size: height, width of the input; None is the checkpoint's.

    Raises:
        ConfigError: the size does not fit the patches, or a head that knows one size only.
        ModelFileError: it cannot be read, or does not hold these weights.
    """
    path = read_newest(checkpoint)[0] if checkpoint.is_dir() else checkpoint
    if path.suffix == ".safetensors" and is_ours(path) and (found := read_checkpoint(path)).metadata.get("heads"):
        model, metadata = load_human(path, weights=weights)
        parameters = {part: count for part, count in found.parts.items() if part not in _REPEATED}
        parameters["teacher"] = sum(passport["parameters"] for passport in metadata.get("teachers", ()))
    else:
        backbone, metadata = load_backbone(path, weights=weights)
        model, parameters = HumanModel(backbone, {}).eval(), metadata["parameters"]
    name = metadata.get("student") or config_to_dict(model.backbone.config)["family"]
    return Source(path, model if size is None else resize_model(model, size), name, parameters, metadata)


def output_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the outputs: one per head, and the embedding of a model that has no head for it.

    A detector looks at whole frames, so it has no embedding.
    """
    names = tuple(EMBEDDING if task == _REID else task for task in tasks)
    return names if {EMBEDDING, DETECTION} & {*names} else (*names, EMBEDDING)


def head_outputs(heads: nn.ModuleDict, tokens: Tensor) -> dict[str, Tensor]:
    """Run all heads on tokens (B, 1 + N, width); the outputs by name, in the order of ``output_names``."""
    outputs = [head(tokens) for head in heads.values()]
    return dict(zip(output_names(heads), [*outputs, tokens[:, 0]], strict=False))  # the last where it has a name


def head_specs(model: HumanModel, outputs: Mapping[str, NDArray[np.float32]]) -> tuple[HeadSpec, ...]:
    """Describe the outputs (n, ...) of a model for the manifest."""
    configs = {EMBEDDING if task == _REID else task: config for task, config in model.configs.items()}
    return tuple(
        HeadSpec(
            name=name,
            task=name,
            shape=array.shape[1:],
            labels=configs[name].labels if name in configs else (),
            kind=configs[name].kind if name in configs else "",
        )
        for name, array in outputs.items()
    )
