"""Muon beside AdamW: which parameters each moves, how far, and that they skip an overflow together."""

import pytest
import torch
from torch import nn

from dpal_edge.errors import ConfigError
from dpal_edge.models.vit import VisionTransformer, ViTConfig, init_student
from dpal_edge.train.optimizer import build_optimizer

RATE = 1e-3


@pytest.fixture
def vit():
    model = VisionTransformer(ViTConfig(size=(32, 16), width=24, depth=2, heads=2, last_heads=2))
    init_student(model, torch.Generator().manual_seed(0))
    return model


def build(name: str, model: nn.Module):
    optimizer = build_optimizer(name, [{"params": list(model.parameters()), "weight_decay": 0.0}], model, (0.9, 0.999))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return optimizer


def moves(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return how far one update moves each parameter."""
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = build(name, model)
    model(torch.randn(32, 3, 32, 16, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {key: value.detach() - before[key] for key, value in model.named_parameters()}


def directions(matrix: torch.Tensor) -> float:
    """Return how many directions a matrix moves along: its stable rank."""
    values = torch.linalg.svdvals(matrix)
    return float(values.square().sum() / values[0] ** 2)


def test_muon_moves_matrices_of_blocks_in_all_directions_alike_and_the_rest_as_adamw(vit):
    other = VisionTransformer(vit.config)
    other.load_state_dict(vit.state_dict())
    found, expected = moves("muon", vit), moves("adamw", other)
    matrices = {name for name, value in found.items() if name.startswith("blocks.") and value.ndim == 2}
    assert len(matrices) == 2 * 4
    for name, moved in found.items():
        if name not in matrices:
            torch.testing.assert_close(moved, expected[name])
            continue
        # Newton-Schulz leaves singular values of at most about 1.2; the scale is that of AdamW's usual step.
        assert 0.7 < torch.linalg.matrix_norm(moved, 2) / (RATE * 0.2 * max(moved.shape) ** 0.5) < 1.3
        assert directions(moved) > 2 * directions(expected[name])


def test_an_overflow_in_a_matrix_stops_both(vit):
    optimizer, scaler = build("muon", vit), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = {name: value.detach().clone() for name, value in vit.named_parameters()}
    scaler.scale(vit(torch.randn(2, 3, 32, 16)).square().mean()).backward()
    vit.blocks[0].mlp.fc1.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(value, before[name]) for name, value in vit.named_parameters())


def test_without_blocks_to_train_muon_is_adamw():
    assert isinstance(build("muon", nn.Linear(2, 2)), torch.optim.AdamW)


def test_a_torch_without_muon_is_named(vit, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs torch 2\.9 or later, this is .*: take optimizer=adamw"):
        build("muon", vit)
