"""A bundle whose weights stay in the checkpoint: a small graph that reads them from there, and its manifest.

So a model that ships with this package lies in it once, as the checkpoint that fine-tuning goes on from and as what the
runtime runs without torch. ONNX lets an initializer point into any file beside the graph (location, offset, length),
and the tensors of a .safetensors file are plain bytes at known offsets.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.export.bundle import ExportSettings, compute_reference, draft_beside, make_manifest, write_golden
from dpal_edge.export.folding import fold_norms
from dpal_edge.export.onnx import write_onnx
from dpal_edge.export.proof import check_parity
from dpal_edge.export.source import Source, head_outputs, open_source, output_names
from dpal_edge.manifest import Artifact, FileSpec, Manifest, Stripped
from dpal_edge.models.human import HumanModel
from dpal_edge.models.swin import SwinTransformer

GOLDEN_IMAGES = 2  # whole frames are large, and packages should be small
_TYPES = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}
_PARTS = {"backbone": ("backbone", "heads"), "ema": ("ema", "ema_heads")}  # of a checkpoint, by the weights taken
_SMALL = 1000  # values; the graph may hold constants of this size itself, such as what batch norms come to


class LinkedModel(nn.Module):
    """A model on uint8 RGB images (B, H, W, 3) that uses its weights as they are stored, those of batch norms apart."""

    def __init__(self, model: HumanModel, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = model.backbone.config.size
        self.outputs = output_names(model.configs)
        self.backbone, self.heads = model.backbone, fold_norms(model.heads)
        self.register_buffer("shift", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("scale", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (B, H, W, 3) to the outputs, in the order of their names."""
        normalised = (images.permute(0, 3, 1, 2).float() - self.get_buffer("shift")) / self.get_buffer("scale")
        return tuple(head_outputs(self.heads, self.backbone(normalised)).values())


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie in a checkpoint."""

    start: int
    length: int
    dtype: str  # of _TYPES
    transposed: bool = False  # whether the graph wants the matrix transposed


def link(checkpoint: Path, settings: ExportSettings) -> Manifest:
    """Write NAME.onnx, NAME.npz (goldens) and NAME.json (the manifest) beside the checkpoint NAME.safetensors.

    ``Pipeline.open`` and ``ModelDetector.open`` take NAME.json as a bundle. The graph is compared with torch first.

    Raises:
        ConfigError: another size than the checkpoint's is asked for, or the backbone is a Swin.
        DataError: no real images to compare on, or the folder cannot be written.
        ModelFileError: the checkpoint cannot be read, or stores weights in a type that no graph reads.
        ParityError: the graph differs from torch by more than the tolerance; nothing is written.
    """
    source = open_source(checkpoint, settings.weights)
    path, size = source.path, source.model.backbone.config.size
    if settings.size not in (None, size):
        raise ConfigError(f"size {settings.size}: weights that stay in {path.name} serve its own size, {size}, only")
    if isinstance(source.model.backbone, SwinTransformer):
        raise ConfigError(f"{path}: a Swin's position biases are not stored as a graph needs them; export a bundle")
    crops, reference = compute_reference(source, settings)
    with draft_beside(path) as draft:
        shutil.copyfile(path, draft / path.name)  # a graph may read from files beside it only
        graph = draft / f"{path.stem}.onnx"
        _write_graph(source, graph)
        parity = check_parity(graph, crops, reference, settings.tolerance)
        artifact = Artifact(
            target="onnx", precision="float32", file=FileSpec.of(graph), parity=parity, data=(FileSpec.of(path),)
        )
        golden = write_golden(draft / f"{path.stem}.npz", crops, reference, GOLDEN_IMAGES)
        manifest = make_manifest(source, reference, (artifact,), golden, _strip(source))
        written = manifest.write(draft / f"{path.stem}.json")
        for file in (graph, draft / golden.file, written):  # the manifest last: until then no bundle is there
            file.replace(path.with_name(file.name))
    return manifest


def _strip(source: Source) -> Stripped:
    """Count the parts of the checkpoint that the graph does not read."""
    before = source.parameters
    removed = {part: count for part, count in before.items() if part not in source.kept and count}
    after = sum(parameter.numel() for parameter in source.model.parameters())
    return Stripped(parameters_before=sum(before.values()), parameters_after=after, removed=removed)


def _write_graph(source: Source, path: Path) -> None:
    """Write the graph, then have it read from the checkpoint whatever is stored there."""
    model = LinkedModel(source.model, source.mean, source.std)
    write_onnx(model, path, size=model.size, outputs=model.outputs)
    proto = onnx.load(path)
    places = _find_places(source)
    constants = {name for name, _ in model.named_buffers()}
    initializers, nodes = [], []
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        place = places.get(array.tobytes())
        if place is not None and array.size > 1:
            external, made = _point(tensor, place, source.path.name)
            initializers.append(external)
            nodes += made
        elif array.size <= _SMALL or tensor.name in constants:
            initializers.append(tensor)
        else:
            raise ModelFileError(
                f"{source.path}: the graph wants {tensor.name} {array.shape}, which is not stored in it; this is a "
                f"bug, please report it"
            )
    nodes += proto.graph.node
    proto.graph.ClearField("initializer")
    proto.graph.ClearField("node")
    proto.graph.initializer.extend(initializers)
    proto.graph.node.extend(nodes)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _find_places(source: Source) -> dict[bytes, _Place]:
    """Find every tensor of the model in its checkpoint, by its content in float32, and every matrix transposed."""
    with source.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    parts = dict(zip(("backbone", "heads"), _PARTS[source.metadata["weights"]], strict=True))
    places: dict[bytes, _Place] = {}
    for name, tensor in source.model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        part, _, rest = name.partition(".")
        entry = header[f"{parts[part]}.{rest}"]
        if entry["dtype"] not in _TYPES:
            raise ModelFileError(
                f"{source.path}: {name} is stored as {entry['dtype']}, expected {' or '.join(_TYPES)}; save it as one"
            )
        start, end = entry["data_offsets"]
        place = _Place(8 + length + start, end - start, entry["dtype"])
        places[tensor.numpy().tobytes()] = place
        if tensor.ndim == 2:
            places.setdefault(tensor.numpy().T.tobytes(), replace(place, transposed=True))
    return places


def _point(tensor: TensorProto, place: _Place, file: str) -> tuple[TensorProto, list[onnx.NodeProto]]:
    """Return an initializer that lies in ``file``, and the nodes that turn it into ``tensor``.

    Engines run these nodes once, when they load the graph.
    """
    steps = [("Transpose", {"perm": [1, 0]})] * place.transposed
    steps += [("Cast", {"to": TensorProto.FLOAT})] * (place.dtype != "F32")
    names = [f"{tensor.name}.{i}" for i in range(len(steps))] + [tensor.name]
    dims = reversed(tensor.dims) if place.transposed else tensor.dims
    external = TensorProto(name=names[0], data_type=_TYPES[place.dtype], dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", place.start), ("length", place.length)):
        external.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node(operator, [names[i]], [names[i + 1]], **settings)
        for i, (operator, settings) in enumerate(steps)
    ]
    return external, nodes
