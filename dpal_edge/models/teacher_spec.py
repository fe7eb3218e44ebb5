"""What ``--teacher`` says: where a teacher's weights are, what it is asked for, and how it is run.

    SOURCE[?key=value&key=value...]

SOURCE is ``timm:NAME`` (weights from timm's hub), ``timm:NAME@FILE`` (local weights in timm's architecture), or
``FILE`` (weights whose layout tells the architecture). No name of a file may hold a question mark. The keys:

- ``for``: roles among global, local and relation, with commas; all three by default.
- ``layer``: block whose tokens are taken, 1 to depth, before the final norm; the last by default.
- ``global``: what stands for the whole image: cls, mean (of the patches) or pooled (Swin); cls where there is one.
- ``size``: HxW in pixels, what the teacher sees of the student's base view; other views are scaled alike. By default
  patches of teacher and student fall on each other at the least change of size.
- ``norm``: what its images are normalised with: imagenet, sapiens, half (0.5 and 0.5) or none (0..1 as it is). By
  default what the layout, or timm, says. ``mean`` and ``std``: the same as three numbers with commas, of RGB in 0..1.
- ``entry``: dictionary of FILE that holds the weights. By default teacher, student, model or state_dict, the first that
  is there; student before teacher in DPAL's files. In our checkpoints backbone or ema, by default the better.
- ``heads``: attention heads of a ViT in FILE, N+M for M in the last block. By default 6+12 for DPAL's; for others what
  published ViTs of that width have: width / 64 up to 1024, 16 for some wider ones (H, g, G), asked for elsewhere.
- ``stored``: HxW in pixels that FILE holds positions for, where their number leaves it open.
- ``resize``: how positions of a ViT in FILE are resized: 2d, 2d-dino or 1d (models/vit.py). By default 2d-dino, as
  DPAL's code and DINOv2 do; 2d for Sapiens, 1d for DPAL's students. PATH's own code has 2d.
- ``cls``: no leaves a class token in FILE out.
- ``padding``: zeros around the image before Sapiens' patches are cut. By default 0 with a class token, 2 without.
- ``semantic``: SOLIDER's semantic weight, 0..1, or none to leave its modulation out. By default 0.2, its authors' for
  re-identification.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dpal_edge.errors import ConfigError
from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD, PosInterp

Role = Literal["global", "local", "relation"]
Target = Literal["cls", "mean", "pooled"]
Rgb = tuple[float, float, float]

ROLES: tuple[Role, ...] = get_args(Role)
SAPIENS_MEAN: Rgb = (123.5 / 255, 116.5 / 255, 103.5 / 255)
SAPIENS_STD: Rgb = (58.5 / 255, 57.0 / 255, 57.5 / 255)
NORMS: dict[str, tuple[Rgb, Rgb]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "sapiens": (SAPIENS_MEAN, SAPIENS_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A parsed ``--teacher``; None where the weights, or a default, decide."""

    text: str  # as it was given
    model: str = ""  # timm's name; empty for FILE
    file: str = ""  # empty where weights come from timm's hub
    given: frozenset[str] = frozenset()  # keys that were given
    roles: tuple[Role, ...] = ROLES
    layer: int | None = None
    target: Target | None = None
    size: tuple[int, int] | None = None  # height, width
    norm: tuple[Rgb, Rgb] | None = None  # mean and std of RGB in 0..1
    entry: str | None = None
    heads: tuple[int, int] | None = None  # of most blocks, of the last
    stored: tuple[int, int] | None = None  # height, width
    resize: PosInterp | None = None
    class_token: bool = True
    padding: int | None = None
    semantic: float | None = None

    def refuse_others(self, known: set[str], what: str) -> None:
        """Refuse keys that mean nothing for ``what`` the source turned out to be.

        Raises:
            ConfigError: keys beside ``known`` and those that any teacher takes were given.
        """
        known = known | _ANY_TEACHER
        if others := self.given - known:
            raise ConfigError(
                f"teacher {self.text!r}: {', '.join(sorted(others))} means nothing for {what}; it takes "
                f"{', '.join(sorted(known))}"
            )


_ANY_TEACHER = frozenset({"for", "layer", "global", "size", "norm", "mean", "std"})


