"""The optimizers of training and fine-tuning, and what a checkpoint keeps of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dpal_edge.errors import ConfigError


class Together(Optimizer):
    """Optimizers of different parameters that step as one: a scaler skips all of them, or none."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss to evaluate anew
        """Update all parameters."""
        for part in self._parts:
            part.step(closure)


def build_optimizer(
    name: Literal["adamw", "muon"], groups: Sequence[dict[str, Any]], model: nn.Module, betas: tuple[float, float]
) -> Optimizer:
    """Build AdamW, or Muon for the matrices of ``model``'s transformer blocks beside AdamW for all else.

    Muon moves a matrix along its orthogonalised momentum: all its singular directions by about as much. Its step has
    the usual size of AdamW's, so learning rates and weight decays are of one order for both.

    Args:
        name: which of them.
        groups: "params" and what else a group has; the loop sets "lr".
        model: what the parameters are of; linear maps inside ``blocks`` are Muon's.
        betas: of AdamW; Muon's momentum is 0.95, torch's default.

    Raises:
        ConfigError: Muon with a torch that has none.

    Source: Muon, Jordan et al., 2024; the scale 0.2 sqrt(max(rows, columns)), Liu et al., 2025 (arXiv 2502.16982).
    Differs: query, key and value are one matrix. bench/optimizers.py compares both.
    """
    if name == "adamw":
        return AdamW(groups, lr=0.0, betas=betas, fused=True)
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer muon needs torch 2.9 or later, this is {torch.__version__}: take optimizer=adamw")
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n.split(".")]
    matrices = {id(weight) for weight in linear}

    def part(of_matrices: bool) -> list[dict[str, Any]]:
        chosen = [[p for p in group["params"] if (id(p) in matrices) == of_matrices] for group in groups]
        return [{**group, "params": params} for group, params in zip(groups, chosen, strict=True) if params]

    rest = AdamW(part(False), lr=0.0, betas=betas, fused=True)
    if not (of_blocks := part(True)):  # the backbone is frozen
        return rest
    return Together(rest, torch.optim.Muon(of_blocks, lr=0.0, adjust_lr_fn="match_rms_adamw"))


def optimizer_tensors(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``optimizer`` remembers of named parameters as NAME.KEY."""
    return {
        f"{name}.{key}": value
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, named: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` returned; nothing yet where fp16 skipped every update so far."""
    for key, value in saved.items():
        name, _, kind = key.rpartition(".")
        optimizer.state[named[name]][kind] = value.to(named[name].device)
