import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dpal_edge.errors import DataError
from dpal_edge.files import find_images
from dpal_edge.train.config import build_config
from dpal_edge.train.data import LOCAL_CROPS, PersonBatches, split_validation
from dpal_edge.train.loop import TimedLoader
from tests.train.conftest import SIZES, draw_person, write_people

# Newer Pythons warn that a fork may deadlock; workers are what is tested here.
FORK = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def batches(folder, **fields):
    config = build_config({**SIZES, "batch": 4, **fields})
    return PersonBatches(find_images((str(folder),)).paths, config)


def equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("base", "local", "crowd"))


def test_shapes(people):
    batch = batches(people)[0]
    assert batch.base.shape == (4, 3, 64, 32)
    assert batch.local.shape == (LOCAL_CROPS * 4, 3, 32, 16)
    assert batch.crowd.shape == (4, 3, 64, 48)
    assert {view.dtype for view in (batch.base, batch.local, batch.crowd)} == {torch.uint8}
    assert batch.skipped == ()


def test_a_batch_is_a_function_of_seed_and_step(people):
    forwards, backwards = batches(people), batches(people)
    expected = [forwards[step] for step in range(4)]
    for step in reversed(range(4)):
        assert equal(backwards[step], expected[step])
    assert not equal(expected[0], expected[1])
    assert not equal(batches(people, seed=1)[0], expected[0])


@FORK
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(people, workers):
    dataset = batches(people)
    loader = TimedLoader(dataset, range(3, 7), workers=workers, device=torch.device("cpu"))
    found = list(loader)
    assert len(found) == 4
    for step, batch in zip(range(3, 7), found, strict=True):
        assert equal(batch, dataset[step])
    assert loader.waited_s > 0


