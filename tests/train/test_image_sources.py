import hashlib
import json
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
import torch

from dpal_edge.errors import DataError
from dpal_edge.train.config import build_config
from dpal_edge.train.data import PersonBatches
from dpal_edge.train.sources import expand_braces, open_source
from tests.train.conftest import SIZES, draw_person, write_people
from tests.train.test_data import FORK


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpal-edge" / "shards"


@pytest.fixture
def crops(tmp_path):
    return write_people(tmp_path / "crops", 6)


@pytest.fixture
def memory():
    """A store without anything in it."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def write_shards(folder, crops, *, each=2):
    """As WebDataset has them: a label after every image."""
    folder.mkdir(exist_ok=True)
    images = sorted(crops.iterdir())
    for number, first in enumerate(range(0, len(images), each)):
        with tarfile.open(folder / f"people-{number:03d}.tar", "w") as tar:
            for path in images[first : first + each]:
                tar.add(path, path.name)
                tar.addfile(tarfile.TarInfo(path.with_suffix(".json").name))
    return folder


@pytest.fixture
def shards(tmp_path, crops):
    return write_shards(tmp_path / "shards", crops)


def upload(store, folder, to):
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe(f"{to}/{path.relative_to(folder)}", path.read_bytes())


def contents(crops):
    return [path.read_bytes() for path in sorted(crops.iterdir())]


def everything(source):
    return source.read(range(len(source)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("a{008..010}.tar", ["a008.tar", "a009.tar", "a010.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{train,}", ["xtrain", "x"]),
        ("{3..2}", []),
        ("{no}.tar", ["{no}.tar"]),
    ],
)
def test_braces_by_hand(pattern, expected):
    assert expand_braces(pattern) == expected


def test_a_folder(crops):
    source = open_source((str(crops),))
    assert list(source.names) == [str(crops / f"{i:03d}.jpg") for i in range(6)]
    assert everything(source) == contents(crops)
    assert (source.ignored, source.skipped) == ((), {})


def test_no_specs_are_no_images():
    source = open_source(())
    assert (len(source), list(source.names), source.read([])) == (0, [], [])


def test_members_of_shards_are_the_images_in_them(shards, crops, tmp_path):
    source = open_source((str(shards / "people-{000..002}.tar"),))
    assert [name.removeprefix(str(shards)) for name in source.names] == [
        f"/people-{i // 2:03d}.tar::{i:03d}.jpg" for i in range(6)
    ]
    assert everything(source) == contents(crops)
    assert source.read([4, 1, 4]) == [contents(crops)[i] for i in (4, 1, 4)]
    assert (source.ignored, source.skipped) == ((), {})


@pytest.mark.parametrize("pattern", ["*.tar", "people-???.tar", "people-00[0-2].tar", "people-{000,001,002}.tar"])
def test_patterns_name_the_same_shards(shards, pattern):
    whole = open_source((str(shards / "people-{000..002}.tar"),))
    source = open_source((str(shards / pattern),))
    assert list(source.names) == list(whole.names)
    assert source.digest == whole.digest


def test_relative_patterns_and_odd_names(tmp_path, crops, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(open_source(("crop?",)).names) == [f"crops/{i:03d}.jpg" for i in range(6)]
    assert list(open_source(("cr*/00[12].jpg",)).names) == ["crops/001.jpg", "crops/002.jpg"]
    crops.rename(tmp_path / "crops [new] {a,b}")  # a folder that exists is no pattern
    assert len(open_source(("crops [new] {a,b}",))) == 6


def test_names_that_are_no_text(tmp_path):
    draw_person(tmp_path / "x.jpg", seed=0)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.add(tmp_path / "x.jpg", "é.jpg")
    (tmp_path / "x.jpg").unlink()
    source = open_source((str(tmp_path / "x.tar"),))
    assert source.names[0].endswith("x.tar::\udce9.jpg")
    again = open_source((str(tmp_path / "x.tar"),))  # from the cache
    assert (list(again.names), again.digest) == (list(source.names), source.digest)


def test_long_names_and_sparse_or_linked_members(tmp_path, crops):
    long = "/".join(["deep" * 10] * 5) + ".jpg"
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(crops / "000.jpg", long)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, long
        tar.addfile(link)
        tar.add(crops / "001.jpg", "UPPER.JPG")
    source = open_source((str(tmp_path / "x.tar"),))
    assert [name.partition("::")[2] for name in source.names] == [long, "UPPER.JPG"]
    assert everything(source) == contents(crops)[:2]


def test_specs_keep_their_order(crops, shards, tmp_path):
    tar = str(shards / "people-000.tar")
    both = open_source((tar, str(crops)))
    assert len(both) == 8
    assert both.names[0].startswith(tar)
    assert open_source((str(crops), tar)).names[0].startswith(str(crops))
    assert everything(both) == [*contents(crops)[:2], *contents(crops)]


def test_names_can_be_sliced(crops):
    names = open_source((str(crops),)).names
    assert [Path(name).stem for name in names[1:3]] == ["001", "002"]
    assert (names[-1], len(names), names[0] in names) == (str(crops / "005.jpg"), 6, True)
    with pytest.raises(IndexError):
        names[6]


def test_subsets(crops):
    source = open_source((str(crops),))
    part = source.subset([4, 0, 2]).subset([2, 1])
    assert [Path(name).stem for name in part.names] == ["002", "000"]
    assert part.read([1, 0]) == [contents(crops)[0], contents(crops)[2]]
    assert part.digest == source.digest


def test_the_digest_tells_other_images(crops, shards, tmp_path):
    tar = str(shards / "people-000.tar")
    folder, shard = open_source((str(crops),)).digest, open_source((tar,)).digest
    assert (open_source((str(crops),)).digest, open_source((tar,)).digest) == (folder, shard)
    (crops / "003.jpg").rename(crops / "0030.jpg")
    assert open_source((str(crops),)).digest != folder
    (crops / "0030.jpg").rename(crops / "003.jpg")
    draw_person(crops / "001.jpg", seed=9, size=(48, 24))
    assert open_source((str(crops),)).digest != folder  # the same names, but another size
    write_shards(shards, crops)
    assert open_source((tar,)).digest != shard


def test_the_digest_tells_other_images_on_a_store(memory, crops):
    upload(memory, crops, "/crops")
    first = open_source(("memory://crops",)).digest
    assert open_source(("memory://crops",)).digest == first
    memory.pipe("/crops/001.jpg", b"another size")
    assert open_source(("memory://crops",)).digest != first


def test_a_file_without_a_size_is_still_listed(crops):
    (crops / "gone.jpg").symlink_to("nowhere.jpg")
    source = open_source((str(crops),))
    assert len(source) == 7
    assert str(source.read([6])[0]).startswith("FileNotFoundError: ")


def test_a_shard_is_scanned_once(crops, shards, cache):
    [tar, *_] = sorted(shards.iterdir())
    first = open_source((str(tar),))
    [kept] = cache.iterdir()
    stored = json.loads(kept.read_text())
    stored["members"] = stored["members"][:1]
    kept.write_text(json.dumps(stored))
    assert len(open_source((str(tar),))) == 1  # what was kept is believed
    for damage in ("", "[]", '{"members": [[1, 2]], "damage": null}', '{"members": 3, "damage": null}'):
        kept.write_text(damage)
        assert open_source((str(tar),)).digest == first.digest
    with tarfile.open(tar, "a") as archive:
        archive.add(crops / "005.jpg", "more.jpg")
    assert len(open_source((str(tar),))) == 3


def test_a_cache_that_cannot_be_written_is_done_without(shards, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source((str(shards / "people-000.tar"),))) == 2


@pytest.mark.parametrize("cut", ["in an image", "in a header", "before the end mark"])
def test_what_is_whole_of_a_cut_shard_is_used(shards, crops, cut):
    tar = shards / "people-001.tar"
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        second = archive.getmember("003.jpg")
    ends = {"in an image": second.offset_data + 100, "in a header": second.offset + 100}
    tar.write_bytes(content[: ends.get(cut, second.offset_data + -(-second.size // 512) * 512)])
    source = open_source((str(shards / "*.tar"),))
    assert list(source.skipped) == [str(tar)]
    used = 2 if cut == "before the end mark" else 1
    assert re.fullmatch(
        rf"its first {used} images are used; cut or damaged at byte \d+ of \d+", source.skipped[str(tar)]
    )
    assert everything(source) == [blob for i, blob in enumerate(contents(crops)) if used == 2 or i != 3]


def test_damage_within_a_shard_is_named(shards):
    tar = shards / "people-000.tar"
    with tarfile.open(tar) as archive:
        second = archive.getmember("001.jpg")
    content = bytearray(tar.read_bytes())
    content[second.offset : second.offset + 512] = b"x" * 512
    tar.write_bytes(content)
    source = open_source((str(shards / "*.tar"),))
    assert len(source) == 5
    assert source.skipped[str(tar)].startswith(
        f"its first 1 images are used; cut or damaged at byte {second.offset} of"
    )


def test_shards_that_cannot_be_read_are_named_and_the_others_used(shards):
    (shards / "people-000.tar").write_text("no tar at all, but long enough to hold a header " * 20)
    (shards / "people-001.tar").write_bytes(b"")
    with tarfile.open(shards / "people-003.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("only.json"))
    source = open_source((str(shards / "people-{000..004}.tar"),))
    assert len(source) == 2
    reasons = {Path(name).stem[-3:]: reason for name, reason in source.skipped.items()}
    assert reasons["000"] == "no uncompressed tar (invalid header)"
    assert reasons["001"] == "no uncompressed tar (empty file)"
    assert reasons["003"] == "no images in it"
    assert reasons["004"].startswith("FileNotFoundError: ")


def test_a_member_that_is_gone_is_an_error_in_its_place(shards, crops):
    source = open_source((str(shards / "people-{000..002}.tar"),))
    tar = shards / "people-002.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    [whole, gone] = source.read([0, 5])
    assert whole == contents(crops)[0]
    assert re.match(r"0 bytes came, expected \d+: .*people-002.tar has changed", str(gone))


def test_a_shard_that_was_replaced_is_read_anew(shards, crops):
    tar = str(shards / "people-000.tar")
    assert everything(open_source((tar,))) == contents(crops)[:2]
    (shards / "people-001.tar").replace(tar)
    assert everything(open_source((tar,))) == contents(crops)[2:4]


def test_a_file_that_is_gone_is_an_error_in_its_place(crops):
    source = open_source((str(crops),))
    (crops / "002.jpg").unlink()
    [gone, whole] = source.read([2, 3])
    assert str(gone).startswith("FileNotFoundError: ")
    assert whole == contents(crops)[2]


def test_other_files_are_listed(crops):
    (crops / "Thumbs.db").touch()
    assert [Path(name).name for name in open_source((str(crops),)).ignored] == ["Thumbs.db"]


def test_a_store_holds_the_same_as_a_folder(memory, crops, shards):
    upload(memory, crops, "/data/crops/deep")
    upload(memory, shards, "/data/shards")
    memory.pipe("/data/crops/notes.txt", b"text")
    folder = open_source(("memory://data/crops",))
    assert list(folder.names) == [f"memory:///data/crops/deep/{i:03d}.jpg" for i in range(6)]
    assert folder.ignored == ("memory:///data/crops/notes.txt",)
    assert everything(folder) == contents(crops)
    for pattern in ("people-{000..002}.tar", "*.tar"):
        source = open_source((f"memory://data/shards/{pattern}",))
        assert [name.rpartition("::")[2] for name in source.names] == [f"{i:03d}.jpg" for i in range(6)]
        assert everything(source) == contents(crops)
    assert len(open_source(("memory://data/crops/deep/00[01].jpg",))) == 2


def test_several_stores_at_once(memory, crops, shards):
    upload(memory, crops, "/crops")
    source = open_source(("memory://crops", str(crops), f"file://{shards}/people-000.tar", f"file://{crops}"))
    order = [13, 0, 7, 12, 19, 2]
    expected = [*contents(crops), *contents(crops), *contents(crops)[:2], *contents(crops)]
    assert source.read(order) == [expected[i] for i in order]


def test_a_cut_shard_on_a_store(memory, crops, shards):
    upload(memory, shards, "/shards")
    content = (shards / "people-001.tar").read_bytes()
    memory.pipe("/shards/people-001.tar", content[:3000])
    source = open_source(("memory://shards/people-{000..003}.tar",))
    assert len(source) == 4 + (content[:3000].count(b".jpg") > 1)
    assert list(source.skipped) == ["memory://shards/people-001.tar", "memory://shards/people-003.tar"]
    memory.rm("/shards/people-002.tar")
    assert str(source.read([len(source) - 1])[0]).startswith("FileNotFoundError: ")


@FORK
def test_forked_processes_share_open_shards(crops, shards):
    source = open_source((str(shards / "*.tar"), str(crops)))
    expected = everything(source)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(everything, [source] * 6) == [expected] * 6


def test_fresh_processes_read_the_same(crops, shards):
    source = open_source((str(shards / "*.tar"), str(crops)))
    code = (
        "import hashlib, pickle, sys; source = pickle.load(sys.stdin.buffer);"
        "print(*source.names, hashlib.sha256(b''.join(source.read(range(len(source))))).hexdigest(), sep='\\n')"
    )
    sent = pickle.dumps(source)
    shown = subprocess.run([sys.executable, "-c", code], input=sent, stdout=subprocess.PIPE, check=True).stdout
    expected = hashlib.sha256(b"".join(everything(source))).hexdigest()
    assert shown.decode().split() == [*source.names, expected]


def test_shards_give_the_batches_of_their_folder(crops, shards, memory):
    upload(memory, shards, "/shards")
    config = build_config({**SIZES, "batch": 4})
    specs = (str(crops), str(shards / "*.tar"), "memory://shards/*.tar")
    one, *others = (PersonBatches(open_source((spec,)), config, ("base", "local", "crowd"))[1] for spec in specs)
    for other in others:
        for name in ("base", "local", "crowd", "keys"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_an_unreadable_member_is_replaced_by_another(tmp_path, crops):
    (crops / "002.jpg").write_bytes((crops / "002.jpg").read_bytes()[:200])
    shards = write_shards(tmp_path / "damaged", crops)
    dataset = PersonBatches(open_source((str(shards / "*.tar"),)), build_config({**SIZES, "batch": 6}))
    assert [name for name, _ in dataset[0].skipped] == [f"{shards}/people-001.tar::002.jpg"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/nowhere", "nowhere: does not exist; expected a folder of images"),
        ("{}/nowhere.tar", r"nowhere.tar: FileNotFoundError: .*; expected folders of images, or .tar shards of them"),
        ("{}/no-{{0..2}}.tar", r"nothing of .*no-\{{0..2\}}.tar can be used, among it .*no-0.tar: FileNotFoundError"),
        ("{}/no-*.tar", r"no-\*.tar: no images there; expected folders of images, or .tar shards"),
        ("{}/labels.tar", r"labels.tar: no images in it; expected folders of images, or .tar shards"),
        ("{}/text.tar", r"text.tar: no uncompressed tar \(truncated header\); expected"),
        ("memory://nowhere", "memory://nowhere: no images there; expected"),
        ("memory://nowhere.tar", "memory://nowhere.tar: FileNotFoundError: .*; expected"),
        (
            "nostore://x",
            r"nostore://x: cannot be listed \(ValueError: Protocol not known: nostore\); check the address",
        ),
        ("nostore://x/*.tar", r"cannot be listed \(ValueError: Protocol not known: nostore\); check the address"),
    ],
)
def test_errors_are_one_line(tmp_path, memory, spec, message):
    (tmp_path / "text.tar").write_text("text")
    with tarfile.open(tmp_path / "labels.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("only.json"))
    with pytest.raises(DataError, match=message.replace("{{", "{").replace("}}", "}")) as raised:
        open_source((spec.format(tmp_path),))
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch):
    """As for s3:// without s3fs; which stores are installed here does not matter."""
    fsspec.register_implementation("absent", "absent_package.Store", errtxt="Install absent_package", clobber=True)
    with pytest.raises(DataError, match=r"cannot be listed \(ImportError: Install absent_package\); .* is installed"):
        open_source(("absent://bucket/people",))


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files and parts of them."""

    def log_message(self, *arguments):
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            return super().send_head()
        first, last = map(int, wanted.groups())
        content = path.read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return BytesIO(part)


@FORK
def test_a_web_server(tmp_path, crops, shards):
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert everything(open_source((f"{address}/crops/",))) == contents(crops)
        source = open_source((f"{address}/shards/people-{{000..003}}.tar",))
        assert everything(source) == contents(crops)
        assert list(source.skipped) == [f"{address}/shards/people-003.tar"]
        with get_context("fork").Pool(2) as pool:  # whose connections and threads are not those of this process
            assert pool.map(everything, [source] * 4) == [contents(crops)] * 4
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
