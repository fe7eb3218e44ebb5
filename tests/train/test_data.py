import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.files import find_images
from dpal_edge.train.config import build_config
from dpal_edge.train.data import LOCAL_CROPS, PersonBatches, split_validation
from dpal_edge.train.loop import TimedLoader
from dpal_edge.train.sources import open_source
from tests.train.conftest import SIZES, draw_person, write_people

# Newer Pythons warn that a fork may deadlock; workers are what is tested here.
FORK = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
DPAL = ("base", "local", "crowd")
ALL = (*DPAL, "clean", "masked")


def batches(folder, views=DPAL, *, part=None, rank=0, world=1, **fields):
    config = build_config({**SIZES, "batch": 4, **fields})
    return PersonBatches(open_source((str(folder),)), config, views, batch=part, rank=rank, world=world)


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def equal(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def joined(parts):
    """The batch that ``parts`` are pieces of."""
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors(parts[0])}
    crops = [part.local.chunk(LOCAL_CROPS) for part in parts]
    fields["local"] = torch.cat([crop[k] for k in range(LOCAL_CROPS) for crop in crops])
    return replace(parts[0], **fields)


def test_shapes(people):
    batch = batches(people, ALL)[0]
    assert batch.base.shape == batch.clean.shape == (4, 3, 64, 32)
    assert batch.local.shape == (LOCAL_CROPS * 4, 3, 32, 16)
    assert batch.crowd.shape == (4, 3, 64, 48)
    assert {view.dtype for view in (batch.base, batch.local, batch.crowd, batch.clean)} == {torch.uint8}
    assert (batch.masked.shape, batch.masked.dtype) == ((4, 8), torch.bool)
    assert (batch.keys.shape, batch.keys.dtype) == ((4,), torch.int64)
    assert batch.skipped == ()


@pytest.mark.parametrize("views", [("base",), ("base", "crowd"), ("clean", "masked"), DPAL])
@pytest.mark.parametrize("augment", ["workers", "device"])
def test_only_what_is_asked_for_is_made_and_nothing_depends_on_the_rest(people, views, augment):
    batch, whole = batches(people, views, augment=augment)[0], batches(people, ALL, augment=augment)[0]
    for name in ALL:
        assert (getattr(batch, name) is None) == (name not in (*views, "base"))
        if name in (*views, "base"):
            assert torch.equal(getattr(batch, name), getattr(whole, name))
    assert torch.equal(batch.keys, whole.keys)
    looks = {"base", "local", "crowd"} & {*views, "base"}
    assert batch.looks.keys() == (looks if augment == "device" else set())


def test_a_batch_is_a_function_of_seed_and_step(people):
    forwards, backwards = batches(people, ALL), batches(people, ALL)
    expected = [forwards[step] for step in range(4)]
    for step in reversed(range(4)):
        assert equal(backwards[step], expected[step])
    assert not equal(expected[0], expected[1])
    assert not equal(batches(people, ALL, seed=1)[0], expected[0])
    assert equal(batches(people, ALL, seed=1, data_seed=0)[0], expected[0])


