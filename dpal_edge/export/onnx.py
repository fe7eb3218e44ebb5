"""The exported graph: uint8 crops in, one raw output per head, nothing of the training left."""

import math
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dpal_edge.models.vit import VisionTransformer, resize_positions

OPSET = 20  # the first with Gelu as one operator, the last that TensorRT 10's parser reads
INPUT_NAME = "images"


class ExportedModel(nn.Module):
    """A student whose input is what a camera gives: uint8 RGB crops (B, H, W, 3).

    Mean, standard deviation, the scale of 1/255 and the channel order are folded into the patch embedding, which is
    exact because patches neither overlap nor are padded; it becomes one linear layer on flattened patches. The
    position embedding is baked for one size. Returns the final-norm class token, (B, width): the embedding.
    """

    def __init__(
        self, backbone: VisionTransformer, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        config = backbone.config
        self.patch = config.patch_size
        self.grid = (size[0] // self.patch, size[1] // self.patch)
        kernel, bias = (backbone.get_parameter(f"patch_embed.proj.{name}").detach() for name in ("weight", "bias"))
        scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).view(1, 3, 1, 1)
        offset = (torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)).view(1, 3, 1, 1)
        self.embed = nn.Linear(3 * self.patch**2, config.width)
        # A patch flattens to (row, column, channel), as the pixels lie in memory.
        self.embed.weight.data = (kernel.double() * scale).permute(0, 2, 3, 1).flatten(1).float()
        self.embed.bias.data = (bias.double() - (kernel.double() * offset).sum((1, 2, 3))).float()
        positions = resize_positions(backbone.pos_embed.detach(), config.grid, self.grid, config.pos_interp)
        self.cls = nn.Parameter(backbone.cls_token.detach() + positions[:, :1])
        self.positions = nn.Parameter(positions[:, 1:].clone())
        self.blocks = backbone.blocks
        self.norm = backbone.norm

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to embeddings (B, width)."""
        rows, columns = self.grid
        x = images.to(self.embed.weight.dtype)
        x = x.reshape(-1, rows, self.patch, columns, self.patch, 3).permute(0, 1, 3, 2, 4, 5)
        x = self.embed(x.reshape(-1, rows * columns, 3 * self.patch**2)) + self.positions
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        # Only the class token leaves, so only it is normalised.
        normed: Tensor = self.norm(x[:, 0])
        return normed


def write_onnx(model: ExportedModel, path: Path, *, size: tuple[int, int], outputs: list[str]) -> None:
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