@pytest.mark.parametrize("batch", [1, 4, 5, 24])
def test_epochs_are_permutations(people, batch):
    dataset = batches(people, batch=batch)
    order = [dataset._index(position) for position in range(72)]
    epochs = [order[:24], order[24:48], order[48:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_larger_than_the_data(people):
    assert batches(people, batch=50)[0].base.shape[0] == 50


def test_local_crops_are_grouped_by_crop(tmp_path):
    for i, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        Image.new("RGB", (48, 96), colour).save(tmp_path / f"{i}.png")
    dataset = batches(tmp_path, batch=2)
    reds = 0
    for step in range(12):
        batch = dataset[step]
        grey = batch.base.float().std(1).mean((1, 2)) < 20
        local = batch.local.float().mean((2, 3)).argmax(1).view(LOCAL_CROPS, 2)
        base = batch.base.float().mean((2, 3)).argmax(1)
        coloured = ~grey & (batch.local.float().std(1).mean((1, 2)).view(LOCAL_CROPS, 2) > 60).all(0)
        for i in coloured.nonzero().flatten().tolist():
            assert local[:, i].tolist() == [base[i]] * LOCAL_CROPS
            reds += 1
    assert reds > 5


def damage(path, kind):
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 3])
    elif kind == "text":
        path.write_text("not an image at all")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.symlink_to("nowhere.jpg")


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "dangling link"])
def test_unreadable_file_is_skipped_named_and_substituted(tmp_path, kind):
    folder = write_people(tmp_path / "crops", 6)
    dataset = batches(folder, batch=6)
    whole = dataset[0]
    bad = folder / "002.jpg"
    damage(bad, kind)
    batch = dataset[0]
    assert [path for path, _ in batch.skipped] == [str(bad)]
    assert batch.skipped[0][1]
    assert "\n" not in batch.skipped[0][1]
    order = [dataset._index(position) for position in range(6)]
    for place, index in enumerate(order):
        assert torch.equal(batch.base[place], whole.base[place]) == (index != 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # a person sees it once; the file is then skipped or used
def test_random_damage_never_stops_a_run(tmp_path):
    folder = write_people(tmp_path / "crops", 2)
    rng = random.Random(0)
    for suffix, options in (
        (".jpg", {}),
        (".png", {}),
        (".bmp", {}),
        (".webp", {}),
        (".tif", {"compression": "tiff_lzw"}),
    ):
        with Image.open(folder / "000.jpg") as image:
            image.save(tmp_path / f"whole{suffix}", **options)
        content = (tmp_path / f"whole{suffix}").read_bytes()
        for i in range(12):
            damaged = bytearray(content)
            for _ in range(4):
                damaged[rng.randrange(min(len(content), 400))] = rng.randrange(256)
            (folder / f"x{i}{suffix}").write_bytes(damaged[: rng.randrange(1, len(damaged))] if i % 3 else damaged)
    dataset = PersonBatches(find_images((str(folder),)).paths, build_config({**SIZES, "batch": 62}))
    skipped = {}
    for index in range(len(dataset.paths)):
        with contextlib.suppress(DataError):  # twenty neighbours may be damaged as well
            dataset._read(dataset.paths, index, skipped)
    assert len(skipped) > 20


def test_picture_that_would_fill_the_memory_is_skipped(tmp_path, monkeypatch):
    folder = write_people(tmp_path / "crops", 3)
    Image.new("L", (300, 300)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    [(path, reason)] = batches(folder, batch=4)[0].skipped
    assert path == str(folder / "bomb.png")
    assert reason.startswith("DecompressionBombError: Image size (90000 pixels) exceeds")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = ".tif" if mode in ("CMYK", "I;16") else ".png"
    Image.new(mode, (32, 64)).save(tmp_path / f"x{suffix}")
    assert batches(tmp_path, batch=1)[0].base.shape == (1, 3, 64, 32)


def test_a_block_of_empty_files_is_passed_over(tmp_path):
    for i in range(25):  # as an interrupted copy leaves them: first by name, side by side
        (tmp_path / f"{i:02d}.jpg").touch()
    write_people(tmp_path / "good", 60)
    dataset = batches(tmp_path, batch=85)
    assert len(dataset[0].skipped) == 25


def test_all_bad_is_an_error(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_text("text")
    with pytest.raises(
        DataError, match=r"\d\d\.jpg: cannot be read, nor can 19 others tried in its place .* really images"
    ):
        batches(tmp_path)[0]


@FORK
def test_error_in_a_worker_is_one_line(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("text")
    loader = TimedLoader(batches(tmp_path), range(2), workers=1, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"^\S+\.jpg: cannot be read, nor can .* are these really images\?$"):
        list(loader)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match="nowhere: does not exist; expected a folder of images"):
        find_images((str(tmp_path / "nowhere"),))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: is a file; expected a folder of images"):
        find_images((str(tmp_path / "file"),))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"empty: no images in it; expected files ending in \.bmp, "):
        find_images((str(tmp_path / "empty"),))


def test_other_files_are_ignored_and_listed(tmp_path):
    folder = write_people(tmp_path / "crops", 2)
    (folder / "deep" / "er").mkdir(parents=True)
    draw_person(folder / "deep" / "er" / "UPPER.JPG", seed=0)
    (folder / "Thumbs.db").touch()
    (folder / "loop").symlink_to(folder)
    found = find_images((str(folder),))
    assert [path.name for path in found.paths] == ["000.jpg", "001.jpg", "UPPER.JPG"]
    assert [path.name for path in found.ignored] == ["Thumbs.db"]


@pytest.mark.parametrize(("images", "wanted", "given"), [(100, 8, 8), (100, 64, 10), (9, 64, 0), (20, 0, 0)])
def test_validation_is_disjoint_seeded_and_at_most_a_tenth(images, wanted, given):
    paths = tuple(range(images))
    train, held_out = split_validation(paths, wanted, 0)
    assert len(held_out) == given
    assert sorted(train + held_out) == list(paths)
    assert split_validation(paths, wanted, 0) == (train, held_out)
    if given:
        assert split_validation(paths, wanted, 1)[1] != held_out


@pytest.fixture
def red_and_green(tmp_path):
    """Folders of one red image of a crowd and of one green background."""
    for name, colour in (("crowds", (255, 0, 0)), ("backgrounds", (0, 255, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "x.png")
    return {"crowd_data": [str(tmp_path / "crowds")], "backgrounds": [str(tmp_path / "backgrounds")]}


@pytest.mark.parametrize(("source", "low", "high"), [("paste", 0, 0), ("real", 1, 1), ("mixed", 0.3, 0.7)])
def test_crowd_source(people, red_and_green, source, low, high):
    if source == "paste":
        del red_and_green["crowd_data"]
    dataset = batches(people, batch=48, crowd_source=source, **red_and_green)
    crowd = dataset[0].crowd.float()
    flat = (crowd.flatten(2).std(-1) < 1).all(1)  # a real crowd of one colour, flipped or jittered, stays one colour
    assert low <= flat.float().mean().item() <= high


def test_backgrounds_are_used(people, red_and_green):
    del red_and_green["crowd_data"]
    corners = batches(people, batch=32, **red_and_green)[0].crowd[:, :, 0, 0].float()
    assert (corners.argmax(1) == 1).float().mean() > 0.3
    assert not equal(batches(people)[0], batches(people, **red_and_green)[0])


@pytest.mark.parametrize("crowd", ["self", "others"])
def test_crowd_holds_the_person_of_its_place(people, crowd):
    dataset = batches(people, crowd=crowd)
    assert equal(dataset[0], dataset[0])
    assert np.asarray(dataset[0].crowd).std() > 10
