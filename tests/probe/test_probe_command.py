"""``dpal-edge probe`` as a call, and probing in memory."""

import json
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.probe.command import probe
from dpal_edge.probe.validation import probe_backbone
from tests.probe.conftest import CONFIG, tiny_student
from tests.runtime.tiny_bundle import write_bundle
from tests.train.conftest import write_people


@pytest.fixture
def options(folders):
    return [f"{name}={folder}" for name, folder in folders.items()]


@pytest.fixture
def teacher(tmp_path):
    save_file(tiny_student(2).state_dict(), tmp_path / "teacher.safetensors")
    return f"{tmp_path / 'teacher.safetensors'}?heads=2+4"


def test_all_tasks_and_a_teacher(run, options, teacher, tmp_path):
    people = write_people(tmp_path / "people", 12)
    done, totals = [], []

    @contextmanager
    def progress(total):
        totals.append(total)
        yield done.append

    result = probe(str(run), tasks=options, teacher=teacher, data=[str(people)], device="cpu", progress=progress)
    assert totals == [sum(done)] == [6 + 7 + 20 + 24 + 32 + 12]
    assert list(result.tasks) == ["reid", "parsing", "pose", "attributes"]
    assert result.similarity.images == 12
    assert result.similarity.teacher["width"] == 24

    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["tasks"]["reid"]["images"] == {"query": 6, "gallery": 7}
    assert document["model"]["sha256"] == result.model["sha256"]
    assert document["seed"] == 0
    assert document["dpal_edge"]

    lines = result.as_text().splitlines()
    assert [line.split()[0] for line in lines] == ["model", "reid", "parsing", "pose", "attributes", "similarity"]
    assert f"mAP {result.tasks['reid'].metrics['mAP']:.3f}" in lines[1]
    assert f"on 6 query and 7 gallery images of {result.tasks['reid'].data}" in lines[1]

    again = probe(str(run), tasks=options, teacher=teacher, data=[str(people)], device="cpu")
    assert again == result  # nothing in it is by chance


def test_a_model_is_most_similar_to_itself(run, tmp_path):
    people = write_people(tmp_path / "people", 24)
    # A checkpoint tells its own heads; as a teacher it takes its own normalisation.
    itself = run / "checkpoints" / "step-00000007.safetensors"
    found = probe(str(run), teacher=str(itself), data=[str(people)], size=(64, 32), device="cpu").similarity.metrics
    other = probe("random:vit_tiny", teacher=str(itself), data=[str(people)], size=(64, 32), device="cpu")
    for name in ("global/CKA", "patch/CKA", "patch/centred_cosine"):
        assert found[name] > max(0.9, other.similarity.metrics[name]), name


def test_a_limit_holds_for_every_split(run, options, teacher, tmp_path):
    people = write_people(tmp_path / "people", 20)
    result = probe(str(run), tasks=options, teacher=teacher, data=[str(people)], limit=10, device="cpu")
    assert result.limit == 10
    assert result.similarity.images == 10
    assert all(count <= 10 for task in result.tasks.values() for count in task.images.values())


def test_tasks_on_patches_are_refused_for_a_bundle(tmp_path, options, folders):
    bundle = str(write_bundle(tmp_path / "bundle"))
    with pytest.raises(
        ConfigError, match="an embedding and no patch tokens, which the probe for parsing and pose needs"
    ):
        probe(bundle, tasks=options)
    result = probe(bundle, tasks=[f"{name}={folders[name]}" for name in ("reid", "attributes")])
    assert list(result.tasks["reid"].metrics) == ["mAP", "rank-1", "rank-5"]
    assert result.tasks["attributes"].metrics["mA"] == 1.0  # it embeds mean colours


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to probe: give --task NAME=DIR, or --teacher SPEC with --data DIR"),
        ({"teacher": "x.pth"}, "need each other"),
        ({"data": ["people"]}, "need each other"),
        ({"tasks": ["reid=/nowhere"], "batch": 0}, "batch 0, limit None: expected 1 or more"),
        ({"tasks": ["reid=/nowhere"], "limit": 0}, "batch 32, limit 0: expected 1 or more"),
        ({"tasks": ["depth=/nowhere"]}, "no task 'depth'"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ConfigError, match=message):
        probe("random:vit_tiny", **given)


def test_data_are_checked_before_the_model_is_opened(tmp_path):
    with pytest.raises(DataError, match=r"'query' is in none of the layouts known here\. Market-1501: "):
        probe("gone.pth", tasks=[f"reid={tmp_path}"])


def test_a_backbone_in_training_is_probed_and_left_alone(run, options, folders):
    backbone = tiny_student(0).train()
    backbone.norm.eval()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = probe_backbone(
            backbone,
            folders,
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
            size=CONFIG.size,
            device="cpu",
            limit=10,
            batch=4,
        )
    assert backbone.training
    assert not backbone.norm.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()

    expected = probe(str(run), tasks=options, limit=10, device="cpu")
    flat = {f"{name}/{key}": value for name, task in expected.tasks.items() for key, value in task.metrics.items()}
    assert found == pytest.approx(flat, abs=1e-4)
    assert {"reid/mAP", "parsing/mIoU", "pose/PCK@0.2", "attributes/mA"} <= set(found)
