"""Published weights of teachers, told apart by the names of their tensors and put under this project's names.

Where a layout has a known publisher, licence and limits are those stated when this was written. A layout cannot prove
where weights come from, and licences change: users must check their own files.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpal_edge.errors import ConfigError, ModelFileError
from dpal_edge.models.checkpoint import flatten_published, split_dpal
from dpal_edge.models.swin import rename_swin
from dpal_edge.models.teacher_spec import SAPIENS_MEAN, SAPIENS_STD, Rgb, TeacherSpec
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, PosInterp

RE_IDENTIFICATION = 0.2  # SOLIDER's weight for it; the default, since that is what a Swin beside a ViT is best at
_DPAL_POSITIONS = ((1, 129, 192), (1, 129, 384))  # of ViT-T and ViT-S at 256x128
_DPAL_HEADS = 6, 12
_SAPIENS_HEADS = {1536: (24, 24), 1920: (32, 32)}  # where others of this width have other numbers, or are unknown
_SHAPES = ((1, 1), (2, 1), (3, 2), (4, 3), (3, 1))  # rows to columns of usual inputs; 192 patches fit the last two
# Sapiens' name -> ours, in order.
_SAPIENS_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Who publishes weights in a layout, under what terms, and what they must be fed."""

    name: str
    licence: str = "unknown"
    limits: str = ""  # of use, in one sentence
    note: str = ""  # what a user should know; {before_last} stands for the number of the last block but one
    mean: Rgb = IMAGENET_MEAN  # of RGB in 0..1
    std: Rgb = IMAGENET_STD


_OPEN_RAIL = "The openrail licence of the weights forbids the uses that it lists."
_NON_COMMERCIAL = "Non-commercial use only."
_SAPIENS2 = "The Sapiens2 licence bars surveillance, biometric identification and re-identification."
_DINOV3 = "The DINOv3 licence has terms of its own, on redistribution and forbidden uses among others."
# Part of a licence's short name -> what it bars.
_BARRED = {
    "sapiens2": _SAPIENS2,
    "-nc": _NON_COMMERCIAL,
    "noncommercial": _NON_COMMERCIAL,
    "dinov3": _DINOV3,
    "openrail": _OPEN_RAIL,
}

PATH = Family(
    name="PATH ViT, as released by OpenGVLab for HumanBench",
    licence="code MIT, weights openrail",
    limits=_OPEN_RAIL,
    note="by the authors' code the last block and the final norm are not trained: compare with layer={before_last}",
)
PLAIN = Family(
    name="plain ViT in timm's names",
    note="PATH converted with a class token looks like this as well: its last block and final norm are not trained, "
    "compare with layer={before_last}",
)
SCALED = Family(name="ViT with layer scale in timm's names")
DPAL = Family(name="DPAL student, as released by its authors", licence="apache-2.0 (weights; the code has no licence)")
DINOV2 = Family(name="DINOv2 ViT, as released by Meta", licence="apache-2.0")
DINOV3 = Family(name="DINOv3 ViT, as released by Meta", licence="dinov3-license", limits=_DINOV3)
SAPIENS = Family(
    name="Sapiens v1 ViT, as released by Meta",
    licence="cc-by-nc-4.0",
    limits=_NON_COMMERCIAL,
    mean=SAPIENS_MEAN,
    std=SAPIENS_STD,
)
SOLIDER = Family(
    name="SOLIDER Swin, as released by Alibaba",
    licence="apache-2.0",
    note="its authors take semantic=0.2 for re-identification, 0.8 for attributes and parsing, 1 for detection",
)
SWIN = Family(
    name="Swin in SOLIDER's names",
    note="without its wrapper it may be DPAL's student or SOLIDER's: for SOLIDER give semantic=W",
)


