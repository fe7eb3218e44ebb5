"""Images as their annotations and their cameras mean them."""

import cv2
import numpy as np
import pytest
from PIL import Image

from dpal_edge.errors import DataError
from dpal_edge.tasks.detection_layouts import read_detection
from dpal_edge.tasks.image import open_image, open_sample, read_size
from dpal_edge.tasks.pose import read_coco_keypoints
from dpal_edge.tasks.sample import Sample
from tests.tasks import layouts
from tests.tasks.detection_fixtures import write_coco_boxes
from tests.tasks.pose_fixtures import edit_json


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright_as_opencv_reads_them(tmp_path, orientation):
    pixels = np.kron(np.arange(8, dtype=np.uint8).reshape(2, 4) * 30, np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).convert("RGB").save(path, exif=exif, quality=100, subsampling=0)
    wanted = cv2.imread(str(path))[..., ::-1]
    seen = np.asarray(open_image(path, "RGB"))
    assert np.abs(seen.astype(int) - wanted).max() <= 3  # two decoders of JPEG
    assert read_size(path) == wanted.shape[:2]


def test_an_annotation_of_another_image_is_refused(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert open_sample(Sample(tmp_path / "a.png", None, size=(20, 30))).size == (30, 20)
    with pytest.raises(DataError, match=r"a\.png: 30x20 pixels, upright, but annotated as 20x30"):
        open_sample(Sample(tmp_path / "a.png", None, size=(30, 20)))
    with pytest.raises(DataError, match=r"the box \(0, 0, 31, 20\) .* is not inside 30x20 pixels"):
        open_sample(Sample(tmp_path / "a.png", None, (0, 0, 31, 20)))


def test_readers_tell_the_size_that_was_annotated(tmp_path):
    pose = read_coco_keypoints(layouts.write_coco(tmp_path / "pose"), "val")
    assert {sample.size for sample in pose.samples} == {(layouts.SIZE[0], 2 * layouts.SIZE[1])}
    folder = write_coco_boxes(tmp_path / "frames")
    for sample in read_detection(folder, "val").samples:
        assert sample.size == read_size(sample.image)


def test_people_of_several_categories_with_the_same_joints(tmp_path):
    folder = layouts.write_coco(tmp_path)
    joints = list(layouts.JOINTS)

    def split_up(document):
        document["categories"] = [
            {"id": 5, "name": "face", "keypoints": ["nose", "chin"]},
            {"id": 1, "name": "person", "keypoints": joints},
            {"id": 2, "name": "child", "keypoints": joints},
        ]
        for annotation in document["annotations"][::2]:
            annotation["category_id"] = 2
        document["annotations"].append(
            {**document["annotations"][0], "id": 999, "category_id": 5, "keypoints": [1] * 6}
        )

    before = read_coco_keypoints(folder, "val")
    edit_json(folder / "annotations" / "person_keypoints_val.json", split_up)
    after = read_coco_keypoints(folder, "val")
    assert [sample.target.id for sample in after.samples] == [sample.target.id for sample in before.samples]
    [problem] = after.problems
    assert problem.endswith(
        "category 'face' has other keypoints than the one that is read; its 1 annotations are left out"
    )
