import re

import numpy as np
import pytest
from PIL import Image

from dpal_edge.errors import DataError
from dpal_edge.finetune.crowds import Crowds, lay, read_cutout
from dpal_edge.finetune.frames import IGNORED, PERSON, Frame

SIZE = (120, 160)


def empty(size=SIZE):
    return Frame(np.zeros((*size, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int8))


def block(height, width, value, opacity=255):
    return np.dstack([np.full((height, width, 3), value, np.uint8), np.full((height, width), opacity, np.uint8)])


def silhouette(path):
    """Write a white figure (head, body, one arm) as a PNG cut-out; white also where it is transparent."""
    alpha = np.zeros((70, 40), np.uint8)
    alpha[5:20, 15:25] = 255
    alpha[20:60, 10:30] = 255
    alpha[25:30, 30:36] = 255
    Image.fromarray(np.dstack([np.full((70, 40, 3), 255, np.uint8), alpha])).save(path)


def seeds(people, count):
    """Yield seeds whose first draw, the number of people, is ``people``."""
    return [seed for seed in range(20 * count) if np.random.default_rng(seed).integers(13) == people][:count]


def test_boxes_are_those_of_the_masks(monkeypatch, tmp_path):
    monkeypatch.setattr("dpal_edge.finetune.crowds.change_colours", lambda pixels, *_: np.full_like(pixels, 255))
    silhouette(tmp_path / "white.png")  # white for sure: pixel values tell opacities
    crowds, exact = Crowds(tmp_path, None), 0
    for seed in seeds(1, 40):
        frame = crowds.paste(empty(), np.random.default_rng(seed))
        if not len(frame.boxes):
            continue  # the one person lies outside
        rows, columns = np.nonzero(frame.pixels[..., 0] >= 128)
        assert frame.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        exact += 1
    assert exact >= 5


def test_later_people_hide_earlier_ones():
    frame = lay(empty(), [(block(10, 10, 50), 0, 0), (block(10, 8, 90), 2, 0), (block(10, 10, 200), 40, 40)])
    assert frame.boxes.tolist() == [[0, 0, 10, 10], [2, 0, 10, 10], [40, 40, 50, 50]]  # hidden or not
    assert frame.kinds.tolist() == [IGNORED, PERSON, PERSON]  # a fifth of the first is left
    assert frame.pixels[5, 1, 0] == 50
    assert frame.pixels[5, 5, 0] == 90


@pytest.mark.parametrize(("left", "kind"), [(-7, PERSON), (-8, IGNORED), (156, PERSON), (158, IGNORED)])
def test_frame_cuts_people_off(left, kind):
    frame = lay(empty(), [(block(20, 10, 50), left, 50)])  # 3, 2, 4 and 2 of 10 columns stay
    assert frame.boxes.tolist() == [[max(left, 0), 50, min(left + 10, 160), 70]]
    assert frame.kinds.tolist() == [kind]


def test_who_lies_outside_is_not_there():
    frame = lay(empty(), [(block(10, 10, 50), 200, 0), (block(10, 10, 50), 0, -10)])
    assert frame.boxes.shape == (0, 4)
    assert not frame.pixels.any()


def test_opacity_blends_and_half_of_it_is_the_person():
    soft = block(4, 10, 200)
    soft[:, :3, 3] = 102  # 0.4: seen, but not the person
    frame = lay(empty(), [(soft, 0, 0)])
    assert frame.boxes.tolist() == [[3, 0, 10, 4]]
    assert frame.pixels[0, 0, 0] == 80


def test_people_who_were_there_stay_unless_hidden():
    boxes = np.array([[0, 0, 10, 20], [50, 0, 60, 20], [80, 0, 90, 20]], np.float32)
    before = Frame(empty().pixels, boxes, np.array([PERSON, PERSON, IGNORED], np.int8))
    frame = lay(before, [(block(16, 10, 50), 0, 0), (block(14, 10, 50), 50, 0)])  # 0.8 and 0.7 of the boxes
    assert frame.boxes[:3].tolist() == boxes.tolist()
    assert frame.kinds.tolist() == [IGNORED, PERSON, IGNORED, PERSON, PERSON]
    assert not before.pixels.any()  # not changed


def test_a_crowd_is_a_function_of_the_generator(tmp_path):
    silhouette(tmp_path / "white.png")
    crowds = Crowds(tmp_path, None)
    one, same, other = (crowds.paste(empty(), np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(one.pixels, same.pixels)
    assert np.array_equal(one.boxes, same.boxes)
    assert not np.array_equal(one.pixels, other.pixels)


def test_numbers_and_heights_vary(tmp_path):
    silhouette(tmp_path / "white.png")
    crowds = Crowds(tmp_path, None)
    frames = [crowds.paste(empty(), np.random.default_rng(seed)) for seed in range(60)]
    counts = [len(frame.boxes) for frame in frames]
    heights = np.concatenate([frame.boxes[:, 3] - frame.boxes[:, 1] for frame in frames])
    assert min(counts) == 0
    assert max(counts) >= 9
    assert (heights < 40).any()
    assert (heights == SIZE[0]).any()  # someone fills the frame


def test_of_a_third_something_hides_a_part(tmp_path):
    Image.fromarray(block(90, 30, 255)).save(tmp_path / "white.png")
    crowds = Crowds(tmp_path, None)
    frames = [crowds.paste(empty((400, 400)), np.random.default_rng(seed)) for seed in range(150)]
    boxes = np.concatenate([frame.boxes for frame in frames if len(frame.boxes)])
    boxes = boxes[((boxes > 0) & (boxes < 400)).all(1)]  # no edge of the frame has a part in it
    shapes = (boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])  # 3 before width changes by 0.9 to 1.15
    assert 0.1 < (shapes < 2.2).mean() < 0.3  # lower part
    assert 0.03 < (shapes > 3.9).mean() < 0.15  # a side


def lip(folder, mask):
    for name in ("train_images", "train_segmentations"):
        (folder / name).mkdir()
    (folder / "train_id.txt").write_text("a\n")
    pixels = np.full((30, 20, 3), 255, np.uint8)
    Image.fromarray(pixels).save(folder / "train_images" / "a.png")
    Image.fromarray(mask).save(folder / "train_segmentations" / "a.png")


def test_people_of_a_parsing_set(tmp_path):
    mask = np.zeros((30, 20), np.uint8)
    mask[4:28, 5:16] = 3
    mask[0, 0] = 255  # nobody labelled it
    lip(tmp_path, mask)
    cutout = read_cutout(*Crowds(tmp_path, None).people[0])
    assert cutout.size == (9, 22)  # one pixel less all round
    assert np.asarray(cutout)[..., 3].min() == 255


def test_masks_that_do_not_fit(tmp_path):
    lip(tmp_path, np.ones((30, 21), np.uint8))
    with pytest.raises(DataError, match=r"a\.png: 21x30 pixels, expected 20x30 as its image has"):
        Crowds(tmp_path, None)


def test_masks_of_nobody(tmp_path):
    lip(tmp_path, np.zeros((30, 20), np.uint8))
    with pytest.raises(DataError, match=r"a\.png: shows nobody"):
        Crowds(tmp_path, None)


def test_cutouts_need_an_alpha_channel(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="mode RGB, expected a cut-out with an alpha channel"):
        Crowds(tmp_path, None)


def test_one_bad_cutout_in_many_is_left_out_and_told(tmp_path):
    for i in range(30):
        silhouette(tmp_path / f"{i:02d}.png")
    Image.new("RGBA", (20, 30), (9, 9, 9, 0)).save(tmp_path / "07.png")
    crowds = Crowds(tmp_path, None)
    assert len(crowds.people) == 29
    [problem] = crowds.problems
    assert re.search(r"07\.png: shows nobody", problem)


def test_backgrounds_that_cannot_be_read_are_left_out_and_told(tmp_path):
    for name in ("people", "places"):
        (tmp_path / name).mkdir()
    silhouette(tmp_path / "people" / "white.png")
    for i in range(25):
        Image.new("RGB", (50, 90)).save(tmp_path / "places" / f"{i:02d}.png")
    (tmp_path / "places" / "03.png").write_bytes(b"no image")
    crowds = Crowds(tmp_path / "people", tmp_path / "places")
    assert len(crowds.backgrounds) == 24
    [problem] = crowds.problems
    assert re.search(r"03\.png: cannot be read as an image", problem)


def test_backgrounds_fill_the_frame(tmp_path):
    for name in ("people", "places"):
        (tmp_path / name).mkdir()
    silhouette(tmp_path / "people" / "white.png")
    Image.new("RGB", (50, 90), (10, 20, 30)).save(tmp_path / "places" / "b.png")
    crowds = Crowds(tmp_path / "people", tmp_path / "places")
    for seed in range(10):
        frame = crowds.background(SIZE, np.random.default_rng(seed))
        assert (frame.pixels == (10, 20, 30)).all()
        assert frame.pixels.shape == (*SIZE, 3)
        assert len(frame.boxes) == len(frame.kinds) == 0


def test_folders_that_are_missing(tmp_path):
    silhouette(tmp_path / "white.png")
    for people, backgrounds in ((tmp_path / "no", None), (tmp_path, tmp_path / "no")):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'no'}: does not exist")):
            Crowds(people, backgrounds)