def licence_limits(licence: str) -> str:
    """Return what a licence, by its short name, bars; nothing if it is not known to bar anything."""
    return next((limits for part, limits in _BARRED.items() if part in licence.lower()), "")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a published file holds: tensors, and what is known of the architecture around them."""

    kind: Literal["vit", "swin", "timm"]
    family: Family
    state: dict[str, Tensor]  # in our names; for kind timm as published, which timm translates
    entry: str = ""  # dictionary of the file that they were in; empty for the file itself
    fields: dict[str, Any] = field(default_factory=dict)  # known of ViTConfig, or to be given to timm.create_model
    timm: str = ""  # name of timm's architecture
    heads: tuple[int, int] | None = None  # of most blocks, of the last; None is what is usual for the width
    semantic: float | None = None  # SOLIDER's weight, None without modulation


@dataclass(frozen=True)
class _Published:
    """A file's weights on the way to ``Weights``."""

    spec: TeacherSpec
    entry: str
    flat: dict[str, Tensor]  # all tensors
    state: dict[str, Tensor]  # of the backbone, without its prefix
    raw_path: bool  # came under the prefix of PATH's training code

    @property
    def of_dpal(self) -> bool:
        """Whether a decoder of DPAL, or the second norm that only its student has, is there."""
        return _has_dpal(self.flat)


def recognise(loaded: dict[str, Any], spec: TeacherSpec) -> Weights:
    """Tell the layout of what ``read_tensors`` gave by its keys, and translate it.

    Layouts: PATH (raw, converted, flat), DPAL's students, DINOv2 (registers as well), DINOv3, Sapiens v1, SOLIDER's
    Swin, and any plain ViT in timm's names.

    Raises:
        ConfigError: an option of ``spec`` that means nothing for the layout.
        ModelFileError: no such entry, a number of positions whose grid is open, a tensor that is missing or misshapen,
            or Sapiens2.
    """
    entry, flat = unwrap(loaded, spec)
    raw_path = any("backbone_module." in key for key in (loaded[entry] if entry else loaded))
    published = _Published(spec, entry, flat, split_dpal(flat)[0], raw_path)
    read = next((reader for key, reader in _READERS.items() if key in published.state), _read_plain)
    try:
        return read(published)
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        what = read.__name__.removeprefix("_read_")
        raise ModelFileError(f"{spec.file}: named like {what}, but {error} is missing or misshapen") from error


def unwrap(loaded: dict[str, Any], spec: TeacherSpec) -> tuple[str, dict[str, Tensor]]:
    """Return the entry of a published file that holds the weights, and its tensors without wrapper prefixes.

    The entry is empty for the file itself. Where there are both ``teacher`` and ``student``, the running mean
    ``teacher`` is what authors use (DINO, SOLIDER), but for DPAL, which releases ``student``.

    Raises:
        ModelFileError: no such entry.
    """
    nests = {name: value for name, value in loaded.items() if isinstance(value, dict)}
    order = ("student" if _has_dpal(nests.get("student", {})) else "teacher", "student", "model", "state_dict")
    entry = spec.entry or next((name for name in order if name in nests), "")
    if entry and entry not in nests:
        raise ModelFileError(f"{spec.file}: has no entry {entry!r}; its dictionaries are {', '.join(nests) or 'none'}")
    return entry, flatten_published(loaded, entry or None)


def _has_dpal(state: dict[str, Any]) -> bool:
    return any("adapter." in key or "inter_norm." in key for key in state)


def _read_plain(published: _Published) -> Weights:
    spec, state = published.spec, dict(published.state)
    spec.refuse_others({"heads", "stored", "entry", "resize", "cls"}, "a plain ViT")
    separate = state.pop("cls_token_pos_embed", None)
    if separate is not None:
        state["pos_embed"] = torch.cat([separate, state["pos_embed"]], dim=1)
    stray = separate is None and _is_stray(state, spec)  # PATH's converter copies one out of a file of MAE
    if stray:
        del state["cls_token"]
    family = _plain_family(published, from_path=published.raw_path or separate is not None or stray)
    of_dpal = family.name == DPAL.name
    return Weights(
        kind="vit",
        family=family,
        state=_without_class_token(state, spec),
        entry=published.entry,
        fields=_vit_fields(state, spec, "1d" if of_dpal else "2d-dino"),
        heads=_DPAL_HEADS if of_dpal else None,
    )


