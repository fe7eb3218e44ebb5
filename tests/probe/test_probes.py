"""The probes, on features whose answer is known."""

import numpy as np
import pytest

from dpal_edge.errors import DataError
from dpal_edge.probe.command import probe_tasks, read_splits
from dpal_edge.probe.probes import Bench, class_shares, joint_heat, locate_joints
from dpal_edge.probe.subset import limit_splits
from dpal_edge.tasks.pose import Pose, read_coco_keypoints
from dpal_edge.tasks.reid import Identity
from dpal_edge.tasks.sample import Sample, Split
from tests.probe.colours import Colours, Corners
from tests.tasks.layouts import save_image, write_coco, write_lip


@pytest.fixture
def colours():
    return Colours((16, 8), np.eye(3))


def _probe(name, folders, extractor, **settings):
    folder = {name: folders[name]}
    return probe_tasks(extractor, folder, read_splits(folder, None, 0), **settings)[name]


def test_shares_by_hand():
    mask = np.full((16, 16), 255, np.uint8)
    mask[:8, :8] = 1
    mask[:2, :8] = 0
    mask[8:, 12:] = 2
    shares = class_shares(mask, (2, 2), 3)
    np.testing.assert_allclose(shares, [[[0.25, 0.75, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]])
    # Looked at in the middle of equal parts, whatever the size.
    np.testing.assert_allclose(class_shares(mask.repeat(3, 0).repeat(5, 1), (2, 2), 3), shares)


def _person(joints, labelled=None, box=(10.0, 20.0, 90.0, 180.0)):
    labelled = np.ones(len(joints), bool) if labelled is None else np.array(labelled)
    return Sample("image", Pose(0, 0, np.array(joints, np.float32), labelled, 1.0), box)


def test_heat_by_hand():
    # Patches of 10 x 10 pixels: the first joint is in the middle of patch (row 2, column 3), the second at its edge.
    heat = joint_heat(_person([[45, 45], [50, 45], [45, 45]], [True, True, False]), (16, 8))
    assert heat.shape == (16, 8, 3)
    assert heat[2, 3, 0] == 1.0
    assert heat[2, 4, 0] == heat[1, 3, 0] == pytest.approx(np.exp(-1 / (2 * 0.7**2)))
    assert heat[2, 3, 1] == heat[2, 4, 1] == pytest.approx(np.exp(-0.25 / (2 * 0.7**2)))
    assert not heat[..., 2].any()


def test_joints_are_found_again_in_their_heat():
    joints = np.random.default_rng(0).uniform((20, 30), (80, 170), (50, 2))
    person = _person(joints)
    found = locate_joints(joint_heat(person, (16, 8)), person)
    assert np.abs(found - joints).max() < 2.0  # of a patch of 10 pixels
    corner = locate_joints(-np.ones((16, 8, 1)), person)  # no heat at all: still inside the box
    assert (corner >= (10, 20)).all()
    assert (corner <= (90, 180)).all()


def test_people_are_told_by_colour(folders, colours):
    result = _probe("reid", folders, colours)
    assert result.images == {"query": 6, "gallery": 7}
    assert result.penalty is None
    assert list(result.metrics) == [f"{p}{m}" for p in ("", "patch_", "strip_") for m in ("mAP", "rank-1", "rank-5")]
    assert result.metrics["strip_mAP"] == 1.0
    blind = _probe("reid", folders, Colours((16, 8), np.zeros((3, 2))))
    assert blind.metrics["mAP"] < 0.6


def test_strips_tell_above_from_below(tmp_path, colours):
    # Eight people in the same four colours, each in another order; the second camera is a little darker.
    rng = np.random.default_rng(0)
    wardrobe = rng.integers(40, 255, (4, 3))
    for person in range(8):
        image = wardrobe[rng.permutation(4)].repeat(8, 0)[:, None].repeat(16, 1)
        save_image(tmp_path / "query" / f"{person:04d}_c1s1_0.png", image)
        save_image(
            tmp_path / "bounding_box_test" / f"{person:04d}_c2s1_0.png", image - rng.integers(0, 40, image.shape)
        )
    metrics = _probe("reid", {"reid": tmp_path}, colours).metrics
    assert metrics["strip_mAP"] == 1.0
    assert metrics["patch_mAP"] < 0.7


def test_parts_are_found_by_colour(folders, colours):
    result = _probe("parsing", folders, colours)
    assert result.images == {"train": 10, "val": 10}
    assert result.metrics["mIoU"] > 0.85
    assert result.penalty < 1
    blind = _probe("parsing", folders, Colours((16, 8), np.zeros((3, 2))))
    # Background everywhere: its share of what is labelled, and nothing of the two others.
    background = blind.metrics["pixel_accuracy"]
    assert blind.metrics == pytest.approx(
        {"mIoU": background / 3, "pixel_accuracy": background, "mean_accuracy": 1 / 3}
    )


def test_joints_are_found_by_colour(folders):
    result = _probe("pose", folders, Corners((16, 8)))
    assert result.images == {"train": 12, "val": 12}
    assert next(iter(result.metrics)) == "PCK@0.2"
    assert result.metrics["PCK@0.2"] > 0.7
    assert 0 < result.metrics["OKS_AP"] <= result.metrics["OKS_AP50"]
    assert _probe("pose", folders, Colours((16, 8), np.zeros((3, 2)))).metrics["PCK@0.2"] < 0.1


def test_attributes_are_told_by_colour(folders, colours):
    result = _probe("attributes", folders, colours)
    assert result.metrics == {
        "mA": 1.0,
        "accuracy": 0.75,
        "precision": 0.75,
        "recall": 0.75,
        "F1": 0.75,
    }  # 1/4 has none
    assert _probe("attributes", folders, Colours((16, 8), np.zeros((3, 2)))).metrics["mA"] == 0.5


def test_a_rare_attribute_is_found(tmp_path, colours):
    # One in eight is red: half the squared error goes to saying that nobody is.
    rng = np.random.default_rng(0)
    lines = ["image,split,red,all"]
    for i in range(64):
        red = i % 8 == 0
        save_image(tmp_path / f"{i}.png", rng.normal(100 + 30 * red, 10, (32, 16, 3)).clip(0, 255))
        lines.append(f"{i}.png,{'train' if i < 32 else 'val'},{int(red)},1")
    (tmp_path / "attributes.csv").write_text("\n".join(lines))
    result = _probe("attributes", {"attributes": tmp_path}, colours)
    assert result.metrics["mA"] == 1.0
    assert result.metrics["recall"] == 1.0  # what all have is predicted for all


@pytest.mark.parametrize("name", ["reid", "parsing", "pose", "attributes"])
def test_the_batch_size_changes_nothing(name, folders):
    one, other = (_probe(name, folders, Corners((16, 8)), batch=batch) for batch in (5, 32))
    assert one.metrics == pytest.approx(other.metrics, abs=1e-6)
    assert one.penalty == other.penalty


def test_progress_counts_every_image(folders, colours):
    done = []
    splits = read_splits(folders, None, 0)
    probe_tasks(colours, folders, splits, batch=4, advance=done.append)
    assert sum(done) == sum(len(split.samples) for parts in splits.values() for split in parts.values())
    assert max(done) == 4


def test_one_training_image_is_too_few(folders, colours):
    sample = read_coco_keypoints(folders["pose"], "train").samples[:1]
    with pytest.raises(DataError, match="1 training image, expected at least 2"):
        Bench(colours, 4, 0).fit(sample, lambda samples, features: (features.whole, features.whole))


def test_masks_that_say_nothing(tmp_path, colours):
    folder = write_lip(tmp_path)
    for path in (folder / "train_segmentations").iterdir():
        save_image(path, np.full((32, 16), 255))
    with pytest.raises(DataError, match="train_images: in 10 training images too little is labelled"):
        _probe("parsing", {"parsing": folder}, colours)


def test_splits_must_agree_on_their_labels(tmp_path):
    folder = write_coco(tmp_path)
    path = folder / "annotations" / "person_keypoints_val.json"
    path.write_text(path.read_text().replace("left_hip", "left_knee"))
    with pytest.raises(DataError, match="train and val have other labels"):
        read_splits({"pose": folder}, None, 0)


def test_a_limit_draws_by_seed_and_keeps_people_together():
    def split(people, camera):
        return Split(tuple(Sample(f"{p}_{i}", Identity(p, camera)) for i, p in enumerate(people)))

    splits = {"query": split([1, 1, 2, 3, 3, 4], 1), "gallery": split([0, 1, 2, 2, 2, 3, 4], 2)}
    drawn = set()
    for seed in range(20):
        kept = limit_splits(splits, 4, seed)
        people = [{sample.target.person for sample in kept[name].samples} for name in ("query", "gallery")]
        assert people[0] == people[1]
        assert all(0 < len(part.samples) <= 4 for part in kept.values())
        for name, part in kept.items():  # all images of those people, in order
            assert part.samples == tuple(s for s in splits[name].samples if s.target.person in people[0])
        drawn.add(tuple(sorted(people[0])))
    assert len(drawn) > 3
    assert len(limit_splits(splits, 1, 0)["query"].samples) >= 1
    # People whom the gallery lacks, or has from the same camera alone, cannot be found and are not drawn.
    strangers = {"query": split([1, 2, 3], 1), "gallery": split([1, 0], 2)}
    strangers["gallery"] = Split((*strangers["gallery"].samples, *split([2], 1).samples))
    for seed in range(5):
        assert [s.target for s in limit_splits(strangers, 1, seed)["query"].samples] == [Identity(1, 1)]
    with pytest.raises(DataError, match="none of 2 query images has its person in the gallery under another camera"):
        limit_splits({**strangers, "query": split([2, 3], 1)}, 1, 0)

    numbers = {"train": Split(tuple(Sample(str(i), i) for i in range(50)), ("label",))}
    kept = limit_splits(numbers, 10, 3)["train"]
    values = [sample.target for sample in kept.samples]
    assert (len(values), kept.labels) == (10, ("label",))
    assert values == sorted(values) != list(range(10))
    assert kept == limit_splits(numbers, 10, 3)["train"] != limit_splits(numbers, 10, 4)["train"]
    assert limit_splits(numbers, 100, 0) == limit_splits(numbers, None, 0) == numbers
