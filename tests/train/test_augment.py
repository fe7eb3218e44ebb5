from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dpal_edge.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dpal_edge.train import views
from dpal_edge.train.augment import change, paste, resolve_augment, to_views
from dpal_edge.train.config import build_config
from dpal_edge.train.data import PersonBatches
from dpal_edge.train.sources import open_source
from tests.train.conftest import SIZES

CPU = torch.device("cpu")
ALL = ("base", "local", "crowd", "clean", "masked")
STD = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)


def batches(people, augment, views=ALL, batch=24, **fields):
    config = build_config({**SIZES, "batch": batch, "augment": augment, **fields})
    return PersonBatches(open_source((str(people),)), config, views)


def tensor(array):
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def levels(images):
    return (255 * images[0]).permute(1, 2, 0)


@pytest.fixture(scope="module")
def picture():
    """Smooth shapes with noise, as photos are."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (8, 6, 3)).astype(np.uint8)).resize((48, 64), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(small) * 0.9 + rng.integers(0, 25, (64, 48, 3))).astype(np.uint8))


def test_pixels_are_normalised_by_hand(people):
    batch = batches(people, "workers", batch=4)[0]
    found = to_views(batch, CPU)
    for name in ("base", "local", "crowd", "clean"):
        pixels = getattr(batch, name).double() / 255
        expected = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
        assert getattr(found, name).is_contiguous()
        torch.testing.assert_close(getattr(found, name), expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.masked, batch.masked)
    assert found.keys is batch.keys


@pytest.mark.parametrize("augment", ["workers", "device"])
def test_what_was_not_asked_for_is_none(people, augment):
    found = to_views(batches(people, augment, ("base", "masked"), batch=4)[0], CPU)
    assert (found.local, found.crowd, found.clean) == (None, None, None)
    assert found.masked is not None


@pytest.mark.parametrize("crowd", ["others", "self"])
def test_device_and_workers_agree(people, crowd):
    ours, theirs = (to_views(batches(people, where, crowd=crowd)[0], CPU) for where in ("device", "workers"))
    for name in ("base", "local", "crowd"):
        difference = ((getattr(ours, name) - getattr(theirs, name)) * STD).abs().mean((1, 2, 3))  # gray levels
        assert difference.mean() < 2
        assert difference.max() < 6
    assert torch.equal(ours.clean, theirs.clean)
    assert torch.equal(ours.masked, theirs.masked)
    assert torch.equal(ours.keys, theirs.keys)


def test_device_and_workers_agree_on_real_crowds(people, tmp_path, picture):
    picture.save(tmp_path / "x.png")
    more = {"crowd_source": "mixed", "crowd_data": [str(tmp_path)]}
    batch = batches(people, "device", **more)[0]
    assert 3 < (batch.boxes[:, 0, 2] == 0).sum() < 21  # nobody is pasted into what is a crowd already
    ours, theirs = to_views(batch, CPU), to_views(batches(people, "workers", **more)[0], CPU)
    assert ((ours.crowd - theirs.crowd) * STD).abs().mean() < 2


@pytest.mark.parametrize("crowd", ["others", "self"])
def test_people_are_pasted_into_the_same_boxes(people, crowd):
    """Over black, with white people and no changes of colour, both ways paint the same pixels."""
    batch = batches(people, "device", batch=8, crowd=crowd)[0]
    looks = {name: torch.tensor([views.Look().row()]).expand(len(look), -1) for name, look in batch.looks.items()}
    white = {name: torch.full_like(getattr(batch, name), 255) for name in ("base", "local")}
    plain = replace(batch, looks=looks, crowd=torch.zeros_like(batch.crowd), **white)
    found = to_views(plain, CPU).crowd * STD + 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    for image, boxes in zip(found, batch.boxes.tolist(), strict=True):
        person = np.full((9, 9, 3), 255, np.uint8)
        expected = views.paste(np.zeros((64, 48, 3), np.uint8), [person, person], [tuple(box) for box in boxes])
        assert (image.permute(1, 2, 0) - torch.from_numpy(expected)).abs().max() < 1


LOOKS = [
    views.Look(),
    views.Look(factors=(1.4, 1, 1)),
    views.Look(factors=(1, 0.6, 1)),
    views.Look(factors=(1, 1, 1.2)),
    views.Look(hue=0.1),
    views.Look(hue=-0.07),
    views.Look(gray=True),
    views.Look(solarise=True),
    views.Look(blur=0.4),
    views.Look(blur=2.0),
    views.Look(factors=(1.4, 0.6, 0.8), hue=-0.1, order=(3, 2, 1, 0), blur=1.0),
    views.Look(factors=(1.4, 0.6, 0.8), hue=-0.1, order=(0, 3, 1, 2), solarise=True),
    views.Look(factors=(0.6, 1.4, 1.2), hue=0.1, order=(1, 2, 0, 3), gray=True),
    views.Look(factors=(0.6, 1.4, 1.2), hue=0.1, order=(2, 0, 3, 1)),
]


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_the_same_on_the_device(picture, look):
    found = levels(change(tensor(np.asarray(picture)), torch.tensor([look.row()])))
    expected = torch.from_numpy(views.Cut(picture, look).pixels().copy())
    assert (found - expected).abs().mean() < 2  # Pillow rounds after each step and blurs by three boxes
    assert (found - expected).abs().max() < 16


def test_each_image_has_its_own_look(picture):
    images = tensor(np.asarray(picture)).expand(len(LOOKS), -1, -1, -1)
    together = change(images, torch.tensor([look.row() for look in LOOKS]))
    for look, image in zip(LOOKS, together, strict=True):
        torch.testing.assert_close(image, change(images[:1], torch.tensor([look.row()]))[0], rtol=0, atol=1e-5)
    assert len({image.numpy().tobytes() for image in together}) == len(LOOKS)


def test_a_blur_by_hand():
    line = torch.zeros(1, 3, 1, 31)
    line[..., 15] = 1
    found = change(line, torch.tensor([views.Look(blur=1.0).row()]))[0, 0, 0]
    # exp(-1/2) and exp(-2) beside the centre, over the sum of all.
    assert (found[16] / found[15]).item() == pytest.approx(np.exp(-0.5), rel=1e-4)
    assert (found[13] / found[15]).item() == pytest.approx(np.exp(-2), rel=1e-4)
    assert found.sum().item() == pytest.approx(1, rel=1e-5)


def test_borders_do_not_darken():
    bright = torch.ones(1, 3, 9, 9)
    found = change(bright, torch.tensor([views.Look(blur=2.0).row()]))
    torch.testing.assert_close(found, bright, rtol=0, atol=1e-5)


@pytest.mark.parametrize("box", [(0, 0, 64, 48), (3, 7, 30, 15), (40, 10, 9, 31), (0, 0, 100, 80), (50, 60, 1, 1)])
def test_a_pasted_person_is_resized_as_pillow_does(picture, box):
    background = np.random.default_rng(0).integers(0, 256, (100, 80, 3)).astype(np.uint8)
    found = levels(paste(tensor(background), tensor(np.asarray(picture)), torch.tensor([box])))
    expected = torch.from_numpy(views.paste(background, [np.asarray(picture)], [box]))
    assert (found - expected).abs().max() <= 2


def test_nobody_is_pasted_into_a_box_without_height(picture):
    background = torch.rand(1, 3, 100, 80)
    assert torch.equal(paste(background, tensor(np.asarray(picture)), torch.zeros(1, 4, dtype=torch.long)), background)


@pytest.mark.parametrize("batch", [2, 6])
def test_splits_give_the_same_views_on_the_device(people, batch):
    """An odd part is left to the workers, whose pixels differ from the device's by their rounding."""
    whole = to_views(batches(people, "device", batch=batch)[0], CPU)
    config = build_config({**SIZES, "batch": batch, "augment": "device", "accumulate": 2})
    halves = PersonBatches(open_source((str(people),)), config, ALL)
    parts = [to_views(halves[i], CPU) for i in range(2)]
    for name in ("base", "crowd"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert ((joined - getattr(whole, name)) * STD).abs().mean() < 2


def test_where_to_augment():
    def resolved(augment, device):
        return resolve_augment(build_config({**SIZES, "augment": augment}), torch.device(device)).augment

    assert resolved("auto", "cuda") == "device"
    assert resolved("auto", "cpu") == "workers"
    assert resolved("workers", "cuda") == "workers"
    assert resolved("device", "cpu") == "device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pinned_batch_gives_the_same_views_on_a_gpu(people):
    batch = batches(people, "device")[0]
    on_cpu, on_gpu = to_views(batch, CPU), to_views(batch.pin_memory(), torch.device("cuda"))
    for name in ("base", "local", "crowd", "clean"):
        torch.testing.assert_close(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), rtol=0, atol=0.02)
    assert on_gpu.keys.device == CPU
