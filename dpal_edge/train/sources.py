"""Where images come from: folders, single files and tar shards, on this machine or on any store that fsspec reaches.

Every image has an index, and any index can be read at any time: a shard is scanned once for where its members lie, and
its members are then read one by one. So the order of training is a function of seed and position alone, the same for
any number of workers and processes and after any interruption, and every epoch mixes all shards. Streaming shards from
one end to the other, as WebDataset does, needs fewer and longer reads, but its order depends on who reads what, it
shuffles within a buffer only, and it cannot go on in the middle of an epoch. The price here is one request for each
image (those of a batch are made together) and the first scan, which reads a remote shard whole; what it finds is kept
in the user's cache folder.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from dpal_edge.errors import DataError
from dpal_edge.files import IMAGE_SUFFIXES, find_images, write_text

_THREADS = 16  # shards scanned at the same time
_BLOCK = 512  # bytes; a tar ends with blocks of zeros
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_WHOLE = -1  # start of a span that is a whole file
_UNKNOWN = -1  # size of a whole file that cannot be told, or only by a request for it alone

Indices = NDArray[np.int64]
Span = tuple[str, int, int]  # file or URL, first byte or _WHOLE, bytes or _UNKNOWN
T = TypeVar("T")


class ImageSource:
    """Images in a fixed order. Small to send to worker processes, which may fork or not: it holds no open files."""

    def __init__(self, table: "_Table", rows: Indices, ignored: tuple[str, ...], skipped: dict[str, str]) -> None:
        self.names: Sequence[str] = _Names(table, rows)  # files or URLs; of a shard's members, shard::member
        self.ignored = ignored  # files of the folders that are no images by their suffix; members of shards not counted
        self.skipped = skipped  # shards that could not be used, or only in part, and why
        # SHA-256 of all names and sizes, and where members lie; of the whole source in a subset too. An image replaced
        # by one of the same size goes unnoticed; of single URLs, and where a store lists no sizes, names alone count.
        self.digest = table.digest
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, indices: Iterable[int]) -> "ImageSource":
        """Return the source of the images ``indices`` of this one, in their order."""
        rows = self._rows[np.fromiter(indices, np.int64)]
        return ImageSource(self._table, rows, self.ignored, self.skipped)

    def read(self, indices: Sequence[int]) -> list[bytes | DataError]:
        """Read encoded images, those on one store at the same time; an error that says why in place of what fails."""
        spans = [self._table.span(int(self._rows[index])) for index in indices]
        remote = [place for place, span in enumerate(spans) if _is_url(span[0])]
        fetched = dict(zip(remote, _fetch([spans[place] for place in remote]), strict=True))
        return [fetched[place] if place in fetched else _read_local(*span) for place, span in enumerate(spans)]


def open_source(specs: tuple[str, ...]) -> ImageSource:
    """List the images that ``specs`` name: in the order given, sorted by name within each.

    Args:
        specs: folders, searched recursively; single images; uncompressed ``.tar`` shards; patterns of these with
            ``{000..010}``, ``{a,b}``, ``*``, ``?`` or ``[...]``. Each is a path or a URL such as
            ``s3://bucket/people-{000..127}.tar``; fsspec's own settings hold credentials and endpoints.

    Raises:
        DataError: a spec is missing or cannot be listed, or no image could be found in it.
    """
    listing = _Listing()
    with ThreadPoolExecutor(_THREADS) as pool:
        for spec in specs:
            _add(listing, spec, pool)
    return listing.source()


def expand_braces(pattern: str) -> list[str]:
    """Return what ``{000..010}`` (leading zeros kept) and ``{a,b}`` stand for; a list of one where there are none."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)) if first else ()
    tails = expand_braces(pattern[found.end() :])
    return [
        pattern[: found.start()] + item + tail for item in (words.split(",") if words else numbers) for tail in tails
    ]


@dataclass(frozen=True)
class _Table:
    """All images of a source, in arrays: unlike a million strings, forked workers share them without copying."""

    packed: bytes  # all names, one after the other
    ends: Indices  # (n,) where each name ends
    spans: Indices  # (n, 3): shard or -1, first byte or _WHOLE, bytes or _UNKNOWN
    shards: tuple[str, ...]
    digest: str

    def name(self, row: int) -> str:
        start = int(self.ends[row - 1]) if row else 0
        return self.packed[start : int(self.ends[row])].decode("utf-8", "surrogateescape")

    def span(self, row: int) -> Span:
        shard, start, size = self.spans[row].tolist()
        return (self.name(row) if start == _WHOLE else self.shards[shard]), start, size


class _Names(Sequence[str]):
    """The names of some rows of a table."""

    def __init__(self, table: _Table, rows: Indices) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Names(self._table, self._rows[index])
        return self._table.name(int(self._rows[index]))


