"""Tasks by name."""

from pathlib import Path

import pytest

from dpal_edge.errors import ConfigError
from dpal_edge.tasks.table import TASKS, parse_tasks
from tests.tasks import layouts


def write_detection(folder: Path) -> Path:
    for path in (layouts.write_coco(folder) / "annotations").iterdir():
        path.rename(path.with_name(path.name.replace("person_keypoints", "instances")))
    return folder


WRITERS = {
    "reid": layouts.write_market,
    "parsing": layouts.write_lip,
    "pose": layouts.write_coco,
    "attributes": layouts.write_attributes,
    "detection": write_detection,
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_splits(name, tmp_path):
    folder = WRITERS[name](tmp_path / name)
    for split in TASKS[name].splits:
        samples = TASKS[name].read(folder, split).samples
        assert len(samples) >= 6
        assert all(sample.image.is_file() for sample in samples)


def test_options_are_parsed():
    assert parse_tasks(["reid=a=b", "pose=/data/coco"]) == {"reid": Path("a=b"), "pose": Path("/data/coco")}
    assert parse_tasks([]) == {}
    with pytest.raises(ConfigError, match="no task 'detection', expected one of: reid, pose"):
        parse_tasks(["detection=a"], ("reid", "pose"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["reid"], "task 'reid': expected NAME=DIR"),
        (["reid="], "task 'reid=': expected NAME=DIR"),
        (["faces=x"], "no task 'faces', expected one of: reid, parsing, pose, attributes, detection"),
        (["reid=a", "reid=b"], "task 'reid=b': reid is given twice"),
    ],
)
def test_wrong_options(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_tasks(texts)
