"""The contract of a bundle: what goes in, what comes out, which files, and what was proven about them.

A bundle is a folder with ``manifest.json``, the artifacts it names and ``golden.npz``. Export writes it; install,
verify, run and profile read it, on machines that know nothing of how it was trained.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpal_edge.errors import ModelFileError
from dpal_edge.files import sha256_of, write_text

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
_LARGEST = 1 << 24  # pixels of an image, or values of a head for one: beyond it a manifest is wrong, and memory short


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The one input of every artifact: uint8 RGB images (B, height, width, 3); nothing to normalise outside.

    They are crops of people, resized to this size, except for a detector: it takes whole frames, reduced or enlarged
    without changing their shape, in the top left corner, and grey (114) where they leave the rest.
    """

    name: str
    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of RGB in 0..1; already folded into the weights, kept for the record
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """One output of the graph."""

    name: str  # of the output tensor
    task: str  # embedding, pose, parsing, attributes or detection
    shape: tuple[int, ...]  # without the batch axis
    labels: tuple[str, ...] = ()  # joints, classes or attributes, in the order of the outputs
    kind: str = ""  # of the head, where decoding depends on it, for example "simcc"


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """A file of the bundle."""

    file: str  # relative to the bundle
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "FileSpec":
        """Describe the existing file at ``path``, named relative to its folder."""
        return cls(file=path.name, sha256=sha256_of(path), bytes=path.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a written artifact, run by its own backend, is from float32 torch on real crops."""

    backend: str  # name and version of what ran the file
    images: int
    max_abs_error: float  # of the head that differs most
    max_rel_error: float  # max_abs_error over the largest absolute reference value of the same head
    min_cosine: float  # over images and heads
    tolerance: float  # on max_rel_error
    head: str = ""  # the one that differs most


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says of one head of a less precise artifact."""

    head: str  # or task, where it was scored on labels
    measure: str  # a metric, or how far it agrees with float32
    reference: float  # of float32, 0..1
    found: float
    least: float  # that passes

    @property
    def passed(self) -> bool:
        """Whether enough is left; a value that is not a number is not."""
        return self.found >= self.least


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one call took where the bundle was made."""

    batch: int  # images
    median_ms: float  # of a call
    runs: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One runnable form of the model."""

    target: str  # an export target, for example "onnx"
    precision: str  # float32, float16 or int8: of most of its layers
    file: FileSpec
    parity: Parity
    data: tuple[FileSpec, ...] = ()  # files that ``file`` reads its weights from, where it does not hold them
    verdicts: tuple[Verdict, ...] = ()  # of the gate; none for float32, which must be exact
    kept: tuple[str, ...] = ()  # linear layers that stay in a higher precision than the artifact's
    latency: tuple[Latency, ...] = ()  # none where nothing here can run it

    @property
    def files(self) -> tuple[FileSpec, ...]:
        """The file to open, and its data."""
        return (self.file, *self.data)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A target that was asked for and is not shipped."""

    target: str
    reason: str
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stripped:
    """What export removed: the numbers of parameters behind the claim that only the student ships."""

    parameters_before: int  # of all that computed in training: student, decoder, teacher
    parameters_after: int  # in the exported graph
    removed: dict[str, int]  # parameters per removed part, for example {"decoder": 29350000}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a device needs to know about a bundle."""

    model: str  # architecture, for example "vit_tiny"
    input: InputSpec
    heads: tuple[HeadSpec, ...]
    artifacts: tuple[Artifact, ...]
    golden: FileSpec  # npz: "images" (n, H, W, 3) uint8, and per head its float32 torch output
    stripped: Stripped
    provenance: dict[str, Any]
    refused: tuple[Refusal, ...] = ()
    documents: tuple[FileSpec, ...] = ()  # about the bundle, for people
    schema: int = SCHEMA

    @property
    def detects(self) -> bool:
        """Whether the model finds people in frames, instead of describing crops of them."""
        return any(head.task == "detection" for head in self.heads)

    @property
    def ranked_images(self) -> int:
        """How many images a call has whose time ranks the forms of the bundle: a frame, or the people of one."""
        return 1 if self.detects else 4

    def write(self, bundle: Path) -> Path:
        """Write the manifest of ``bundle`` (as for ``read``), atomically, and return its path."""
        path = manifest_path(bundle)
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, bundle: Path) -> "Manifest":
        """Read and check the manifest of ``bundle``; the files it names are not opened.

        Args:
            bundle: a folder with a manifest.json, or a manifest of another name in a folder that several models share.

        Raises:
            ModelFileError: no manifest, not JSON, another schema, a field missing, unknown or of the wrong type, or an
                absurd size.
        """
        path = manifest_path(bundle)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelFileError(
                f"{bundle}: no {path.name}, so not a bundle; write one with 'dpal-edge export'"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{path}: not valid JSON ({error}); export the bundle again") from error
        found = data.get("schema") if isinstance(data, dict) else None
        if isinstance(found, int) and found > SCHEMA:
            raise ModelFileError(
                f"{path}: schema {found}, expected {SCHEMA}: a newer dpal-edge wrote it; upgrade the one here"
            )
        if found != SCHEMA:
            raise ModelFileError(
                f"{path}: schema {found}, expected {SCHEMA}; export the bundle again with this dpal-edge version"
            )
        manifest: Manifest = _parse(cls, data, str(path))
        shapes = {f"heads: {head.name}: shape": head.shape for head in manifest.heads}
        for name, sides in {"input: size": manifest.input.size, **shapes}.items():
            if min(sides, default=1) < 1 or math.prod(sides) > _LARGEST:
                raise ModelFileError(
                    f"{path}: {name}: {sides} found, expected sides of 1 or more and a product of at most {_LARGEST}; "
                    f"export the bundle again"
                )
        return manifest

    def open_artifact(self, bundle: Path, artifact: Artifact) -> Path:
        """Return the path of the file to open of ``artifact``, after checking its hash and those of its data.

        Raises:
            ModelFileError: as ``file``.
        """
        for spec in artifact.data:
            self.file(bundle, spec)
        return self.file(bundle, artifact.file)

    def file(self, bundle: Path, spec: FileSpec) -> Path:
        """Return the path of ``spec`` in ``bundle`` (as for ``read``) after checking its size and hash.

        Raises:
            ModelFileError: the file is missing, lies outside the bundle, or differs from the manifest.
        """
        folder = manifest_path(bundle).parent
        path = folder / spec.file
        try:
            inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
            raise ModelFileError(
                f"{bundle}: the manifest names {spec.file!r}, which is no name of a file ({error}); refused"
            ) from error
        if not inside:
            raise ModelFileError(f"{bundle}: the manifest names {spec.file!r}, a file outside the bundle; refused")
        if not there:
            raise ModelFileError(f"{path}: missing, though the manifest names it; copy the whole bundle again")
        if (size := path.stat().st_size) != spec.bytes:  # first: hashing a file of any size could take for ever
            difference = f"{size} bytes, the manifest says {spec.bytes}"
        elif (found := sha256_of(path)) != spec.sha256:
            difference = f"sha256 {found[:12]}, the manifest says {spec.sha256[:12]}"
        else:
            return path
        raise ModelFileError(f"{path}: damaged or replaced ({difference}); copy or export the bundle again")


def manifest_path(bundle: Path) -> Path:
    """Return where the manifest of ``bundle`` lies: in the folder, or the .json file that it is itself."""
    return bundle if bundle.suffix == ".json" and not bundle.is_dir() else bundle / MANIFEST_NAME


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Build ``kind`` (a dataclass, tuple, dict or scalar type) from parsed JSON; name the field that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _parse_dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) == len(value):
            return tuple(_parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or (isinstance(kind, type) and not origin and type(value) is kind):
        return value
    expected = kind if isinstance(kind, types.GenericAlias) else kind.__name__
    raise ModelFileError(f"{where}: {value!r} found, expected {expected}; export the bundle again")


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: {value!r} found, expected an object; export the bundle again")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for problem, names in (("lacks", required - value.keys()), ("has unknown", value.keys() - fields.keys())):
        if names:
            raise ModelFileError(f"{where}: {problem} {', '.join(sorted(names))}; export the bundle again")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _parse(hints[name], item, f"{where}: {name}") for name, item in value.items()})