def _plain_family(published: _Published, *, from_path: bool) -> Family:
    state, heads = published.state, published.spec.heads
    if published.of_dpal:
        return DPAL
    shape = tuple(state["pos_embed"].shape) if "pos_embed" in state else ()
    if shape in _DPAL_POSITIONS and heads in (None, _DPAL_HEADS):  # its bare backbone has nothing else to be known by
        return replace(
            DPAL,
            note=f"taken for a student of DPAL (heads=6+12, resize=1d, its licence) by its {shape[1]} positions alone; "
            f"if it is another ViT of 256x128, give heads={shape[2] // 64}&resize=2d",
        )
    if from_path:
        return PATH
    if "blocks.0.ls1.gamma" in state:
        return DINOV2 if "mask_token" in state else SCALED
    return PLAIN


def _read_sapiens(published: _Published) -> Weights:
    spec = published.spec
    spec.refuse_others({"heads", "stored", "entry", "resize", "cls", "padding"}, "a Sapiens ViT")
    state = {}
    for key, value in published.state.items():
        for theirs, ours in _SAPIENS_NAMES:
            key = re.sub(theirs, ours, key)
        state[key] = value
    # Pretraining has a class token and no padding; the authors' downstream models have padding and no class token.
    padding = (0 if "cls_token" in state else 2) if spec.padding is None else spec.padding
    return Weights(
        kind="vit",
        family=SAPIENS,
        state=_without_class_token(state, spec),
        entry=published.entry,
        fields={**_vit_fields(state, spec, "2d", _SHAPES[:-1]), "patch_padding": padding},
        heads=_SAPIENS_HEADS.get(state["pos_embed"].shape[-1]) if "pos_embed" in state else None,
    )


def _read_swin(published: _Published) -> Weights:
    spec = published.spec
    spec.refuse_others({"entry", "semantic"}, "a Swin")
    modulated = "semantic_embed_w.0.weight" in published.state
    wrapped = "backbone.stages.0.blocks.0.norm1.weight" in published.flat
    family = DPAL if published.of_dpal else SOLIDER if modulated and wrapped else SWIN
    default = RE_IDENTIFICATION if family is SOLIDER else None  # DPAL's student has the layers and leaves them out
    semantic = spec.semantic if "semantic" in spec.given else default
    if semantic is not None and not modulated:
        raise ConfigError(f"teacher {spec.text!r}: semantic={semantic} needs SOLIDER's semantic_embed, which it lacks")
    return Weights(
        kind="swin", family=family, state=rename_swin(published.state), entry=published.entry, semantic=semantic
    )


def _read_dinov2(published: _Published) -> Weights:
    """Read what a plain ViT lacks: registers (ViT-S to -G), or the gated MLP of ViT-G."""
    spec, state = published.spec, published.state
    spec.refuse_others({"entry", "stored"}, "a DINOv2 ViT with registers or gates")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    gated = "blocks.0.mlp.w12.weight" in state
    name = f"vit_{'giant' if gated else 'small'}_patch14_{'reg4_' if registers else ''}dinov2"
    grid = _grid_of(state["pos_embed"].shape[1] - 1, spec, patch := _patch(state))
    fields = {"patch_size": patch, "img_size": (grid[0] * patch, grid[1] * patch)}
    return Weights(
        kind="timm",
        family=DINOV2,
        state={"mask_token": torch.zeros(1), **state},  # which tells timm the layout
        entry=published.entry,
        timm=name,
        fields={
            **_sizes(state, "w12" if gated else "fc1"),
            **fields,
            **({"reg_tokens": registers} if registers else {}),
        },
    )


def _read_dinov3(published: _Published) -> Weights:
    spec, state = published.spec, published.state
    spec.refuse_others({"entry"}, "a DINOv3 ViT")
    gated = "blocks.0.mlp.w1.weight" in state
    biased = "blocks.0.attn.qkv.bias" in state
    sizes = _sizes(state, "w1" if gated else "fc1")
    if "rope_embed.periods" in state:  # four numbers of a head turn by each period
        sizes["num_heads"] = sizes["embed_dim"] // (4 * state["rope_embed.periods"].numel())
    return Weights(
        kind="timm",
        family=DINOV3,
        state=state,
        entry=published.entry,
        timm=f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if biased else ''}",
        fields={**sizes, "patch_size": _patch(state), "num_reg_tokens": state["storage_tokens"].shape[1]},
    )


def _refuse_sapiens2(published: _Published) -> Weights:
    raise ModelFileError(f"{published.spec.file}: Sapiens2 is not supported as a teacher. {_SAPIENS2}")


