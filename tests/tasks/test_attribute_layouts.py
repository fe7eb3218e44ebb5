"""Attribute sets as they are published."""

import pickle
import sys

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from dpal_edge.errors import BackendUnavailable, DataError
from dpal_edge.tasks.attribute_layouts import read_attributes
from tests.tasks import attribute_fixtures as sets
from tests.tasks.layouts import ATTRIBUTES, write_attributes

PARTS = ([2, 4, 6, 8], [1, 3], [5, 7, 9])  # images, 1 the first
TRAIN = [1, 3, 5, 7, 0, 2]  # rows
TEST = [4, 6, 8]


def _values(split):
    return np.stack([sample.target for sample in split.samples])


def test_table(tmp_path):
    assert read_attributes(write_attributes(tmp_path), "val").labels == ATTRIBUTES


@pytest.mark.parametrize("mat", ["annotation.mat", "annotation/annotation.mat"])
@pytest.mark.parametrize("images", ["data", "release_data", "release_data/release_data"])
def test_pa100k(tmp_path, mat, images):
    values = sets.flags(9, 26)
    sets.write_pa100k(tmp_path, values, (5, 1, 3), images=images, mat=mat)  # one of validation: SciPy squeezes it
    train, test = read_attributes(tmp_path, "train"), read_attributes(tmp_path, "val")
    assert (train.labels, train.protocol, train.problems) == (sets.PA100K, "pa100k", ())
    assert (_values(train) == values[:6]).all()
    assert (_values(test) == values[6:]).all()
    assert test.samples[0].image == tmp_path / images / "000007.jpg"
    assert test.samples[0].image.is_file()


def test_peta(tmp_path):
    values = sets.flags(9, 105)
    sets.write_peta(tmp_path, values, PARTS)
    train, test = read_attributes(tmp_path, "train"), read_attributes(tmp_path, "val")
    assert (train.labels, train.protocol, train.problems) == (sets.PETA[:35], "peta", ())
    assert (_values(train) == values[TRAIN, :35]).all()
    assert (_values(test) == values[TEST, :35]).all()
    assert [sample.image.name for sample in test.samples] == ["00005.png", "00007.png", "00009.png"]


@pytest.mark.parametrize("mat", ["RAP_annotation.mat", "RAP_annotation/RAP_annotation.mat"])
def test_rap(tmp_path, mat):
    values = sets.flags(9, 152)
    values[:, 0], values[0, 2] = 2, 2  # the annotators were not sure
    sets.write_rap(tmp_path, values, PARTS, mat=mat)
    train, test = read_attributes(tmp_path, "train"), read_attributes(tmp_path, "val")
    assert (train.labels[:3], len(train.labels)) == (("attribute0", "attribute2", "attribute4"), 54)
    assert (train.protocol, train.problems) == ("rapv2", ())
    expected = values[:, sets.RAP_SELECTED] == 1
    assert (_values(train) == expected[TRAIN]).all()
    assert (_values(test) == expected[TEST]).all()
    assert not expected[:, 0].any()
    assert test.samples[0].image.name.startswith("CAM04-")


def test_fixtures_are_nested_as_the_originals(tmp_path):
    """The paths of indices are those that published code reads the originals with."""
    sets.write_peta(tmp_path, sets.flags(9, 105), PARTS)
    peta = loadmat(tmp_path / "PETA.mat")["peta"]
    assert peta[0][0][1][4, 0][0] == "attribute4"
    assert (peta[0][0][3][0][0][0][0][2][:, 0]).tolist() == PARTS[2]
    sets.write_rap(tmp_path, sets.flags(9, 152), PARTS, mat="RAP_annotation.mat")
    rap = loadmat(tmp_path / "RAP_annotation.mat")["RAP_annotation"]
    assert rap["name"][0][0][3][0][0].startswith("CAM03-")
    assert rap["partition_attribute"][0][0][0][0]["test_index"][0][0][0].tolist() == PARTS[2]
    assert rap["selected_attribute"][0][0][0][:2].tolist() == [1, 3]