@dataclass
class _Listing:
    """What has been found so far."""

    names: list[str] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add_files(self, sizes: Iterable[tuple[str, int]]) -> None:
        for name, size in sizes:
            self.names.append(name)
            self.spans.append((-1, _WHOLE, size))

    def add_shard(self, shard: str, index: "_Index") -> None:
        for name, start, size in index.members:
            self.names.append(f"{shard}::{name}")
            self.spans.append((len(self.shards), start, size))
        self.shards.append(shard)
        if index.damage or not index.members:
            count = f"its first {len(index.members)} images are used" if index.members else "no images in it"
            self.skipped[shard] = f"{count}; {index.damage}" if index.damage else count

    def source(self) -> ImageSource:
        encoded = [name.encode("utf-8", "surrogateescape") for name in self.names]
        packed, ends = b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64)
        spans = np.array(self.spans, np.int64).reshape(-1, 3)
        digest = hashlib.sha256(packed + ends.tobytes() + spans.tobytes()).hexdigest()
        table = _Table(packed, ends, spans, tuple(self.shards), digest)
        return ImageSource(table, np.arange(len(encoded)), tuple(self.ignored), self.skipped)


@dataclass(frozen=True)
class _Index:
    """Where the images of a shard lie."""

    members: list[tuple[str, int, int]]  # name, first byte, bytes
    damage: str | None  # why there may be more that could not be found


def _add(listing: _Listing, spec: str, pool: ThreadPoolExecutor) -> None:
    """Add the images that ``spec`` names."""
    before = len(listing.names)
    paths = _ask(pool, spec, _list_remote, spec) if _is_url(spec) else _list_local(spec)
    shards = {path: pool.submit(_index, path) for path in paths if _is_shard(path)}
    for path in paths:
        if path not in shards:
            _add_folder(listing, path, pool)
        elif (error := shards[path].exception()) is None:
            listing.add_shard(path, shards[path].result())
        else:
            listing.skipped[path] = _reason(error)
    if len(listing.names) == before:
        reasons = [f"{path}: {listing.skipped[path]}" for path in paths if path in listing.skipped]
        what = f"nothing of {spec} can be used, among it {reasons[0]}" if len(reasons) > 1 else "".join(reasons)
        raise DataError(f"{what or f'{spec}: no images there'}; expected folders of images, or .tar shards of them")


def _add_folder(listing: _Listing, path: str, pool: ThreadPoolExecutor) -> None:
    """Add the images below a folder, or the one image that ``path`` is."""
    if _suffix(path) in IMAGE_SUFFIXES and (_is_url(path) or Path(path).is_file()):
        listing.add_files([(path, _UNKNOWN if _is_url(path) else _size(Path(path)))])
    elif _is_url(path):
        files = _ask(pool, path, _find_remote, path)
        listing.add_files((file, size) for file, size in files if _suffix(file) in IMAGE_SUFFIXES)
        listing.ignored += [file for file, _ in files if _suffix(file) not in IMAGE_SUFFIXES]
    else:
        found = find_images((path,))
        listing.add_files((str(file), _size(file)) for file in found.paths)
        listing.ignored += map(str, found.ignored)


def _list_local(spec: str) -> list[str]:
    """Return the folders and files that ``spec`` names; of those without a wildcard, also missing shards."""
    if Path(spec).exists():
        return [spec]
    paths = []
    for pattern in map(Path, expand_braces(spec)):
        top = Path(pattern.anchor)
        magic = has_magic(str(pattern))
        paths += sorted(map(str, top.glob(str(pattern.relative_to(top))))) if magic else [str(pattern)]
    return paths


def _list_remote(spec: str) -> list[str]:
    """As ``_list_local``, on a store."""
    from fsspec.core import url_to_fs

    urls = []
    for pattern in expand_braces(spec):
        store, path = url_to_fs(pattern)
        urls += [store.unstrip_protocol(name) for name in store.glob(path)] if has_magic(path) else [pattern]
    return urls


def _size(path: Path) -> int:
    """Return the bytes of a file on this machine; of 100,000 in half a second, a quarter of what listing them takes."""
    try:
        return path.stat().st_size
    except OSError:  # reading it will say why
        return _UNKNOWN


def _find_remote(url: str) -> list[tuple[str, int]]:
    """Return all files below ``url`` with their sizes in bytes, sorted."""
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url)
    found = store.find(path, detail=True)
    sizes = {name: facts.get("size") for name, facts in found.items()}
    return [(store.unstrip_protocol(name), _UNKNOWN if sizes[name] is None else sizes[name]) for name in sorted(sizes)]


