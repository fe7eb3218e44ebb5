"""Proof of what was written: its weights are the model's and no other, its outputs are those of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpal_edge.errors import ModelFileError, ParityError
from dpal_edge.export.crops import Crops
from dpal_edge.export.onnx import INPUT_NAME, count_parameters
from dpal_edge.export.source import head_outputs
from dpal_edge.manifest import Parity, Stripped
from dpal_edge.models.human import HumanModel
from dpal_edge.models.vit import normalize
from dpal_edge.runtime.backend import Backend, open_backend
from dpal_edge.runtime.model import largest_errors, least_cosines, worst_head

Outputs = dict[str, NDArray[np.float32]]  # (n, ...) by head
_BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """How far a written artifact is from float32 torch."""

    parity: Parity
    errors: dict[str, float]  # by head: the largest, over the largest output that is expected
    outputs: Mapping[str, NDArray[np.float32]]  # (n, ...) by head


@torch.no_grad()
def torch_outputs(model: HumanModel, crops: Crops, mean: tuple[float, ...], std: tuple[float, ...]) -> Outputs:
    """Return the outputs of the unexported model in float32 for uint8 ``crops`` (n, H, W, 3), by name."""
    parts = []
    for chunk in torch.split(torch.from_numpy(crops).permute(0, 3, 1, 2), _BATCH):
        parts.append(head_outputs(model.heads, model.backbone(normalize(chunk, mean, std))))
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def prove_stripped(file: Path, model: nn.Module, before: dict[str, int]) -> Stripped:
    """Count the weights in the written graph; they must be those of ``model`` and nothing else.

    Args:
        file: the written graph.
        model: what was written; its parameters' names begin with the parts that are kept.
        before: the number of values in each part of the network that was trained; all others must be gone.

    Raises:
        ModelFileError: the graph holds another number of weights, or a tensor with a training part's name.
    """
    constants = {name for name, _ in model.named_buffers()}  # such as the places of a grid
    counts = {name: count for name, count in count_parameters(file).items() if name not in constants}
    weights = {name: p.detach().numpy() for name, p in model.named_parameters() if p.numel() > 1}
    kept = {name.split(".")[0] for name in weights}
    left = [name for name in counts if name.split(".")[0] in before.keys() - kept]
    after = sum(counts.values())
    expected = sum({value.tobytes(): value.size for value in weights.values()}.values())  # equal ones once
    if left or after != expected:
        raise ModelFileError(
            f"export left {after} weights in the graph, expected {expected} of the {' and the '.join(sorted(kept))}"
            f"{'; training parts: ' + ', '.join(left) if left else ''}; this is a bug, please report it"
        )
    removed = {part: count for part, count in before.items() if part not in kept and count}
    return Stripped(parameters_before=sum(before.values()), parameters_after=after, removed=removed)


def check_parity(file: Path, crops: Crops, reference: Outputs, tolerance: float) -> Comparison:
    """Run the written file on ``crops``, singly and in batches, against ``reference``.

    Raises:
        ParityError: the largest error of a head over its largest reference value is above ``tolerance``.
    """
    comparison = measure_parity(open_backend(file), crops, reference, tolerance)
    parity = comparison.parity
    if not parity.max_rel_error <= tolerance:  # also when it is not a number
        raise ParityError(
            f"{file.name}: differs from torch by {parity.max_rel_error:.2e} of the largest output of {parity.head!r} "
            f"on {len(crops)} crops, tolerance {tolerance:.0e} ({parity.backend}); nothing was written"
        )
    return comparison


def measure_parity(backend: Backend, crops: Crops, reference: Outputs, tolerance: float) -> Comparison:
    """Run a model on ``crops``, singly and in batches, and compare it with ``reference``."""
    batches = _run(backend, crops, _BATCH)
    single = _run(backend, crops[:4], 1)
    twice = {name: np.concatenate([batches[name], single[name]]) for name in reference}
    expected = {name: np.concatenate([array, array[:4]]) for name, array in reference.items()}
    relative = largest_errors(twice, expected)
    worst = worst_head(relative)
    parity = Parity(
        backend=backend.name,
        images=len(crops),
        max_abs_error=float(np.abs(twice[worst] - expected[worst]).max()),
        max_rel_error=relative[worst],
        min_cosine=min(least_cosines(batches, reference).values()),
        tolerance=tolerance,
        head=worst,
    )
    return Comparison(parity, relative, batches)


def _run(backend: Backend, crops: Crops, batch: int) -> Mapping[str, NDArray[np.float32]]:
    parts = [backend.run({INPUT_NAME: crops[start : start + batch]}) for start in range(0, len(crops), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
