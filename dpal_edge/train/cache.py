"""What the teachers said, kept on disk, so that views that come again need no teacher.

Worth it where a run has more epochs than ``view_variants``: the teacher is three quarters of an update's operations.
The price is variety (each image has that many views in all), disk space, and reading: the training process itself
reads and checks 0.6 MB per image of ViT-B targets, between two updates.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.files import write_text

_SUM_BYTES = 4  # a CRC-32 before each row


@dataclass(frozen=True)
class _Column:
    """One tensor of the targets: a sparse file of rows, each a checksum and the values."""

    descriptor: int
    shape: tuple[int, ...]  # of one image
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return _SUM_BYTES + math.prod(self.shape) * self.dtype.itemsize

    def read(self, row: int) -> bytes | None:
        """Return the values of a row, None if it was never written or only in part."""
        record = os.pread(self.descriptor, self.row_bytes, row * self.row_bytes)
        stated, values = record[:_SUM_BYTES], record[_SUM_BYTES:]
        return values if len(record) == self.row_bytes and stated == _checksum(values) else None

    def write(self, row: int, values: bytes) -> None:
        """Write a row. A plain write, no memory map: a full disk is an error here, and would be a SIGBUS there."""
        os.pwrite(self.descriptor, _checksum(values) + values, row * self.row_bytes)


class TargetCache:
    """Targets by key: a function of the image, its view and ``identity``, which names a subfolder.

    A row counts only with its checksum, so a process may die at any moment, and several may fill one cache.
    """

    def __init__(self, folder: Path, rows: int, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.rows = rows
        self._identity = identity
        self._columns: dict[str, _Column] = {}
        if (layout := self.folder / "layout.json").exists():
            self._open(json.loads(layout.read_text(encoding="utf-8")))

    def get(self, keys: Tensor, device: torch.device) -> dict[str, Tensor] | None:
        """Return the targets of the views ``keys`` (B,) in float32, or None unless all are there and intact."""
        found = {}
        for name, column in self._columns.items():
            rows = [column.read(key) for key in keys.tolist()]
            present = [row for row in rows if row is not None]
            if len(present) < len(rows):
                return None
            flat = torch.frombuffer(bytearray(b"".join(present)), dtype=column.dtype)
            found[name] = flat.view(len(rows), *column.shape).to(device, non_blocking=True).float()
        return found or None

    def put(self, keys: Tensor, targets: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Keep the ``targets`` of the views ``keys`` (B,), rounded to ``dtype``.

        Raises:
            ConfigError: the full cache would not fit on the disk.
            DataError: it cannot be written.
        """
        try:
            if not self._columns:
                self._create({name: tuple(value.shape[1:]) for name, value in targets.items()}, dtype)
            for name, column in self._columns.items():
                values = targets[name].detach().to(column.dtype).cpu().contiguous().view(torch.uint8).numpy()
                for key, row in zip(keys.tolist(), values, strict=True):
                    column.write(key, row.tobytes())
        except OSError as error:
            raise DataError(
                f"{self.folder}: the teacher cache cannot be written ({error.strerror}); free some space, or go "
                f"on with --resume --set teacher_cache=null"
            ) from error

    def _create(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = bytes_needed(self.rows, shapes, dtype), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"{self.folder}: the teacher cache needs {needed / 1e9:.1f} GB for {self.rows} views and "
                f"{free / 1e9:.1f} GB are free; lower view_variants, or leave teacher_cache out"
            )
        kind = str(dtype).removeprefix("torch.")
        write_text(self.folder / "identity.json", json.dumps(self._identity, indent=2, sort_keys=True) + "\n")
        layout = {name: {"shape": list(shape), "dtype": kind} for name, shape in shapes.items()}
        write_text(self.folder / "layout.json", json.dumps(layout, indent=2) + "\n")
        self._open(layout)

    def _open(self, layout: dict[str, Any]) -> None:
        for name, fields in layout.items():
            descriptor = os.open(self.folder / f"{name}.rows", os.O_RDWR | os.O_CREAT, 0o644)
            self._columns[name] = _Column(descriptor, tuple(fields["shape"]), getattr(torch, fields["dtype"]))

    def close(self) -> None:
        """Close the files."""
        for column in self._columns.values():
            os.close(column.descriptor)
        self._columns.clear()


def bytes_needed(rows: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the size of a full cache: values and a checksum for each row of each tensor."""
    return sum(rows * (math.prod(shape) * dtype.itemsize + _SUM_BYTES) for shape in shapes.values())


def _checksum(values: bytes) -> bytes:
    return (zlib.crc32(values) or 1).to_bytes(_SUM_BYTES, "little")  # 0 is a row that was never written