def _ask(pool: ThreadPoolExecutor, spec: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call what reaches for a store. Each store's library raises errors of its own; any becomes a DataError."""
    future = pool.submit(function, *arguments)
    if (error := future.exception()) is not None:
        raise DataError(
            f"{spec}: cannot be listed ({_reason(error)}); check the address, the access rights, and that the package "
            f"for its protocol is installed"
        ) from error
    return future.result()


def _index(shard: str) -> _Index:
    """Return where the images of ``shard`` lie, from the cache folder if it has been scanned before.

    Raises:
        DataError, OSError, or what a store's library raises.
    """
    size, identity = _identify(shard)
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(root, "dpal-edge", "shards", f"{key}.json")
    with suppress(OSError, ValueError, KeyError, TypeError):  # not scanned yet, or damaged: scan it
        stored = json.loads(kept.read_text(encoding="utf-8"))
        return _Index(
            [(str(name), int(start), int(count)) for name, start, count in stored["members"]], stored["damage"]
        )
    with _open(shard) as file:
        index = _scan(file, size)
    with suppress(DataError):  # no room or no right to write: it is scanned again next time
        write_text(kept, json.dumps({"shard": shard, "members": index.members, "damage": index.damage}))
    return index


def _identify(shard: str) -> tuple[int, str]:
    """Return the size in bytes of a shard, and a text that changes whenever its content does."""
    if not _is_url(shard):
        status = Path(shard).stat()
        return status.st_size, f"{Path(shard).resolve()} {status.st_size} {status.st_mtime_ns}"
    from fsspec.core import url_to_fs

    store, path = url_to_fs(shard)
    facts = store.info(path)
    if facts.get("size") is None:
        raise DataError("its size is unknown; expected a store that serves parts of files")
    return int(facts["size"]), f"{shard} {sorted(facts.items())}"


def _open(shard: str) -> BinaryIO:
    if not _is_url(shard):
        return Path(shard).open("rb")
    from fsspec.core import url_to_fs

    store, path = url_to_fs(shard)
    file: BinaryIO = store.open(path, "rb")  # reads ahead in blocks
    return file


def _scan(file: BinaryIO, size: int) -> _Index:
    """Find the images in a tar of ``size`` bytes by its headers; what is whole before any damage counts."""
    members: list[tuple[str, int, int]] = []
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - holds nothing open but ``file``
    except tarfile.TarError as error:
        raise DataError(f"no uncompressed tar ({error})") from error
    with suppress(tarfile.TarError):
        for member in tar:
            whole = member.isreg() and not member.issparse() and member.offset_data + member.size <= size
            if whole and _suffix(member.name) in IMAGE_SUFFIXES:
                members.append((member.name, member.offset_data, member.size))
        file.seek(tar.offset)  # tarfile takes any block that is no header for the end; a true end is zeros
        if file.read(_BLOCK) == bytes(_BLOCK):
            return _Index(members, None)
    return _Index(members, f"cut or damaged at byte {min(tar.offset, size)} of {size}")


def _fetch(spans: list[Span]) -> list[bytes | DataError]:
    """Read spans of URLs, all of a store at the same time where its library can."""
    if not spans:
        return []
    from fsspec.core import url_to_fs

    stores: dict[Any, list[tuple[int, str]]] = {}
    for place, (url, _, _) in enumerate(spans):
        store, path = url_to_fs(url)  # made anew after a fork, known otherwise
        stores.setdefault(store, []).append((place, path))
    fetched: dict[int, bytes | DataError] = {}
    for store, wanted in stores.items():
        paths = [path for _, path in wanted]
        parts = [spans[place][1:] for place, _ in wanted]
        starts = [None if start == _WHOLE else start for start, _ in parts]
        ends = [None if start == _WHOLE else start + size for start, size in parts]
        blobs = store.cat_ranges(paths, starts, ends, on_error="return")
        for (place, _), blob in zip(wanted, blobs, strict=True):
            fetched[place] = (
                DataError(_reason(blob)) if isinstance(blob, BaseException) else _whole(blob, *spans[place])
            )
    return [fetched[place] for place in range(len(spans))]


def _read_local(path: str, start: int, size: int) -> bytes | DataError:
    try:
        if start == _WHOLE:
            return Path(path).read_bytes()
        shard = _open_shard(path, Path(path).stat().st_mtime_ns)
        return _whole(os.pread(shard.descriptor, size, start), path, start, size)
    except OSError as error:
        return DataError(_reason(error))


class _Shard:
    """A file descriptor, closed when forgotten. Reading from a stated place, forked workers can share it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=64)
def _open_shard(path: str, changed: int) -> _Shard:
    """Keep shards open while they stay as they are: ``changed`` is the time of the last change."""
    return _Shard(os.open(path, os.O_RDONLY))


def _whole(blob: bytes, path: str, start: int, size: int) -> bytes | DataError:
    """Return ``blob`` if it has the size that the scan of its shard found."""
    if start == _WHOLE or len(blob) == size:
        return blob
    return DataError(
        f"{len(blob)} bytes came, expected {size}: {path} has changed, or its store serves no parts of files"
    )


def _reason(error: BaseException) -> str:
    """Say in one line what went wrong."""
    text = str(error).strip()
    if isinstance(error, DataError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _is_url(path: str) -> bool:
    return "://" in path


def _is_shard(path: str) -> bool:
    return _suffix(path) == ".tar" and (_is_url(path) or not Path(path).is_dir())


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()