@FORK
@pytest.mark.parametrize("augment", ["workers", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_new_start_change_nothing(people, workers, augment):
    dataset = batches(people, ALL, augment=augment)
    loader = DataLoader(dataset, sampler=range(3, 7), batch_size=None, num_workers=workers)
    found = list(loader)  # as a run does that goes on after update 3
    assert len(found) == 4
    for step, batch in zip(range(3, 7), found, strict=True):
        assert equal(batch, dataset[step])
        assert batch.looks.keys() == dataset[step].looks.keys()
        assert all(torch.equal(look, dataset[step].looks[name]) for name, look in batch.looks.items())


@FORK
def test_loader_counts_the_time_it_waited(people):
    loader = TimedLoader(batches(people), range(2), workers=1, device=torch.device("cpu"))
    assert len(list(loader)) == 2
    assert loader.waited_s > 0


@pytest.mark.parametrize("crowd", ["others", "self"])
@pytest.mark.parametrize(
    ("accumulate", "world"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (8, 1)], ids=lambda number: str(number)
)
def test_any_split_of_a_batch_gives_the_same_images(people, accumulate, world, crowd):
    whole = batches(people, ALL, batch=8, crowd=crowd)
    parts = [
        batches(people, ALL, batch=8, crowd=crowd, accumulate=accumulate, rank=rank, world=world)
        for rank in range(world)
    ]
    assert parts[0].batch * accumulate * world == 8
    for step in (0, 2, 5):
        order = [(part, step * accumulate + i) for i in range(accumulate) for part in parts]
        pieces = [part[index] for part, index in order]
        if parts[0].batch % 2:  # there the first of each part is hidden in part, as methods expect
            pieces = [replace(piece, masked=whole[step].masked[i : i + 1]) for i, piece in enumerate(pieces)]
        assert equal(joined(pieces), whole[step])
        assert [name for part, index in order for name in part.names(index)] == whole.names(step)


def test_a_batch_that_cannot_be_split_is_refused(people):
    with pytest.raises(ConfigError, match="batch is 8, expected a multiple of 6: accumulate=2 passes in each of 3 pro"):
        batches(people, batch=8, accumulate=2, world=3)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_order_by_hand(tmp_path, count):
    """Epoch e shows the pairs in the order of permutation (seed, 4, e); variant v pairs permutation (seed, 3, v)."""
    folder = write_people(tmp_path / "crops", count)
    names = [str(path) for path in find_images((str(folder),)).paths]
    dataset = batches(folder, ("base",), batch=1, seed=7, view_variants=2)
    length, group = max(count - count % 2, 1), min(count, 2)
    position = 0
    for epoch in range(4):
        variant = epoch % 2
        pairs = np.random.default_rng([7, 4, epoch]).permutation(length // group)
        images = np.random.default_rng([7, 3, variant]).permutation(count)
        for pair in pairs:
            for member in range(group):
                number = group * pair + member
                assert dataset.names(position) == [names[images[number]]]
                assert dataset[position].keys.tolist() == [variant * length + number]
                position += 1


def test_the_same_key_is_the_same_views(people):
    dataset = batches(people, ALL, batch=6, view_variants=2)
    seen, again = {}, 0
    for step in range(16):  # four epochs of 24
        batch = dataset[step]
        for i, key in enumerate(batch.keys.tolist()):
            views = [batch.base[i], batch.clean[i], batch.crowd[i], *batch.local.view(LOCAL_CROPS, 6, 3, 32, 16)[:, i]]
            if key in seen:
                again += 1
                assert all(torch.equal(one, other) for one, other in zip(views, seen[key], strict=True))
            seen[key] = views
    assert sorted(seen) == list(range(48))
    assert again == 48
    assert batches(people, view_variants=None)[6].keys.min() >= 24  # every epoch has views of its own


@pytest.mark.parametrize("batch", [1, 4, 5, 24])
def test_epochs_are_permutations(people, batch):
    dataset = batches(people, batch=batch)
    order = [name for step in range(-(-72 // batch)) for name in dataset.names(step)]
    epochs = [order[:24], order[24:48], order[48:72]]
    for epoch in epochs:
        assert len(set(epoch)) == 24
    assert epochs[0] != epochs[1] != epochs[2]


def test_of_an_odd_number_of_images_another_stays_out_in_each_epoch(tmp_path):
    dataset = batches(write_people(tmp_path / "crops", 5), batch=4)
    epochs = [frozenset(dataset.names(step)) for step in range(12)]
    assert {len(epoch) for epoch in epochs} == {4}
    assert len(set(epochs)) > 2


def test_batch_larger_than_the_data(people):
    assert batches(people, batch=50)[0].base.shape[0] == 50


def test_a_lonely_image_is_its_own_company(tmp_path):
    batch = batches(write_people(tmp_path / "crops", 1), ALL, batch=3, augment="device")[0]
    assert (len(batch.crowd), batch.looks) == (3, {})
    assert batch.keys.tolist() == [0, 1, 2]


def test_validation_takes_its_own_batch_size(people):
    dataset = batches(people, part=6, batch=8, accumulate=2)
    assert (dataset.batch, len(dataset[1].base)) == (6, 6)
    assert dataset.names(1) == batches(people, batch=24).names(0)[6:12]


def test_masks_hide_exactly_half_of_every_second_image(people):
    batch = batches(people, ("base", "masked"), batch=6, size=[80, 48])[3]
    assert batch.masked.sum(1).tolist() == [7, 0, 7, 0, 7, 0]  # int(15 / 2)
    assert not torch.equal(batch.masked[0], batch.masked[2])
    odd = batches(people, ("base", "masked"), batch=3)[1]
    assert odd.masked.sum(1).tolist() == [4, 0, 4]


def test_clean_is_base_without_colours(people):
    batch = batches(people, ("base", "clean"), batch=24)[0]
    sharp = [image.float().diff(dim=-1).abs().mean((1, 2, 3)) for image in (batch.clean, batch.base)]
    assert (sharp[0] > sharp[1]).float().mean() > 0.9  # base is always blurred
    dataset = batches(people, ("base", "clean"), batch=24, augment="device")
    assert dataset[0].clean is dataset[0].base or torch.equal(dataset[0].clean, dataset[0].base)
    assert torch.equal(dataset[0].clean, batch.clean)


@pytest.mark.parametrize("orientation", range(9))  # 0 is none of the known
def test_orientation_of_cameras_is_applied(tmp_path, orientation):
    for name in ("stored", "shown"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw_person(tmp_path / "x.png", seed=0)
    with Image.open(tmp_path / "x.png") as image:
        image.save(tmp_path / "stored" / "x.png", exif=exif)
    with Image.open(tmp_path / "stored" / "x.png") as image:
        ImageOps.exif_transpose(image).save(tmp_path / "shown" / "x.png")
    assert equal(batches(tmp_path / "stored", ALL, batch=1)[0], batches(tmp_path / "shown", ALL, batch=1)[0])


def test_local_crops_are_grouped_by_crop(tmp_path):
    for i, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        Image.new("RGB", (48, 96), colour).save(tmp_path / f"{i}.png")
    dataset = batches(tmp_path, batch=2, augment="device")  # which leaves the colours
    for step in range(4):
        batch = dataset[step]
        base = batch.base.float().mean((2, 3)).argmax(1)
        local = batch.local.float().mean((2, 3)).argmax(1).view(LOCAL_CROPS, 2)
        assert sorted(base.tolist()) == [0, 2]
        assert local.tolist() == [base.tolist()] * LOCAL_CROPS


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
    for place, name in enumerate(dataset.names(0)):
        assert torch.equal(batch.base[place], whole.base[place]) == (name != str(bad))
    halves = batches(folder, batch=6, accumulate=3)
    assert equal(joined([halves[0], halves[1], halves[2]]), batch)


def test_a_field_of_another_type_is_damage(tmp_path):
    folder = write_people(tmp_path / "crops", 3)
    Image.new("RGB", (8, 8)).save(folder / "x.tif")
    content = (folder / "x.tif").read_bytes()
    offsets, number, text = (273).to_bytes(2, "little"), (4).to_bytes(2, "little"), (2).to_bytes(2, "little")
    assert content.count(offsets + number) == 1  # the field that says where the pixels lie
    (folder / "x.tif").write_bytes(content.replace(offsets + number, offsets + text))
    [(path, reason)] = batches(folder, batch=4)[0].skipped
    assert path == str(folder / "x.tif")
    assert reason.startswith("TypeError: 'str' object")


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
    dataset = batches(folder, ("base",), part=2, batch=62)
    skipped = {}
    for index in range(31):
        with contextlib.suppress(DataError):  # twenty others may be damaged as well
            skipped.update(dataset[index].skipped)
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
    dataset = batches(tmp_path, ("base",), batch=84)
    assert len(dataset[0].skipped) >= 24  # of 85 images one stays out


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


@pytest.mark.parametrize(("images", "wanted", "given"), [(100, 8, 8), (100, 64, 10), (9, 64, 0), (20, 0, 0)])
def test_validation_is_disjoint_seeded_and_at_most_a_tenth(tmp_path, images, wanted, given):
    for i in range(images):
        (tmp_path / f"{i:03d}.jpg").touch()
    source = open_source((str(tmp_path),))
    train, held_out = (list(part.names) for part in split_validation(source, wanted, 0))
    assert len(held_out) == given
    assert sorted(train + held_out) == list(source.names)
    assert [list(part.names) for part in split_validation(source, wanted, 0)] == [train, held_out]
    if given:
        assert list(split_validation(source, wanted, 1)[1].names) != held_out


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


def test_missing_crowds_and_backgrounds_are_named(people, tmp_path):
    for name, more in (("backgrounds", {}), ("crowd_data", {"crowd_source": "real"})):
        with pytest.raises(DataError, match="nowhere: does not exist"):
            batches(people, **{name: [str(tmp_path / "nowhere")]}, **more)


@pytest.mark.parametrize("crowd", ["self", "others"])
def test_a_crowd_is_made_of_a_pair_alone(people, crowd):
    """Replacing all other images of the batch by copies of one changes no pixel of the first pair's views."""
    dataset = batches(people, batch=8, crowd=crowd)
    before = dataset[0]
    names = dataset.names(0)
    keep = {*names[:2]}
    source = open_source((str(people),))
    contents = source.read(range(24))
    blobs = {name: contents[i] if name in keep else contents[0] for i, name in enumerate(source.names)}

    class Changed(type(source)):
        def read(self, indices):
            return [blobs[self.names[index]] for index in indices]

    changed = Changed(source._table, source._rows, (), {})
    after = PersonBatches(changed, dataset.config, DPAL)[0]
    for name in ("base", "crowd"):
        assert torch.equal(getattr(after, name)[:2], getattr(before, name)[:2])
        assert not torch.equal(getattr(after, name)[2:], getattr(before, name)[2:])
