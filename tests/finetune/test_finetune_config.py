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
    assert build_config({**BASE, **PRESETS[name]}).steps == PRESETS[name]["steps"]


def test_the_command_line_knows_the_presets():
    assert tuple(PRESETS) == FINETUNE_PRESETS


def test_the_batch_is_divided_by_the_square_root_of_the_examples():
    assert build_config({**BASE, "batch": 40}).counts({"pose": 900, "reid": 100}) == {"pose": 30, "reid": 10}


def test_the_batch_is_divided_by_shares():
    config = build_config({**BASE, "batch": 10, "share": ["pose=2"]})
    assert config.counts({"pose": 1, "reid": 100}) == {"pose": 7, "reid": 3}
    assert build_config({**BASE, "batch": 2, "share": ["pose=99"]}).counts({"pose": 9, "reid": 9})["reid"] == 1


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
        ({"share": ["pose"]}, "share 'pose' is '', expected float"),
        ({"share": ["pose=0"]}, "share 'pose=0': expected TASK=NUMBER, for example pose=2, the number above 0"),
        ({"weight": ["parsing=1"]}, "weight names parsing, expected tasks of this run: pose, reid"),
        ({"batch": 1}, "batch is 1, expected at least one image of each of 2 tasks"),
        ({"task": ["pose=x"], "reid_teacher": "t.xml"}, "no unlabelled images to learn from: give --task reid=DIR"),
        ({"attribute_teacher": "t"}, "attribute_teacher is given, but no .* give --task attributes=DIR"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_config({**BASE, **fields})
