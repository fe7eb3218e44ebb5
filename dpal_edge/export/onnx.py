"""The exported graph: uint8 crops in, one raw output per head, nothing of the training left."""

import copy
import math
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dpal_edge.models.students import Student
from dpal_edge.models.swin import STEM, SwinTransformer, WindowAttention
from dpal_edge.models.vit import VisionTransformer, resize_positions

OPSET = 20  # the first with Gelu as one operator, the last that TensorRT 10's parser reads
INPUT_NAME = "images"


def exported_model(
    backbone: Student, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> nn.Module:
    """Return what is exported of ``backbone``: uint8 RGB crops (B, H, W, 3) of one size in, (B, width) embeddings out.

    Args:
        backbone: the student; not changed.
        size: height and width of the crops.
        mean: of the images that the student was trained on, RGB in 0..1.
        std: likewise.
    """
    if isinstance(backbone, SwinTransformer):
        return ExportedSwin(backbone, size, mean, std)
    return ExportedViT(backbone, size, mean, std)


class FoldedPatches(nn.Module):
    """A patch embedding whose input is what a camera gives: uint8 RGB crops (B, H, W, 3).

    Mean, standard deviation, the scale of 1/255 and the channel order are folded into the kernel, which is exact
    because patches neither overlap nor are padded; it becomes one linear layer on flattened patches.
    """

    def __init__(self, embedding: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
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


class ExportedViT(nn.Module):
    """A ViT on raw crops, its position embedding baked for one size; returns the final-norm global token."""

    def __init__(
        self, backbone: VisionTransformer, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        config = backbone.config
        self.patches = FoldedPatches(backbone.patch_embed["proj"], mean, std)
        grid = (size[0] // config.patch_size, size[1] // config.patch_size)
        positions = resize_positions(backbone.pos_embed.detach(), config.grid, grid, config.pos_interp)
        self.cls = None
        if backbone.cls_token is not None:
            self.cls = nn.Parameter(backbone.cls_token.detach() + positions[:, :1])
            positions = positions[:, 1:].clone()
        self.positions = nn.Parameter(positions)
        self.blocks = backbone.blocks
        self.norm = backbone.norm

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to embeddings (B, width)."""
        x = self.patches(images).flatten(1, 2) + self.positions
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        # Only the class token leaves, so only it is normalised.
        embedding: Tensor = self.norm(x[:, 0]) if self.cls is not None else self.norm(x).mean(1)
        return embedding


class ExportedSwin(nn.Module):
    """A Swin on raw crops; returns the mean of the final map.

    The position biases are baked for one size, shift mask included, so no runtime has to compute them. They replace
    their small tables and are counted as the weights that they are in the file: 1.4 M more for a Swin-T at 256x128.
    """

    def __init__(
        self, backbone: SwinTransformer, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.patches = FoldedPatches(backbone.patch_embed["proj"], mean, std)
        self.patch_norm = backbone.patch_embed["norm"]
        self.stages = copy.deepcopy(backbone.stages)
        self.norm = backbone.norm
        for i, stage in enumerate(self.stages):
            rows, columns = (math.ceil(side / (STEM << i)) for side in size)
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.position_bias = _Baked(module.position_bias(*module.windows(rows, columns)))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to embeddings (B, width)."""
        x = self.patch_norm(self.patches(images))
        for stage in self.stages:
            x = stage(x)
        embedding: Tensor = self.norm(x).mean((1, 2))
        return embedding


class _Baked(nn.Module):
    """The value of a PositionBias for one number of windows."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        # Attention with a mask that needs gradients would be traced on another path than it is lowered on.
        self.value = nn.Parameter(value.detach().contiguous(), requires_grad=False)

    def forward(self, down: int, across: int) -> Tensor:
        return self.value


def write_onnx(model: nn.Module, path: Path, *, size: tuple[int, int], outputs: list[str]) -> None:
    """Write ``model`` to ``path`` with a dynamic batch and static ``size`` (height, width)."""
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    torch.onnx.export(
        model.eval(),
        (example,),
        path,
        input_names=[INPUT_NAME],
        output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def count_parameters(path: Path) -> dict[str, int]:
    """Return the number of values of each distinct weight in the ONNX file at ``path``, by name.

    Weights are floating-point initializers of more than one value; single values are constants of the operators. Equal
    tensors count once, because the exporter merges some of them.
    """
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    distinct: dict[bytes, tuple[str, int]] = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in floats and math.prod(tensor.dims) > 1:
            distinct.setdefault(numpy_helper.to_array(tensor).tobytes(), (tensor.name, math.prod(tensor.dims)))
    return dict(distinct.values())
