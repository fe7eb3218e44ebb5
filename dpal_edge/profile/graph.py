"""What a model computes: its operators, the block that each belongs to, and what each block has to do at least."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

BEFORE, NORMS, OTHER = "pre/post-processing", "norms", "other"

# Bytes of a value, by the names that ONNX Runtime, numpy and OpenVINO have for its type.
_BYTES = {"float": 4, "f32": 4, "float16": 2, "f16": 2, "bfloat16": 2, "bf16": 2, "double": 8, "f64": 8, "int8": 1,
          "i8": 1, "uint8": 1, "u8": 1, "bool": 1, "boolean": 1, "int32": 4, "i32": 4, "int64": 8, "i64": 8,
          "i4": 0.5, "u4": 0.5}  # fmt: skip
_QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear", "FakeQuantize"})
_PASSING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Cast", "Convert", "Identity", "Split", "Slice"})
_SCALING = frozenset({"Multiply", "Mul", "Add", "Subtract", "Sub"})
_NORM = re.compile(r"LayerNormalization|GroupNormalization|RMS|MVN")
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Convolution", "GroupConvolution", "ConvTranspose",
                       "ConvolutionBackpropData", "Einsum", "ScaledDotProductAttention"})  # fmt: skip

_HEAD = re.compile(r"\bheads\.([^./]+)")
_BLOCK = re.compile(r"\b(?:stages\.(\d+)\.)?blocks\.(\d+)\.(attn|mlp)")
_PATCHES = re.compile(r"\b(?:patches|patch_embed|pos_embed|cls_token)\b")
_MERGING = re.compile(r"\bstages\.(\d+)\.downsample")
_PARTS = {"attn": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Tensor:
    """What flows along an edge."""

    shape: tuple[int, ...]
    type: str  # as the engine spells it

    @property
    def values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def width(self) -> float:
        """How many bytes each of them takes."""
        return _BYTES.get(self.type, 0)


@dataclass(frozen=True)
class Op:
    """One operator of a graph."""

    name: str
    kind: str  # for example "MatMul"
    inputs: tuple[str, ...]  # tensors; empty names are inputs that are left out
    outputs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a group has to do at least for one call; see :meth:`Graph.work`."""

    operations: int
    int8_operations: int
    weight_bytes: float
    activation_bytes: float
    half_weight_bytes: float  # if no weight took more than two bytes