def parse_spec(text: str) -> TeacherSpec:
    """Read SOURCE and options of one ``--teacher``; no file is opened.

    Raises:
        ConfigError: no source, an unknown key, one given twice, or a value that the key does not take.
    """
    source, _, query = text.partition("?")
    model, file = _split_source(source)
    if not model + file:
        raise ConfigError(f"teacher {text!r}: no source; expected timm:NAME, timm:NAME@FILE or FILE")
    fields: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        key, _, value = item.partition("=")
        if key not in _KEYS:
            raise ConfigError(f"teacher {text!r}: unknown option {key!r}; known are {', '.join(_KEYS)}")
        if key in fields:
            raise ConfigError(f"teacher {text!r}: {key} is given twice")
        read, expected = _KEYS[key]
        try:
            fields[key] = read(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"teacher {text!r}: {key} is {value!r}, expected {expected}") from error
    given = frozenset(fields)
    if (norm := _join_norm(text, fields)) is not None:
        fields["norm"] = norm
    named = {_FIELDS.get(key, key): value for key, value in fields.items()}
    return TeacherSpec(text=text, model=model, file=file, given=given, **named)


def anchor(text: str) -> str:
    """Return the spec ``text`` with an absolute FILE, so that it means the same from any folder."""
    source, question, query = text.partition("?")
    model, file = _split_source(source)
    absolute = str(Path(file).resolve()) if file else ""
    joined = "@".join(part for part in (f"timm:{model}" if model else "", absolute) if part)
    return f"{joined}{question}{query}"


def _split_source(source: str) -> tuple[str, str]:
    if not source.startswith("timm:"):
        return "", source
    model, _, file = source.removeprefix("timm:").partition("@")
    return model, file


def _join_norm(text: str, fields: dict[str, Any]) -> tuple[Rgb, Rgb] | None:
    """Take ``mean`` and ``std`` out of ``fields`` and return what the images are normalised with."""
    mean, std = fields.pop("mean", None), fields.pop("std", None)
    if mean is None and std is None:
        return cast("tuple[Rgb, Rgb] | None", fields.get("norm"))
    if mean is None or std is None or "norm" in fields:
        raise ConfigError(f"teacher {text!r}: give mean and std together, without norm")
    return mean, std


def _roles(value: str) -> tuple[Role, ...]:
    names = value.split(",")
    if len(set(names)) != len(names) or set(names) - set(ROLES):
        raise ValueError(value)
    return tuple(role for role in ROLES if role in names)


def _size(value: str) -> tuple[int, int]:
    height, width = map(int, value.split("x"))
    if min(height, width) < 1:
        raise ValueError(value)
    return height, width


def _heads(value: str) -> tuple[int, int]:
    most, _, last = value.partition("+")
    heads = int(most), int(last or most)
    if min(heads) < 1:
        raise ValueError(value)
    return heads


def _rgb(value: str) -> Rgb:
    red, green, blue = map(float, value.split(","))
    if not all(0 <= number <= 1 for number in (red, green, blue)):
        raise ValueError(value)
    return red, green, blue


def _std(value: str) -> Rgb:
    std = _rgb(value)
    if min(std) == 0:
        raise ValueError(value)
    return std


def _padding(value: str) -> int:
    if (padding := int(value)) < 0:
        raise ValueError(value)
    return padding


def _weight(value: str) -> float | None:
    if value == "none":
        return None
    weight = float(value)
    if not (math.isfinite(weight) and 0 <= weight <= 1):
        raise ValueError(value)
    return weight


def _name(value: str) -> str:
    if not value:
        raise ValueError(value)
    return value


def _one_of(*choices: str) -> tuple[Callable[[str], Any], str]:
    return lambda value: choices[choices.index(value)], " or ".join(choices)


# Key of a spec -> what reads its value, and what is expected; KeyError and ValueError mean a wrong value.
_KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "for": (_roles, "global, local, relation, or several of them with commas"),
    "layer": (int, "a whole number"),
    "global": _one_of(*get_args(Target)),
    "size": (_size, "height x width in pixels, as in 256x128"),
    "norm": (NORMS.__getitem__, " or ".join(NORMS)),
    "mean": (_rgb, "three numbers of 0 to 1, as in 0.5,0.5,0.5"),
    "std": (_std, "three numbers above 0 and up to 1, as in 0.5,0.5,0.5"),
    "entry": (_name, "the name of a dictionary in the file"),
    "heads": (_heads, "a number of heads, or two as in 6+12"),
    "stored": (_size, "height x width in pixels, as in 224x224"),
    "resize": _one_of(*get_args(PosInterp)),
    "cls": ({"yes": True, "no": False}.__getitem__, "yes or no"),
    "padding": (_padding, "a number of pixels"),
    "semantic": (_weight, "0 to 1, or none"),
}
_FIELDS = {"for": "roles", "global": "target", "cls": "class_token"}  # keys that are no names of fields
