"""Settings of fine-tuning."""

import json

import pytest

from dpal_edge.cli import FINETUNE_PRESETS
from dpal_edge.errors import ConfigError
from dpal_edge.finetune.config import build_config
from dpal_edge.finetune.presets import PRESETS

BASE = {"init": "random:vit_tiny", "task": ["pose=/data/coco", "reid=/data/market"]}


def test_settings_survive_json():
    config = build_config({**BASE, "lr": 1, "size": [256, 128], "share": "pose=3"})
    assert build_config(json.loads(json.dumps(config.to_dict()))) == config
    assert config.share == ("pose=3",)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = build_config({**BASE, "task": ["detection=/data/coco"], **PRESETS[name]})
    assert config.steps == PRESETS[name]["steps"]


def test_the_command_line_knows_the_presets():
    assert tuple(PRESETS) == FINETUNE_PRESETS


def test_the_batch_is_divided_by_the_square_root_of_the_examples():
    config = build_config({**BASE, "task": ["pose=/data/coco", "parsing=/data/lip"], "batch": 40})
    assert config.counts({"pose": 900, "parsing": 100}) == {"pose": 30, "parsing": 10}


def test_the_batch_is_divided_by_shares():
    tasks = {"task": ["pose=/data/coco", "parsing=/data/lip", "detection=/data/coco"]}
    config = build_config({**BASE, **tasks, "batch": 10, "share": ["pose=2"]})
    assert config.counts({"pose": 1, "parsing": 100}) == {"pose": 7, "parsing": 3}
    config = build_config({**BASE, **tasks, "batch": 4, "share": ["pose=99"]})
    assert config.counts({"pose": 9, "parsing": 9, "detection": 9}) == {"pose": 2, "parsing": 1, "detection": 1}


def test_labelled_identities_come_in_several_people_of_four_images():
    published = {"reid": 12_936, "pose": 149_813, "parsing": 30_462, "attributes": 80_000}
    tasks = {"task": [f"{task}=/data" for task in published]}
    config = build_config({**BASE, **tasks, "batch": 48})
    assert config.counts(published) == {"reid": 8, "pose": 19, "parsing": 8, "attributes": 13}
    config = build_config({**BASE, **tasks, "batch": 64, "share": ["reid=5", "pose=1", "parsing=1", "attributes=1"]})
    assert config.counts(published) == {"reid": 40, "pose": 8, "parsing": 8, "attributes": 8}
    alone = build_config({**BASE, "task": ["reid=/data"], "batch": 30})
    assert alone.counts({"reid": 9}) == {"reid": 28}
    taught = build_config({**BASE, "task": ["reid=/data"], "batch": 3, "reid_teacher": "model.xml"})
    assert taught.counts({"reid": 9}) == {"reid": 3}
    with pytest.raises(ConfigError, match=r"batch is 1, expected at least 2: an image of each task$"):
        build_config({**BASE, "task": ["pose=/data", "parsing=/data"], "batch": 1})


def test_weights_of_losses():
    config = build_config({**BASE, "weight": ["pose=2.5"]})
    assert [config.loss_weight(task) for task in ("pose", "reid", "attributes")] == [2.5, 1.0, 0.1]


def test_people_who_are_recognised_hardly_turn():
    config = build_config({**BASE, "rotate": 40.0})
    assert (config.augmentation("pose").rotate, config.augmentation("reid").rotate) == (40.0, 10.0)


def test_views_that_a_teacher_sees_differ_more():
    settings = {**BASE, "hue": 0.3, "muted": 0.4, "colour": 0.3, "low_resolution": 0.2}
    taught, labelled = (build_config({**settings, "reid_teacher": t}).augmentation("reid") for t in ("x.xml", None))
    assert (taught.hue, taught.muted, taught.colour, taught.low_resolution) == (0.3, 0.4, 0.6, 0.5)
    assert (labelled.hue, labelled.muted, labelled.colour, labelled.low_resolution) == (0.0, 0.0, 0.3, 0.2)
    pose = build_config({**settings, "reid_teacher": "x.xml"}).augmentation("pose")
    assert pose == build_config(settings).augmentation("pose")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": []}, "no task to train: give --task NAME=DIR"),
        ({"task": ["hair=x"]}, "no task 'hair'"),
        ({"stepz": 4}, "unknown setting stepz; known are attribute_head, attribute_loss, attribute_teacher, "),
        ({"steps": 0}, "steps is 0, expected more than 0"),
        ({"evaluate_images": 0}, "evaluate_images is 0, expected more than 0"),
        ({"evaluate_every": -1}, "evaluate_every is -1, expected 0 or more"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5, expected 0 to 1"),
        ({"freeze_blocks": -1}, "freeze_blocks is -1, expected 0 or more"),
        ({"pose_head": "points"}, "pose_head is 'points', expected one of simcc, heatmap"),
        ({"share": ["pose"]}, "share 'pose' is '', expected a finite number"),
        ({"share": ["pose=0"]}, "share 'pose=0': expected TASK=NUMBER, for example pose=2, the number above 0"),
        ({"weight": ["parsing=1"]}, "weight names parsing, expected tasks of this run: pose, reid"),
        ({"batch": 8}, "batch is 8, expected at least 9: an image of each task, of labelled reid 4 of each of 2 peop"),
        ({"share": ["pose=1,reid=2"]}, "share 'pose=1,reid=2': one TASK=NUMBER; repeat --set share=TASK=NUMBER for"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected less than 2\\^63"),
        ({"task": ["pose=x"], "reid_teacher": "t.xml"}, "no unlabelled images to learn from: give --task reid=DIR"),
        ({"attribute_teacher": "t"}, "attribute_teacher is given, but no .* give --task attributes=DIR"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_config({**BASE, **fields})