@dataclass(frozen=True)
class Graph:
    """The operators of a model, in an order in which they can run, at one number of images."""

    ops: Sequence[Op]
    tensors: Mapping[str, Tensor]  # where their shapes are known
    constants: frozenset[str]  # tensors that are stored in the file
    outputs: Mapping[str, str]  # name -> tensor
    known: Mapping[str, str] = field(default_factory=dict)  # groups of operators that are known beforehand, by name

    @cached_property
    def producers(self) -> dict[str, Op]:
        """The operator that makes each tensor."""
        return {name: op for op in self.ops for name in op.outputs}

    @cached_property
    def folded(self) -> frozenset[str]:
        """Tensors that do not depend on the images: constants and what is computed of them alone."""
        found = set(self.constants)
        for op in self.ops:
            if op.inputs and all(name in found for name in op.inputs if name):
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def groups(self) -> dict[str, str]:
        """The block that each operator belongs to, by its name: "block 3 MLP", "head pose", "norms", ...

        An operator is of the block that its own name tells; else of the latest one before it, because a bias or an
        activation follows the product that it serves; else of the one that its weights' names tell, or of what reads
        it. What comes before any block prepares images. Norms between blocks are a group of their own, and so is what
        no name tells anything of.
        """
        found: dict[str, str] = {}
        order = {op.name: i for i, op in enumerate(self.ops)}
        for op in self.ops:
            if (group := self._group_forward(op, found, order)) is not None:
                found[op.name] = group
        scoped = bool(set(found.values()) - {NORMS})
        readers = {tensor: {f"head {output}"} for output, tensor in self.outputs.items() if scoped}
        for op in reversed(self.ops):
            if op.name not in found and len(after := {g for name in op.outputs for g in readers.get(name, ())}) == 1:
                [found[op.name]] = after
            for name in op.inputs:
                if op.name in found:
                    readers.setdefault(name, set()).add(found[op.name])
        groups = {op.name: found.get(op.name) or self._group_leftover(op, found, scoped) for op in self.ops}
        return {name: self._head_names.get(group, group) for name, group in groups.items()} if scoped else groups

    def find(self, names: Sequence[str]) -> str | None:
        """Return the group of the first of ``names``, of operators, tensors or modules, that tells one.

        Engines call a kernel after what they made it of, and add to that behind a slash.
        """
        for name in names:
            while name:
                if name in self.groups:
                    return self.groups[name]
                if name in self.producers:
                    return self.groups[self.producers[name].name]
                if (group := scope(name)) is not None:
                    return self._head_names.get(group, group)
                name = name.rpartition("/")[0]
        return None

    def _group_forward(self, op: Op, found: Mapping[str, str], order: Mapping[str, int]) -> str | None:
        if (own := self.known.get(op.name) or scope(op.name)) is not None:
            return own
        before = [self.producers[name] for name in op.inputs if name in self.producers]
        known = [found[p.name] for p in sorted(before, key=lambda p: order[p.name]) if p.name in found]
        follows = next((group for group in reversed(known) if group != NORMS), None)
        stored = next((group for name in op.inputs if name in self.folded and (group := scope(name))), None)
        if _NORM.search(op.kind):
            return next((g for g in (stored, follows) if g and g.startswith("head ")), NORMS)
        if op.kind in _PRODUCTS:
            return stored or follows
        if follows is None and known and op.kind in _SCALING | _QUANTIZING:
            return NORMS  # a norm's own scale and shift, where it is taken apart, and how its result is rounded
        return follows or stored

    def _group_leftover(self, op: Op, found: Mapping[str, str], scoped: bool) -> str:
        seen, wanted = set(), list(op.inputs)
        while wanted:  # does a norm come before it?
            maker = self.producers.get(wanted.pop())
            if maker is None or maker.name in seen:
                continue
            if maker.name in found:
                return NORMS
            seen.add(maker.name)
            wanted.extend(maker.inputs)
        return BEFORE if scoped else OTHER

    @cached_property
    def _head_names(self) -> dict[str, str]:
        """How outputs are called, by the groups that the module's names give: ``heads.reid`` makes "embedding"."""
        names: dict[str, str] = {}
        if self.known:  # which are called so already
            return names
        for output, made in self.outputs.items():
            tensor: str | None = made
            while tensor is not None and (maker := self.producers.get(tensor)) is not None:
                group = self._makers_scope(maker)
                if group is not None:
                    if group.startswith("head "):
                        names.setdefault(group, f"head {output}")
                    break
                tensor = next((name for name in maker.inputs if name not in self.folded), None)
        return names

    def _makers_scope(self, op: Op) -> str | None:
        return scope(op.name) or next((g for name in op.inputs if name in self.folded and (g := scope(name))), None)

    def quantized(self, tensor: str) -> bool:
        """Say whether the values of a tensor are ones that 8 bits hold, however they are typed."""
        maker = self.producers.get(tensor)
        if maker is None:
            return tensor in self.constants and _BYTES.get(self.tensors[tensor].type, 4) <= 1
        if maker.kind in _QUANTIZING:
            return True
        if tensor in self.folded:
            return any(self.quantized(name) for name in maker.inputs if name)
        moving = [name for name in maker.inputs if name and name not in self.folded]
        passing = maker.kind in _PASSING or (maker.kind in ("Multiply", "Subtract") and len(moving) == 1)
        return passing and bool(moving) and self.quantized(moving[0])

    def operations(self, op: Op) -> int:
        """Return two for each multiply-accumulate of a product for one call; nothing else is counted."""
        if op.kind not in _PRODUCTS or any(n not in self.tensors for n in (*op.inputs[:2], op.outputs[0])):
            return 0
        return 2 * _multiplications(op, [self.tensors[n].shape for n in op.inputs if n in self.tensors],
                                    self.tensors[op.outputs[0]].values)  # fmt: skip

    def work(self, group: str) -> Work:
        """Return what the operators of a group have to do at least in one call.

        Operations are two for each multiply-accumulate of matrix products, convolutions and attention. Bytes are those
        of one kernel for the whole group: each weight once, in the width that the file's quantization gives it, and
        the activations that cross the group's border; one byte for each quantized value.
        """
        own = [op for op in self.ops if self.groups[op.name] == group and not set(op.outputs) <= self.folded]
        products = {op.name: self.operations(op) for op in own}
        int8 = sum(products[op.name] for op in own if all(map(self.quantized, op.inputs[:2])))
        read = dict.fromkeys(name for op in own for name in op.inputs if name)
        made = {name for op in own for name in op.outputs}
        inside = {op.name for op in own}
        leaving = {n for op in self.ops if op.name not in inside for n in op.inputs if n in made}
        leaving |= made & set(self.outputs.values())
        entering = [name for name in read if name not in made and name not in self.folded]
        weights = [self._stored(name) for name in read if name in self.folded]
        moved = [self._moved(name) for name in (*entering, *leaving)]
        return Work(
            operations=sum(products.values()),
            int8_operations=int8,
            weight_bytes=sum(values * width for values, width in weights),
            activation_bytes=sum(values * width for values, width in moved),
            half_weight_bytes=sum(values * min(width, 2) for values, width in weights),
        )

    def _moved(self, name: str) -> tuple[int, float]:
        """Return the number of values of a tensor and the bytes of each."""
        tensor = self.tensors.get(name, Tensor((0,), ""))
        return tensor.values, 1 if self.quantized(name) else tensor.width

    def _stored(self, name: str) -> tuple[int, float]:
        """Return the same of a constant, or of the largest that it is computed of."""
        leaves, wanted = [], [name]
        while wanted:
            leaf = wanted.pop()
            if leaf in self.constants:
                leaves.append(self.tensors[leaf])
            elif leaf in self.producers:
                wanted.extend(self.producers[leaf].inputs)
        largest = max(leaves, key=lambda tensor: tensor.values, default=Tensor((0,), ""))
        return largest.values, 1 if self.quantized(name) else largest.width


