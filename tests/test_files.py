import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from dpal_edge.errors import DataError
from dpal_edge.files import atomic_path, sha256_of, write_text


def test_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    write_text(path, "old")
    write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert list(path.parent.iterdir()) == [path]


def test_failure_keeps_the_old_file_and_removes_the_partial(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.touch()


def test_full_disk_is_one_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    # The kernel refuses to write past the limit, part of the way through, as a full disk does.
    code = (
        "import pathlib, resource, signal, sys\n"
        "from dpal_edge.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "write_text(pathlib.Path(sys.argv[1]), 'x' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"DataError: {path}: cannot be written (File too large)" in done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_left_names_the_cause(tmp_path):
    def fill():
        with atomic_path(tmp_path / "clip.bin"), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")  # ENOSPC from the kernel

    with pytest.raises(DataError, match=r"clip\.bin: cannot be written \(No space left on device\); free some space"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match=r"taken/notes\.txt: cannot be written \("):
        write_text(tmp_path / "taken" / "notes.txt", "text")


@pytest.mark.parametrize("content", [b"", b"abc", bytes(3 << 20)])
def test_hash_matches_hashlib(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
