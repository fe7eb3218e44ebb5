"""The exported graph: uint8 images in, one raw output per head, nothing of the training left."""

import copy
import math
from collections import Counter
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dpal_edge.export.folding import FoldedPatches, fold_norms
from dpal_edge.export.linears import Graph
from dpal_edge.export.source import head_outputs, output_names
from dpal_edge.models.human import HumanModel
from dpal_edge.models.swin import STEM, SwinTransformer, WindowAttention
from dpal_edge.models.vit import VisionTransformer

OPSET = 20  # the first with Gelu as one operator, the last that TensorRT 10's parser reads
INPUT_NAME = "images"
_NOT_WEIGHTS = {"Resize": slice(1, None)}  # inputs of an operator that are its settings


class ExportedModel(nn.Module):
    """What is exported of a model: uint8 RGB images (B, H, W, 3) of its size in, raw outputs of its heads out."""

    def __init__(self, model: HumanModel, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Fold what can be computed once.

        Args:
            model: in eval mode; not changed.
            mean: of the images that it was trained on, RGB in 0..1.
            std: likewise.
        """
        super().__init__()
        backbone = model.backbone
        self.size = backbone.config.size
        self.outputs = output_names(model.configs)
        if isinstance(backbone, SwinTransformer):
            self.backbone: nn.Module = ExportedSwin(backbone, mean, std)
        else:
            self.backbone = ExportedViT(backbone, mean, std)
        self.heads = fold_norms(model.heads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (B, H, W, 3) to the outputs, in the order of their names."""
        return tuple(head_outputs(self.heads, self.backbone(images)).values())


class ExportedViT(nn.Module):
    """A ViT on raw images, its positions baked in for one size; returns the final-norm tokens."""

    def __init__(self, backbone: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.patches = FoldedPatches(backbone.patch_embed["proj"], mean, std)
        self.vit = copy.deepcopy(backbone)
        del self.vit.patch_embed
        positions = backbone.pos_embed.detach().clone()
        if backbone.cls_token is not None:
            self.vit.cls_token = nn.Parameter(backbone.cls_token.detach() + positions[:, :1])
            positions = positions[:, 1:].clone()
        self.vit.pos_embed = nn.Parameter(positions)  # of the patches alone

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to tokens (B, 1 + N, width)."""
        x = self.patches(images).flatten(1, 2) + self.vit.pos_embed
        if self.vit.cls_token is not None:
            x = torch.cat([self.vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.vit.finish(self.vit.run_blocks(x))


class ExportedSwin(nn.Module):
    """A Swin on raw images; returns the mean of the final map and its tokens.

    The position biases are baked for one size, shift mask included, so no runtime has to compute them. They replace
    their small tables and are counted as the weights that they are in the file: 1.4 M more for a Swin-T at 256x128.
    """

    def __init__(self, backbone: SwinTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.patches = FoldedPatches(backbone.patch_embed["proj"], mean, std)
        self.patch_norm = backbone.patch_embed["norm"]
        self.stages = copy.deepcopy(backbone.stages)
        self.norm = backbone.norm
        for i, stage in enumerate(self.stages):
            rows, columns = (math.ceil(side / (STEM << i)) for side in backbone.config.size)
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.position_bias = _Baked(module.position_bias(*module.windows(rows, columns)))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, H, W, 3) to tokens (B, 1 + N, width)."""
        x = self.patch_norm(self.patches(images))
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x).flatten(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], dim=1)


class _Baked(nn.Module):
    """The value of a PositionBias for one number of windows."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        # Attention with a mask that needs gradients would be traced on another path than it is lowered on.
        self.value = nn.Parameter(value.detach().contiguous(), requires_grad=False)

    def forward(self, down: int, across: int) -> Tensor:
        return self.value


def write_onnx(
    model: nn.Module, path: Path, *, size: tuple[int, int], outputs: tuple[str, ...], optimize: bool = True
) -> None:
    """Write ``model`` to ``path`` with a dynamic batch and static ``size`` (height, width).

    ``optimize`` folds constants and drops what does nothing; without it, each weight stays as the module has it.
    """
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    torch.onnx.export(
        model.eval(),
        (example,),
        path,
        input_names=[INPUT_NAME],
        output_names=list(outputs),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        optimize=optimize,
        verbose=False,
    )
    written = onnx.load(path)
    _remove_notes(written)
    _name_layers(written, model)
    path.write_bytes(written.SerializeToString(deterministic=True))


def _remove_notes(written: onnx.ModelProto) -> None:
    """Remove the exporter's notes, a stack trace for each node, and the shapes in between, which engines infer."""
    graph = written.graph
    for part in (written, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
    graph.ClearField("value_info")


def _name_layers(written: onnx.ModelProto, model: nn.Module) -> None:
    """Call each layer what the module calls it, so that reports and compilers speak of ``blocks.3.mlp.fc1``."""
    names: dict[bytes, str] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        for array in (value, value.T) if value.ndim == 2 else (value,):
            names.setdefault(array.tobytes(), name.removesuffix(".weight").replace(".vit.", "."))
    used: Counter[str] = Counter()
    graph = Graph(written)
    for layer in graph.linears():
        content = numpy_helper.to_array(graph.constants[layer.weight.source]).tobytes()
        if (found := names.get(content)) is not None:
            layer.node.name = f"{found}.{used[found]}" if used[found] else found  # some serve several levels
            used[found] += 1


def count_parameters(path: Path) -> dict[str, int]:
    """Return the number of values of each distinct weight in the ONNX file at ``path``, by name.

    Weights are floating-point initializers of more than one value; single values are constants of the operators, and
    so are factors of a resize. Equal tensors count once, because the exporter merges some of them.
    """
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    graph = onnx.load(path).graph
    settings = {name for node in graph.node for name in node.input[_NOT_WEIGHTS.get(node.op_type, slice(0))]}
    distinct: dict[bytes, tuple[str, int]] = {}
    for tensor in graph.initializer:
        if tensor.data_type in floats and math.prod(tensor.dims) > 1 and tensor.name not in settings:
            distinct.setdefault(numpy_helper.to_array(tensor).tobytes(), (tensor.name, math.prod(tensor.dims)))
    return dict(distinct.values())
