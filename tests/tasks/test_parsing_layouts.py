"""Human parsing sets as they are published."""

import shutil

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.tasks.labels import flip_pairs
from dpal_edge.tasks.parsing import LIP_CLASSES, read_mask
from dpal_edge.tasks.parsing_layouts import ATR_CLASSES, CIHP_CLASSES, read_parsing
from tests.tasks.layouts import SIZE, write_lip
from tests.tasks.parsing_fixtures import write_atr, write_cihp


def test_lip(tmp_path):
    split = read_parsing(write_lip(tmp_path, classes=False), "val")
    assert (len(split.samples), split.labels, split.protocol) == (10, LIP_CLASSES, "lip")


def test_cihp(tmp_path):
    root = write_cihp(tmp_path) / "instance-level_human_parsing"
    split = read_parsing(tmp_path, "train")
    assert split == read_parsing(root, "train")
    assert (len(split.samples), split.labels, split.protocol, split.problems) == (10, CIHP_CLASSES, "cihp", ())
    assert split.samples[0].image == root / "Training" / "Images" / "0000006.jpg"
    mask = read_mask(split.samples[0], split.labels)
    assert mask.shape == (SIZE[0], 2 * SIZE[1])
    assert set(np.unique(mask)) == {0, 16, 17}
    assert (split.labels[10], split.labels[16]) == ("torso-skin", "left-leg")
    assert flip_pairs(split.labels) == ((14, 15), (16, 17), (18, 19))


def test_cihp_needs_only_the_part_that_is_read(tmp_path):
    root = write_cihp(tmp_path) / "instance-level_human_parsing"
    shutil.rmtree(root / "Training")
    assert len(read_parsing(root, "val").samples) == 10
    with pytest.raises(DataError, match=r"Training/train_id\.txt: missing; expected the CIHP layout: Training/ and"):
        read_parsing(root, "train")
    (root / "Validation" / "Category_ids").rename(root / "Validation" / "Categories")
    with pytest.raises(DataError, match="Validation/Category_ids: missing; expected the CIHP layout"):
        read_parsing(root, "val")


@pytest.mark.parametrize("lists", ["", "list"])
@pytest.mark.parametrize("inner", ["", "humanparsing"])
def test_atr(tmp_path, lists, inner):
    write_atr(tmp_path / inner, lists=lists)
    split = read_parsing(tmp_path, "val")
    assert (len(split.samples), split.labels, split.protocol) == (10, ATR_CLASSES, "atr")
    assert split.samples[0].image == tmp_path / inner / "JPEGImages" / "2500_10.jpg"
    assert set(np.unique(read_mask(split.samples[0], split.labels))) == {0, 12, 13}
    assert flip_pairs(split.labels) == ((9, 10), (12, 13), (14, 15))
    (tmp_path / inner / lists / "train_id.txt").unlink()
    with pytest.raises(DataError, match=r"train_id\.txt: missing; expected the ATR layout"):
        read_parsing(tmp_path, "train")


def test_bad_annotations_are_left_out_and_many_stop(tmp_path):
    listing = write_atr(tmp_path, images=40) / "train_id.txt"
    (tmp_path / "SegmentationClassAug" / "2500_3.png").unlink()
    listing.write_text(listing.read_text() + "2500_7\n")
    split = read_parsing(tmp_path, "train")
    assert len(split.samples) == 39
    first, second = split.problems
    assert first.startswith(f"{listing}: line 4: names '2500_3', which is not in {tmp_path / 'SegmentationClassAug'}")
    assert second == f"{listing}: line 41: '2500_7' is listed before; expected each image once"
    (tmp_path / "JPEGImages" / "2500_0.jpg").unlink()
    with pytest.raises(DataError, match=r"line 1: names '2500_0'.* \(and 2 more of 41\); more than 5 % are bad"):
        read_parsing(tmp_path, "train")


def test_other_layouts_are_told_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"'val' is in none of .*CIHP: .*ATR: .*LIP: the LIP layout: val_id\.txt"):
        read_parsing(tmp_path, "val")


def test_real_data(shared):
    split = read_parsing(shared / "data" / "ccp", "val")
    assert (len(split.samples), len(split.labels), split.problems) == (100, 10, ())