# What only one layout has -> who reads it; the first that is there counts.
_READERS: dict[str, Callable[[_Published], Weights]] = {
    "blocks.0.attn.wq.weight": _refuse_sapiens2,
    "stages.0.blocks.0.norm1.weight": _read_swin,
    "layers.0.ln1.weight": _read_sapiens,
    "storage_tokens": _read_dinov3,
    "register_tokens": _read_dinov2,
    "blocks.0.mlp.w12.weight": _read_dinov2,
}


def _sizes(state: dict[str, Tensor], first: str) -> dict[str, Any]:
    """Return the sizes of timm's ViT whose MLPs begin with the linear layer ``first``."""
    hidden, width = state[f"blocks.0.mlp.{first}.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d{1,3}\.", key, re.ASCII))
    # Half a channel more, because timm rounds the product of ratio and width down.
    return {"embed_dim": width, "depth": depth, "num_heads": width // 64 or 1, "mlp_ratio": (hidden + 0.5) / width}


def _vit_fields(
    state: dict[str, Tensor], spec: TeacherSpec, resize: PosInterp, shapes: tuple[tuple[int, int], ...] = _SHAPES
) -> dict[str, Any]:
    """Return what is known of a ViTConfig, ``state`` being in its names but for a class token to be left out."""
    if not {"pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return {}  # not a ViT, which infer_vit says
    count, patch = state["pos_embed"].shape[1] - ("cls_token" in state), _patch(state)
    rows, columns = _grid_of(count, spec, patch, shapes)
    return {"size": (rows * patch, columns * patch), "pos_interp": spec.resize or resize}


def _without_class_token(state: dict[str, Tensor], spec: TeacherSpec) -> dict[str, Tensor]:
    """Leave the class token and its position out if ``spec`` says so."""
    if spec.class_token or not {"cls_token", "pos_embed"} <= state.keys():
        return state
    return {key: value[:, 1:] if key == "pos_embed" else value for key, value in state.items() if key != "cls_token"}


def _is_stray(state: dict[str, Tensor], spec: TeacherSpec) -> bool:
    """Say whether ``state`` has a class token without a position, so that its network has none."""
    if not {"cls_token", "pos_embed"} <= state.keys():
        return False
    count = state["pos_embed"].shape[1]
    if spec.stored is not None:
        return count == math.prod(side // _patch(state) for side in spec.stored)
    likely = _SHAPES[:2]
    if _grids(count - 1, likely) or not _grids(count, likely):
        return False
    if _grids(count - 1, _SHAPES):
        raise ModelFileError(
            f"{spec.file}: {count} positions may have one of the class token among them or not; give the image size "
            f"that they are stored for, as in {spec.file}?stored=256x128"
        )
    return True


def _grids(count: int, shapes: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Return the grids (rows, columns) of ``count`` patches in one of ``shapes``."""
    sides = [(rows, columns, math.isqrt(max(count, 0) // (rows * columns))) for rows, columns in shapes]
    grids = [(rows * side, columns * side) for rows, columns, side in sides]
    return [grid for grid in grids if math.prod(grid) == count > 0]


def _grid_of(
    count: int, spec: TeacherSpec, patch: int, shapes: tuple[tuple[int, int], ...] = _SHAPES
) -> tuple[int, int]:
    """Return rows and columns of the stored positions: as ``spec`` says, or the one grid in ``shapes``."""
    if spec.stored is not None:
        grid = spec.stored[0] // patch, spec.stored[1] // patch
        if math.prod(grid) != count:
            raise ModelFileError(
                f"{spec.file}: {count} positions do not fit stored={spec.stored[0]}x{spec.stored[1]}, whose patches of "
                f"{patch} are {grid[0]}x{grid[1]}"
            )
        return grid
    found = _grids(count, shapes)
    if len(found) != 1:
        several = " or ".join(f"{rows}x{columns}" for rows, columns in found) or "no grid of a usual shape"
        raise ModelFileError(
            f"{spec.file}: {count} positions are {several}; give the image size that they are stored for, as in "
            f"{spec.file}?stored=256x128"
        )
    return found[0]


def _patch(state: dict[str, Tensor]) -> int:
    return int(state["patch_embed.proj.weight"].shape[-1])