def scope(name: str) -> str | None:
    """Return the block that the name of a module, a weight or a layer tells; None where it tells none."""
    if match := _HEAD.search(name):
        return f"head {match[1]}"
    if match := _BLOCK.search(name):
        stage = f"stage {match[1]} " if match[1] else ""
        return f"{stage}block {match[2]} {_PARTS[match[3]]}"
    if match := _MERGING.search(name):
        return f"stage {match[1]} merging"
    return "patch embedding" if _PATCHES.search(name) else None


def _multiplications(op: Op, shapes: Sequence[tuple[int, ...]], values: int) -> int:
    """Return the multiply-accumulates of a product: of inputs of these shapes, with so many values as its result."""
    first, second = shapes[:2]
    if op.kind == "ScaledDotProductAttention":  # of (..., L, E) with (..., S, E) and (..., S, V)
        return math.prod(first[:-1]) * second[-2] * (first[-1] + shapes[2][-1])
    if op.kind == "Einsum":
        labels = op.settings["equation"].replace(" ", "").partition("->")[0].split(",")
        sides: dict[str, int] = {}
        for name, shape in zip(labels, shapes, strict=False):
            sides.update(zip(name, shape, strict=True))
        return math.prod(sides.values())
    if op.kind in ("Conv", "Convolution"):  # weights (outputs, inputs of the group, ...)
        return values * math.prod(second[1:])
    if op.kind == "GroupConvolution":  # (groups, outputs, inputs, ...)
        return values * math.prod(second[2:])
    if op.kind in ("ConvTranspose", "ConvolutionBackpropData"):  # (inputs, outputs of the group, ...)
        return math.prod(first) * math.prod(second[1:])
    across = op.settings.get("transA") or op.settings.get("transpose_a")
    return values * (first[-2] if across else first[-1])
