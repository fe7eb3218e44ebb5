"""What can be computed once instead of for every image: the normalisation of pixels, and batch norms."""

import copy

import torch
from torch import Tensor, nn

from dpal_edge.errors import ModelFileError


class FoldedPatches(nn.Module):
    """A patch embedding whose input is what a camera gives: uint8 RGB crops (B, H, W, 3).

    Mean, standard deviation, the scale of 1/255 and the channel order are folded into the kernel, which is exact
    because patches neither overlap nor are padded; it becomes one linear layer on flattened patches.
    """

    def __init__(self, embedding: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if any(getattr(embedding, "padding", (0, 0))):
            raise ModelFileError("its patches reach beyond the image, which no model that is exported does")
        kernel, bias = (embedding.get_parameter(name).detach().double() for name in ("weight", "bias"))
        width, self.patch = kernel.shape[0], kernel.shape[-1]
        scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).view(1, 3, 1, 1)
        offset = (torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
        self.embed = nn.Linear(3 * self.patch**2, width)
        # A patch flattens to (row, column, channel), as the pixels lie in memory.
        self.embed.weight.data = (kernel * scale).permute(0, 2, 3, 1).flatten(1).float()
        self.embed.bias.data = (bias - (kernel * offset).sum((1, 2, 3))).float()

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to patches (B, H / patch, W / patch, width)."""
        rows, columns = images.shape[1] // self.patch, images.shape[2] // self.patch
        x = images.to(self.embed.weight.dtype)
        x = x.reshape(-1, rows, self.patch, columns, self.patch, 3).permute(0, 1, 3, 2, 4, 5)
        embedded: Tensor = self.embed(x.reshape(-1, rows, columns, 3 * self.patch**2))
        return embedded


class Affine(nn.Module):
    """What a batch norm computes in evaluation: one factor and one summand per channel.

    Every engine merges them with a convolution before them; so the graph holds no running means to carry along.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        mean, var = (norm.get_buffer(name).double() for name in ("running_mean", "running_var"))
        factor = norm.weight.detach().double() * (var + norm.eps).rsqrt()
        sides = (-1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (-1,)
        self.factor = nn.Parameter(factor.float().view(sides))
        self.summand = nn.Parameter((norm.bias.detach() - mean * factor).float().view(sides))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C) or (B, C, H, W) to the same shape."""
        return x * self.factor + self.summand


def fold_norms(heads: nn.ModuleDict) -> nn.ModuleDict:
    """Return a copy of heads with an ``Affine`` in place of each batch norm."""
    folded = copy.deepcopy(heads)
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, Affine(child))
    return folded