def test_bad_annotations_are_left_out_and_many_stop(tmp_path):
    values = sets.flags(100, 105)
    values[9, 3] = 2
    test = [*range(1, 61), 7, 101]
    path = sets.write_peta(tmp_path, values, ([61], [62], test)) / "PETA.mat"
    (tmp_path / "images" / "00004.png").unlink()
    with pytest.raises(DataError, match=r"row 4, 00004\.png: no image .* \(and 3 more of 62\); more than 5 % are bad"):
        read_attributes(tmp_path, "val")
    sets.write_peta(tmp_path, values, ([61], [62], [*range(1, 100), 7, 101]))
    (tmp_path / "images" / "00004.png").unlink()
    split = read_attributes(tmp_path, "val")
    assert len(split.samples) == 97
    assert split.problems == (
        f"{path}: row 4, 00004.png: no image {tmp_path / 'images' / '00004.png'}",
        f"{path}: row 10, 00010.png: values [0.0, 1.0, 2.0]; expected 0 or 1",
        f"{path}: row 7, 00007.png: is in the partition before; expected each image once",
        f"{path}: row 101: is in the partition; expected 1 to 100",
    )
    assert read_attributes(tmp_path, "train").problems == ()


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "dataset_all.pkl").write_bytes(pickle.dumps({"image_name": []}))
    with pytest.raises(DataError, match=r"dataset_all\.pkl: a pickle, which can run programs .*PETA\.mat, or RAP_ann"):
        read_attributes(tmp_path, "train")
    sets.write_peta(tmp_path, sets.flags(9, 105), PARTS)
    assert len(read_attributes(tmp_path, "train").samples) == 6


def test_other_layouts_are_told_what_is_expected(tmp_path):
    known = (
        "'val' is in none of .*a table attributes.csv: .*RAPv2: .*PETA: .*PA-100K: the PA-100K layout: annotation.mat"
    )
    with pytest.raises(DataError, match=known):
        read_attributes(tmp_path, "val")


@pytest.mark.parametrize(
    ("write", "images"),
    [
        (lambda folder: sets.write_pa100k(folder, sets.flags(9, 26), (5, 1, 3)), "data"),
        (lambda folder: sets.write_peta(folder, sets.flags(9, 105), PARTS), "images"),
        (lambda folder: sets.write_rap(folder, sets.flags(9, 152), PARTS), "RAP_dataset"),
    ],
)
def test_the_folder_of_images_is_needed(tmp_path, write, images):
    (write(tmp_path) / images).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{images}: missing; expected the .* layout: .*images in {images}/"):
        read_attributes(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "variables", "reason"),
    [
        ("annotation.mat", {"attributes": sets.cell(sets.PA100K)}, "KeyError: 'train_images_name'"),
        ("PETA.mat", {"peta": {"data": np.zeros((4, 109))}}, "ValueError: not enough values"),
        ("PETA.mat", {"peta": np.zeros(3)}, "AttributeError"),
        ("RAP_annotation.mat", {"RAP_annotation": {"imagesname": sets.cell(["a.png"])}}, "KeyError"),  # RAPv1
    ],
)
def test_mat_files_of_another_structure(tmp_path, name, variables, reason):
    for images in ("data", "images", "RAP_dataset"):
        (tmp_path / images).mkdir()
    savemat(tmp_path / name, variables)
    with pytest.raises(DataError, match=rf"{name}: holds something else \({reason}.*\); expected the .* layout"):
        read_attributes(tmp_path, "train")


def test_numbers_of_images_and_attributes_must_fit(tmp_path):
    sets.write_pa100k(tmp_path, sets.flags(9, 26), (5, 1, 3))
    variables = {k: v for k, v in loadmat(tmp_path / "annotation.mat").items() if not k.startswith("_")}
    savemat(tmp_path / "annotation.mat", variables | {"test_images_name": sets.cell(["000007.jpg", "000008.jpg"])})
    with pytest.raises(DataError, match=r"values \(3, 26\) for 2 images and 26 attributes"):
        read_attributes(tmp_path, "val")
    savemat(
        tmp_path / "annotation.mat", variables | {"test_images_name": sets.cell([]), "test_label": sets.flags(0, 26)}
    )
    with pytest.raises(DataError, match="no image in this part"):
        read_attributes(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "MatReadError: Mat file appears to be truncated"),
        (b"a text, not a mat file" * 20, "ValueError: Unknown mat file type"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400), "NotImplementedError: Please use HDF reader"),
    ],
)
def test_damaged_mat_files(tmp_path, content, reason):
    (tmp_path / "images").mkdir()
    (tmp_path / "PETA.mat").write_bytes(content)
    with pytest.raises(DataError, match=rf"PETA\.mat: cannot be read as a \.mat file \({reason}.*expected the PETA"):
        read_attributes(tmp_path, "train")


def test_a_mat_file_cut_short_is_named(tmp_path):
    path = sets.write_rap(tmp_path, sets.flags(9, 152), PARTS) / "RAP_annotation" / "RAP_annotation.mat"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"RAP_annotation\.mat: cannot be read as a \.mat file"):
        read_attributes(tmp_path, "train")


def test_mat_files_need_scipy(tmp_path, monkeypatch):
    sets.write_peta(tmp_path, sets.flags(9, 105), PARTS)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(BackendUnavailable, match=r"PETA\.mat: \.mat files need SciPy: pip install"):
        read_attributes(tmp_path, "train")


def test_real_data(shared):
    split = read_attributes(shared / "data" / "ccp", "val")
    assert (len(split.samples), len(split.labels), split.problems) == (210, 16, ())
